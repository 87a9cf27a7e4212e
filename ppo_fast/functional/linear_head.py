"""From hidden states through a language model's head to log-probs and to the PPO loss.

With a vocabulary of 150,000 the logits are most of an update's memory, and the head up to half of its
time. Neither op ever holds all logits. A PPO loss of tokens is known row by row as the logits appear,
so its gradient is multiplied out at once: three matrix products, 6 M V D operations, where autograd
over chunks recomputes the logits and takes four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ppo_fast.capture import may_read
from ppo_fast.dispatch import current_backend
from ppo_fast.functional import _linear_head_rows as by_rows
from ppo_fast.functional import _linear_head_tiles as by_tiles
from ppo_fast.functional._categorical import ILLEGAL
from ppo_fast.functional._linear_head import (
    MEGABYTE,
    Head,
    Job,
    Sinks,
    check_buffer,
    check_head,
    check_indices,
)
from ppo_fast.functional._linear_head_library import traced_log_probs, traced_loss
from ppo_fast.functional._rows import compute_dtype, refuse_double_backward
from ppo_fast.functional._surrogate import Surrogate, assemble, joined, nothing, surrogate
from ppo_fast.functional._terms import (
    Rows,
    Scalar,
    Terms,
    check_rows,
    check_terms,
    is_on,
    row_ent_coef,
    to_rows,
)
from ppo_fast.results import PPOLoss

WORKSPACE_MB = 512


def _takes_rows(hidden: Tensor) -> bool:
    """Whether the kernels of whole rows serve this call, which ask the device for nothing."""
    return not may_read(hidden.device) or current_backend() in ("triton", "check")


def _job(
    op: str, hidden: Tensor, index: Tensor, mask: Tensor | None, head: Head, workspace_mb: float
) -> Job:
    """Rows [M, D] of hidden states, masked ones left out where that needs no waiting."""
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    index = index.reshape(-1).long()
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    head = head._replace(weight=weight, bias=bias)
    dtype, workspace = compute_dtype(hidden, weight), int(workspace_mb * MEGABYTE)
    mask = None if mask is None else mask.reshape(-1)
    if _takes_rows(hidden):
        if mask is not None:
            index = index.masked_fill(~mask, 0)
        return Job(hidden, index, None, mask, head, dtype, workspace)
    chosen = None if mask is None else mask.nonzero().squeeze(1)
    check_indices(op, index if chosen is None else index[chosen], weight.shape[0])
    return Job(hidden, index, chosen, None, head, dtype, workspace)


def _spread(job: Job, rows: Tensor) -> Tensor:
    """What was found for the rows of a job as [M], 0 for the others."""
    if job.chosen is None:
        return rows
    return rows.new_zeros(len(job.hidden)).index_copy_(0, job.chosen, rows)


def _empty_hidden(job: Job) -> Tensor:
    """[M, D] for the gradient of the rows of a job; 0 for the others."""
    new = torch.empty if job.chosen is None else torch.zeros
    return new(job.hidden.shape, dtype=job.dtype, device=job.hidden.device)


def _new_sinks(job: Job, hidden: bool, weight: bool, bias: bool) -> Sinks:
    like = job.head.weight
    of_weight = None
    if weight:
        new = torch.empty_like if job.number else torch.zeros_like
        of_weight = new(like, dtype=job.dtype)
    return Sinks(
        _empty_hidden(job) if hidden else None,
        of_weight,
        like.new_zeros(like.shape[0], dtype=job.dtype) if bias else None,
        fresh=True,
    )


@overload
def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    workspace_mb: float = ...,
) -> Tensor: ...


@overload
def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
    workspace_mb: float = ...,
) -> tuple[Tensor, Tensor]: ...


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    workspace_mb: float = WORKSPACE_MB,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_probs_from_logits` of a linear head, whose logits never exist all at once.

        x = logit_scale (h W^T + b),   with a softcap c:  x = c tanh(x / c)
        log p(y) = log_softmax(x / T)_y,   H = -Σ_j p_j log p_j

    The logits and everything made of them are float32 (float64 for float64 inputs), whatever the
    dtype of hidden states and weights: products of lower precision accumulate in float32. The
    gradient computes the logits anew. Infinite and NaN logits are treated as in
    `log_probs_from_logits`.

    Args:
        hidden: [..., D] floating; any strides. Differentiable.
        weight: [V, D] floating; any strides. Differentiable; its gradient is summed in float32.
        index: [...] int64 or int32 in [0, V).
        bias: [V]; differentiable.
        temperature: T > 0, a number or a 0-d tensor (not differentiated).
        softcap: c > 0 (Gemma 2's `final_logit_softcapping`).
        logit_scale: > 0 (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        mask: [...] bool. Where False the outputs are 0, nothing is read and no gradient flows. On a
            CPU such rows cost nothing; a GPU multiplies them out.
        with_entropy: also return the entropy, in nats.
        workspace_mb: on a GPU, at most so many MiB of logits at a time (one row at least). On a CPU
            logits pass by in tiles that stay in cache.

    Returns:
        log_probs [...], or (log_probs, entropy): float32, or float64 if an input is.

    Raises:
        IndexError: an unmasked index is outside [0, V) (CPU; on a GPU see `log_probs_from_logits`).
        NotImplementedError: called under a `torch.func` transform, or differentiated twice.
        ValueError: shapes, dtypes or devices do not fit, or a number is out of range.
    """
    op = "log_probs_from_hidden"
    check_head(
        op, hidden, weight, index, bias, temperature, softcap, logit_scale, mask, workspace_mb
    )
    head = Head(weight, bias, temperature, softcap, logit_scale)
    if torch.compiler.is_compiling():
        traced = traced_log_probs(hidden, head, index, mask, with_entropy, workspace_mb)
        found = [out.view(index.shape) for out in traced[: 1 + with_entropy]]
        return (found[0], found[1]) if with_entropy else found[0]
    job = _job(op, hidden, index, mask, head, workspace_mb)
    differentiable = (hidden, weight) if bias is None else (hidden, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        log_probs, entropy = _LogProbs.apply(hidden, weight, bias, job, with_entropy)
    else:
        with torch.no_grad():
            log_probs, entropy, _ = _forward(job, with_entropy)
    log_probs = log_probs.view(index.shape)
    return (log_probs, entropy.view(index.shape)) if with_entropy else log_probs


def _forward(
    job: Job, with_entropy: bool
) -> tuple[Tensor, Tensor | None, by_tiles.RowStats | None]:
    """Log-probs and entropies [M], and what a gradient needs of the rows."""
    with torch.autocast(job.hidden.device.type, enabled=False):
        if _takes_rows(job.hidden):
            found = by_rows.forward(job, with_entropy)
            return found[0], found[1] if with_entropy else None, None
        stats = by_tiles.forward(job, with_entropy)
    entropy = _spread(job, stats.entropy()) if with_entropy else None
    return _spread(job, stats.log_probs(job.head.divisor)), entropy, stats


def _backward(
    job: Job,
    stats: by_tiles.RowStats | None,
    g: Tensor | None,
    h: Tensor | None,
    wanted: Sequence[bool],
) -> Sinks:
    """The gradients of hidden states, weight and bias for upstream gradients [M]."""
    sinks = _new_sinks(job, *wanted)
    with torch.autocast(job.hidden.device.type, enabled=False):
        if stats is None:
            by_rows.backward(job, g, h, sinks)
        else:
            if job.chosen is not None:
                g = None if g is None else g[job.chosen]
                h = None if h is None else h[job.chosen]
            by_tiles.backward(job, stats, g, h, sinks)
    return sinks


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: Job,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropy, ctx.stats = _forward(job, with_entropy)
        ctx.set_materialize_grads(False)
        ctx.job = job
        # Kept as the inputs they are, so that an edit in place before the backward is noticed.
        ctx.save_for_backward(hidden, weight, bias)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("log_probs_from_hidden")
        hidden, weight, bias = ctx.saved_tensors
        if g is None and h is None:
            return None, None, None, None, None
        sinks = _backward(ctx.job, ctx.stats, g, h, ctx.needs_input_grad[:3])
        grad_hidden = None
        if sinks.hidden is not None:
            grad_hidden = sinks.hidden.view(hidden.shape).to(hidden.dtype)
        of_weight = None if sinks.weight is None else sinks.weight.to(weight.dtype)
        of_bias = None if sinks.bias is None else sinks.bias.to(bias.dtype)
        return grad_hidden, of_weight, of_bias, None, None


class _Loss(NamedTuple):
    """A loss and its gradients."""

    result: PPOLoss
    sinks: Sinks
    grad_values: Tensor | None
    """[M]"""


def ppo_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_coef: Scalar,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    clip_coef_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: Scalar = 0.5,
    vf_clip_coef: Scalar | None = None,
    vf_clip: str = "max",
    ent_coef: Scalar = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: Scalar = 0.0,
    kl_estimator: str = "k3",
    old_kl_coef: Scalar = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    norm_adv: bool = False,
    advantage_moments: Tensor | None = None,
    normalizer: Scalar | None = None,
    weight_grad: Tensor | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> PPOLoss:
    """`ppo_loss` of tokens, straight from the hidden states and the head that makes their logits.

    Logits as in `log_probs_from_hidden`, the loss as in `ppo_loss_from_logits`. All gradients are
    computed together with the loss and only scaled in the backward, from logits that are in memory
    anyway: three matrix products, two where the weight is frozen, one without gradients.

    What is held between forward and backward is the gradients themselves: [M, D] and [V, D] float32.
    The latter is handed on as it is where the weight is float32, or goes to `weight_grad`.

    Args:
        hidden: [..., D] floating; any strides. Differentiable.
        weight: [V, D] floating; any strides. Differentiable. Without requires_grad it costs no
            product.
        index: [...] int64 or int32, the tokens taken.
        old_log_probs, advantages: [...].
        bias, temperature, softcap, logit_scale: as in `log_probs_from_hidden`.
        clip_coef: as in `ppo_loss`, with all further arguments; their shape is [...].
        mask: [...] bool. Where False nothing is read. On a CPU such rows cost nothing; a GPU
            multiplies them out.
        weight_grad: [V, D] floating, best float32, that the weight's gradient is added to in this
            call ("main_grad" of Megatron), as of the loss with upstream gradient 1; the backward then
            gives the weight none, and refuses another upstream gradient (put factors into `weights`
            or `normalizer`).
        workspace_mb: at most so many MiB of logits at a time (one row at least; on a CPU, a quarter
            of all logits at most, and at least three tiles of 2 MiB for each thread).

    Returns:
        PPOLoss: `loss`, differentiable by `hidden`, `weight`, `bias` and `values`; `stats`, always
        with the entropy. float32, or float64 if an input is.

    Raises:
        IndexError: as `log_probs_from_hidden`.
        NotImplementedError: called under a `torch.func` transform, or differentiated twice.
        RuntimeError: in the backward, with `weight_grad`: the upstream gradient is not 1.
        ValueError: as `ppo_loss` and `log_probs_from_hidden`; or weight_grad does not fit the weight,
            or is given where gradients are off.
    """
    op = "ppo_loss_from_hidden"
    t = Terms(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        ref_log_probs=ref_log_probs,
        mask=mask,
        weights=weights,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        vf_coef=vf_coef,
        vf_clip_coef=vf_clip_coef,
        vf_clip=vf_clip,
        ent_coef=ent_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        old_kl_coef=old_kl_coef,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    head = Head(weight, bias, temperature, softcap, logit_scale)
    _check(op, hidden, index, head, t, workspace_mb)
    if weight_grad is not None:
        check_buffer(op, "weight_grad", weight_grad, weight)
        if not torch.is_grad_enabled():
            raise ValueError(
                f"{op}: weight_grad is given where gradients are off; leave it out for the loss "
                "alone, or call hidden_gradients"
            )
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    wanted[1] = wanted[1] and weight_grad is None
    if torch.compiler.is_compiling():
        if weight_grad is not None:
            raise ValueError(
                f"{op}: weight_grad under torch.compile is not supported; leave it out"
            )
        return traced_loss(hidden, head, index, t, wanted, workspace_mb)
    with torch.no_grad():
        found = _loss(op, hidden, index, head, t, workspace_mb, wanted, weight_grad, None)
    sinks = found.sinks
    gradients = [
        (hidden, sinks.hidden),
        (weight, sinks.weight if weight_grad is None else None),
        (bias, sinks.bias),
        (values, found.grad_values),
    ]
    result = found.result
    return PPOLoss(_attached(result.loss, gradients, weight_grad is not None), result.stats)


@torch.no_grad()
def hidden_gradients(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    t: Terms,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> tuple[PPOLoss, Tensor, Tensor | None]:
    """`ppo_loss_from_hidden` for callers without autograd: (result, d / d hidden, d / d values).

    Args:
        hidden, weight, index, bias, temperature, softcap, logit_scale, workspace_mb: as there.
        t: its further arguments.
        weight_grad: [V, D], which the weight's gradient is added to; None is a frozen weight.
        bias_grad: [V], likewise.

    Returns:
        The result, without graph; the gradients [..., D] and [...] in the dtypes of `hidden` and of
        `t.values`, None where there are no values.

    Raises:
        As `ppo_loss_from_hidden`.
    """
    op = "hidden_gradients"
    head = Head(weight, bias, temperature, softcap, logit_scale)
    _check(op, hidden, index, head, t, workspace_mb)
    if weight_grad is not None:
        check_buffer(op, "weight_grad", weight_grad, weight)
    if bias_grad is not None:
        if bias is None:
            raise ValueError(f"{op}: bias_grad is given but bias is None; pass bias or drop it")
        check_buffer(op, "bias_grad", bias_grad, bias)
    wanted = [True, False, False]
    found = _loss(op, hidden, index, head, t, workspace_mb, wanted, weight_grad, bias_grad)
    of_hidden, of_values = found.sinks.hidden, found.grad_values
    assert of_hidden is not None
    of_hidden = of_hidden.view(hidden.shape).to(hidden.dtype)
    if t.values is not None and of_values is not None:
        of_values = of_values.view(t.values.shape).to(t.values.dtype)
    return found.result, of_hidden, of_values


def _check(
    op: str, hidden: Tensor, index: Tensor, head: Head, t: Terms, workspace_mb: float
) -> None:
    check_terms(op, t, entropy_given=True)
    numbers = head.temperature, head.softcap, head.scale, t.mask, workspace_mb
    check_head(op, hidden, head.weight, index, head.bias, *numbers)
    check_rows(op, t, index.shape)


def _loss(
    op: str,
    hidden: Tensor,
    index: Tensor,
    head: Head,
    t: Terms,
    workspace_mb: float,
    wanted: Sequence[bool],
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> _Loss:
    """The loss and those gradients that are asked for.

    Args:
        wanted: whether new buffers for the gradients of hidden states, weight and bias are.
        weight_grad, bias_grad: buffers to add to in place of new ones.
    """
    job = _job(op, hidden, index, t.mask, head, workspace_mb)
    rows, count, inv_n = to_rows(op, t, index.shape, job.dtype)
    if job.chosen is not None:
        kept = Rows._make(None if row is None else row[job.chosen] for row in rows)
        rows = kept._replace(
            drop=None, keep=None, weights=kept.weights if t.weights is not None else None
        )
    sinks = _new_sinks(job, *wanted)._replace(scale=inv_n)
    if weight_grad is not None:
        sinks = sinks._replace(weight=weight_grad, fresh=False)
    if bias_grad is not None:
        sinks = sinks._replace(bias=bias_grad)
    parts: list[Surrogate] = []

    def upstream(own: slice, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        own_rows = rows.slice(own)
        part = surrogate(log_probs.clamp(min=ILLEGAL), entropy, own_rows, t)
        parts.append(part)
        if not is_on(t.ent_coef):
            return part.grad_log_probs, None
        return part.grad_log_probs, torch.zeros_like(entropy).sub_(row_ent_coef(own_rows, t))

    with torch.autocast(hidden.device.type, enabled=False):
        if not any(sink is not None for sink in sinks[:3]):
            log_probs, entropy, stats = _forward(job, True)
            if stats is not None:
                log_probs, entropy = stats.log_probs(job.head.divisor), stats.entropy()
            assert entropy is not None
            upstream(slice(0, job.number), log_probs, entropy)
        elif _takes_rows(hidden):
            by_rows.fused(job, upstream, sinks)
        else:
            by_tiles.fused(job, upstream, sinks)
    part = joined(parts) if parts else nothing(rows)
    grad_values = None
    if part.grad_values is not None:
        grad_values = _spread(job, part.grad_values.mul_(inv_n))
    return _Loss(assemble(part, count, inv_n, t, ()), sinks, grad_values)


def _attached(
    loss: Tensor, gradients: Sequence[tuple[Tensor | None, Tensor | None]], only_one: bool
) -> Tensor:
    """`loss` with known gradients, (input, gradient)."""
    if not torch.is_grad_enabled():
        return loss
    known = [
        (x, gradient)
        for x, gradient in gradients
        if x is not None and gradient is not None and x.requires_grad
    ]
    if not known:
        return loss
    held = [gradient.view(x.shape) for x, gradient in known]
    return _Attached.apply(loss, held, only_one, *(x for x, _ in known))


class _Attached(torch.autograd.Function):
    """A loss as is, with known gradients, which its backward scales in place and gives away.

    They are float32 until then, where neither 1 / n nor a loss scale can make them vanish.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, held: list[Tensor], only_one: bool, *inputs: Tensor
    ) -> Tensor:
        ctx.held, ctx.only_one = held, only_one
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(loss)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("ppo_loss_from_hidden")
        _ = ctx.saved_tensors  # raises torch's own error where the graph was freed
        if ctx.only_one:
            torch._assert_async(
                grad_loss == 1,
                "ppo_loss_from_hidden: the gradient of the weight was added to weight_grad for an "
                "upstream gradient of 1, but another came; put factors into weights or normalizer",
            )
        as_it_is = may_read(grad_loss.device) and bool(grad_loss == 1)
        given: list[Tensor] = []
        if _graph_is_kept():
            for gradient, dtype in zip(ctx.held, ctx.dtypes, strict=True):
                given.append((gradient * grad_loss).to(dtype))
        else:
            for dtype in ctx.dtypes:
                # Popped, so that autograd is the only owner and need not copy.
                gradient = ctx.held.pop(0)
                given.append((gradient if as_it_is else gradient.mul_(grad_loss)).to(dtype))
                del gradient
        return None, None, None, *given


def _graph_is_kept() -> bool:
    """Whether another backward through the same graph may follow (`retain_graph=True`)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
