"""The `_from_hidden` ops as opaque `torch.library` ops, for `torch.compile(fullgraph=True)`.

Their loops over tiles and chunks read numbers and reuse memory, which a graph cannot hold; as single
nodes they run as in eager mode when the graph does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.functional._linear_head import Head, Job, Sinks
from ppo_fast.functional._linear_head_tiles import RowStats
from ppo_fast.functional._rows import compute_dtype
from ppo_fast.functional._terms import ROW_NAMES, SCALAR_NAMES, Scalar, Terms
from ppo_fast.results import PPO_STATS, PPOLoss

ABSENT = -1.7976931348623157e308
"""Stands for what is None or a tensor among numbers."""

TENSORS = (*(name for name in ROW_NAMES if name != "values"), "advantage_moments")


def _packed(*scalars: Scalar | None) -> tuple[list[float], list[Tensor | None]]:
    numbers = [ABSENT if x is None or isinstance(x, Tensor) else float(x) for x in scalars]
    return numbers, [x if isinstance(x, Tensor) else None for x in scalars]


def _unpacked(
    numbers: Sequence[float], tensors: Sequence[Tensor | None]
) -> list[float | Tensor | None]:
    return [
        tensor if tensor is not None else None if number == ABSENT else number
        for number, tensor in zip(numbers, tensors, strict=True)
    ]


def _head(
    weight: Tensor, bias: Tensor | None, numbers: Sequence[float], tensors: Sequence[Tensor | None]
) -> Head:
    temperature, softcap, scale = _unpacked(numbers, tensors)
    assert temperature is not None
    assert not isinstance(softcap, Tensor)
    assert isinstance(scale, float)
    return Head(weight, bias, temperature, softcap, scale)


def _given(found: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if found is None else found


def _sinks(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten gradients of hidden states [M, D], weight and bias; empty where not wanted."""
    none = hidden.new_empty(0)
    return (
        hidden.new_empty((hidden.shape[:-1].numel(), hidden.shape[-1]), dtype=dtype)
        if wanted[0]
        else none,
        torch.empty_like(weight, dtype=dtype) if wanted[1] else none.clone(),
        weight.new_empty(weight.shape[0], dtype=dtype) if wanted[2] else none.clone(),
    )


def _job(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    workspace_mb: float,
) -> Job:
    from ppo_fast.functional import linear_head

    head = _head(weight, bias, numbers, tensors)
    return linear_head._job(op, hidden, index, mask, head, workspace_mb)


@torch.library.custom_op("ppo_fast::head_log_probs", mutates_args=())
def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_entropy: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies [M], and what the gradient needs of the rows, [4, M]."""
    from ppo_fast.functional import linear_head

    given = hidden, weight, bias, index, mask, numbers, tensors, workspace_mb
    job = _job("log_probs_from_hidden", *given)
    log_probs, entropy, stats = linear_head._forward(job, with_entropy)
    kept = log_probs.new_zeros(4, len(log_probs))
    if stats is not None:
        for row, of in zip(kept, stats, strict=True):
            row.copy_(linear_head._spread(job, of.squeeze(1)))
    return log_probs, _given(entropy, log_probs), kept


@head_log_probs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_entropy: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.numel()
    log_probs = hidden.new_empty(rows, dtype=compute_dtype(hidden, weight))
    return log_probs, log_probs.new_empty(rows if with_entropy else 0), log_probs.new_empty(4, rows)


@torch.library.custom_op("ppo_fast::head_log_probs_backward", mutates_args=())
def head_log_probs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    kept: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    wanted: Sequence[bool],
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden states [M, D], weight and bias; empty where not wanted."""
    from ppo_fast.functional import linear_head

    given = hidden, weight, bias, index, mask, numbers, tensors, workspace_mb
    job = _job("log_probs_from_hidden", *given)
    stats = None
    if not linear_head._takes_rows(hidden):
        rows = kept if job.chosen is None else kept[:, job.chosen]
        stats = RowStats._make(rows.unsqueeze(2).unbind())
    sinks = linear_head._backward(job, stats, g, h, wanted)
    return _three(sinks, hidden)


@head_log_probs_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    kept: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    wanted: Sequence[bool],
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sinks(hidden, weight, wanted, kept.dtype)


def _three(sinks: Sinks, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (_given(sink, like) for sink in sinks[:3])
    return hidden, weight, bias


def _keep_log_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, index, mask, numbers, tensors, with_entropy, workspace_mb = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, index, mask, output[2], *tensors)
    ctx.numbers, ctx.with_entropy, ctx.workspace_mb = numbers, with_entropy, workspace_mb


def _log_probs_backward(ctx: Any, g: Tensor | None, h: Tensor | None, _: Any) -> tuple[Any, ...]:
    hidden, weight, bias, index, mask, kept, *tensors = ctx.saved_tensors
    h = h if ctx.with_entropy else None
    rest = (None,) * 6
    if g is None and h is None:
        return None, None, None, *rest
    wanted = list(ctx.needs_input_grad[:3])
    given = hidden, weight, bias, index, mask, ctx.numbers, tensors, kept, g, h, wanted
    found = head_log_probs_backward(*given, ctx.workspace_mb)
    gradients = [
        gradient.view(x.shape).to(x.dtype) if want else None
        for gradient, x, want in zip(found, (hidden, weight, bias), wanted, strict=True)
    ]
    return *gradients, *rest


head_log_probs.register_autograd(_log_probs_backward, setup_context=_keep_log_probs)


def traced_log_probs(
    hidden: Tensor,
    head: Head,
    index: Tensor,
    mask: Tensor | None,
    with_entropy: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (empty unless asked for), [M], as one node of a graph."""
    packed = _packed(head.temperature, head.softcap, head.scale)
    given = hidden, head.weight, head.bias, index, mask, *packed
    log_probs, entropy, _ = head_log_probs(*given, with_entropy, float(workspace_mb))
    return log_probs, entropy


@torch.library.custom_op("ppo_fast::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    rows: Sequence[Tensor | None],
    head_numbers: Sequence[float],
    head_tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clip: str,
    kl_estimator: str,
    norm_adv: bool,
    wanted: Sequence[bool],
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, stats and the gradients of hidden states, weight, bias and values."""
    from ppo_fast.functional import linear_head

    options: dict[str, Any] = dict(zip(TENSORS, rows, strict=True))
    options |= dict(zip(SCALAR_NAMES, _unpacked(numbers, tensors), strict=True))
    options |= {"vf_clip": vf_clip, "kl_estimator": kl_estimator, "norm_adv": norm_adv}
    t = Terms(values=values, **options)
    head = _head(weight, bias, head_numbers, head_tensors)
    op = "ppo_loss_from_hidden"
    with torch.no_grad():
        found = linear_head._loss(op, hidden, index, head, t, workspace_mb, wanted, None, None)
    gradients = *_three(found.sinks, hidden), _given(found.grad_values, hidden)
    return found.result.loss, found.result.stats.clone(), *gradients


@head_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    rows: Sequence[Tensor | None],
    head_numbers: Sequence[float],
    head_tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clip: str,
    kl_estimator: str,
    norm_adv: bool,
    wanted: Sequence[bool],
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden, weight)
    loss, stats = hidden.new_empty((), dtype=dtype), hidden.new_empty(len(PPO_STATS), dtype=dtype)
    of_values = hidden.new_empty(0)
    if values is not None:
        of_values = hidden.new_empty(values.numel(), dtype=dtype)
    return loss, stats, *_sinks(hidden, weight, wanted, dtype), of_values


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.given = [None if x is None else (x.shape, x.dtype) for x in inputs[:4]]


def _loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = [
        (known * grad_loss).view(given[0]).to(given[1]) if given is not None and want else None
        for known, given, want in zip(
            ctx.saved_tensors, ctx.given, ctx.needs_input_grad[:4], strict=True
        )
    ]
    return *gradients, *(None,) * 11


head_loss.register_autograd(_loss_backward, setup_context=_keep_loss)


def traced_loss(
    hidden: Tensor,
    head: Head,
    index: Tensor,
    t: Terms,
    wanted: Sequence[bool],
    workspace_mb: float,
) -> PPOLoss:
    """The loss as one node of a graph, and another in its backward."""
    result = head_loss(
        hidden,
        head.weight,
        head.bias,
        t.values,
        index,
        [getattr(t, name) for name in TENSORS],
        *_packed(head.temperature, head.softcap, head.scale),
        *_packed(*(getattr(t, name) for name in SCALAR_NAMES)),
        t.vf_clip,
        t.kl_estimator,
        t.norm_adv,
        list(wanted),
        float(workspace_mb),
    )
    return PPOLoss(result[0], result[1].detach())
