"""The language-model head with its vocabulary spread over processes.

Each process of a group holds some rows of the head's weight, consecutive and in the order of the
ranks, and the hidden states of all rows of the batch. A row's softmax is reduced on each process to
four numbers: maximum, sum, weighted sum and the logit at the index. One all-gather of those is all
that the outputs need. The gradient of the local weight needs no further word from the others; that of
the hidden states is a sum over processes, one all-reduce of [M, D].

Every process of the group has to make the same calls with the same rows; what comes out, and the
gradient of the hidden states, is the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.capture import may_read
from ppo_fast.functional import _linear_head_rows as by_rows
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
from ppo_fast.functional._linear_head_tiles import RowStats, merged
from ppo_fast.functional._rows import (
    LOWEST,
    Blocks,
    Stats,
    check_logits,
    check_mask,
    check_temperature,
    compute_dtype,
    concatenated,
    converted,
    refuse_double_backward,
    shifted,
    softmax_stats,
)
from ppo_fast.functional._surrogate import assemble, nothing, surrogate
from ppo_fast.functional._terms import (
    Scalar,
    Terms,
    check_rows,
    check_terms,
    is_on,
    row_ent_coef,
    to_rows,
)
from ppo_fast.functional.linear_head import WORKSPACE_MB, _attached
from ppo_fast.results import PPOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group


class VocabShard(NamedTuple):
    """Where this process's part of the vocabulary lies."""

    start: int
    """The first token whose logit is here"""
    total: int
    """Tokens on all processes together"""


def vocab_shard(local_size: int, group: Group | None, device: torch.device) -> VocabShard:
    """Exchange the sizes of the parts: one all-gather, for which the host waits.

    Args:
        local_size: rows of the head's weight on this process.
        group: the processes that share the vocabulary; None is this one alone.
        device: where the group's backend takes tensors from.
    """
    if group is None:
        return VocabShard(0, local_size)
    sizes = torch.empty(group.size(), 1, dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.unbind()), sizes.new_tensor([local_size]), group=group)
    counts = sizes.flatten().tolist()
    return VocabShard(sum(counts[: group.rank()]), sum(counts))


class _Split(NamedTuple):
    """A vocabulary in parts, and what the batch's indices are in the one that is here."""

    group: Group | None
    at: Tensor
    """[M, 1] int64: the index among the logits here; 0 where it is not here."""
    here: Tensor
    """[M, 1] bool: whether it is."""
    nowhere: Tensor | None
    """[M, 1] bool: where no process has it; None if that cannot be."""

    @property
    def alone(self) -> bool:
        return self.group is None or self.group.size() == 1


def _split(
    op: str,
    index: Tensor,
    mask: Tensor | None,
    local_size: int,
    group: Group | None,
    shard: VocabShard | None,
) -> _Split:
    """Place the indices [M] in the vocabulary; raises where they have no logit, if asking is free."""
    if shard is None:
        shard = vocab_shard(local_size, group, index.device)
    if not 0 <= shard.start <= shard.start + local_size <= shard.total:
        raise ValueError(
            f"{op}: shard is {tuple(shard)}, but this process has {local_size} logits a row; expected "
            "the (start, total) that vocab_shard(local_size, group, device) gives"
        )
    index = index.long()
    if mask is not None:
        index = index.masked_fill(~mask, 0)
    nowhere = None
    if may_read(index.device):
        check_indices(op, index, shard.total)
    else:
        nowhere = ((index < 0) | (index >= shard.total)).unsqueeze(1)
    at = index.unsqueeze(1) - shard.start
    here = (at >= 0) & (at < local_size)
    return _Split(group, at.masked_fill(~here, 0), here, nowhere)


def _partial(
    logits: Tensor,
    own: slice,
    split: _Split,
    dtype: torch.dtype,
    divisor: Scalar | None,
    with_entropy: bool,
) -> RowStats:
    """Reduce the local logits [R, V_r] of a range of rows; `mean` is yet a sum of e t."""
    parts = []
    for _, (block,), scratch in Blocks(2 if with_entropy else 1, dtype, logits):
        parts.append(softmax_stats(block, dtype, divisor, with_entropy, *scratch)[0])
    maximum, total, weighted = concatenated(parts) if parts else _no_stats(logits, dtype)
    target = logits.gather(1, split.at[own]).to(dtype).masked_fill(~split.here[own], 0.0)
    return RowStats(maximum, total, weighted, target)


def _no_stats(logits: Tensor, dtype: torch.dtype) -> Stats:
    return Stats._make(logits.new_empty(3, 0, 1, dtype=dtype).unbind())


def _exchanged(parts: Sequence[RowStats], split: _Split, divisor: Scalar | None) -> RowStats:
    """The stats of all rows over the whole vocabulary: the all-gather."""
    local = torch.stack([torch.cat(column) for column in zip(*parts, strict=True)])
    if split.alone or not local.shape[1]:
        stats = merged([RowStats._make(local.unbind())], divisor)
    else:
        assert split.group is not None
        every = local.new_empty(split.group.size(), *local.shape)
        dist.all_gather(list(every.unbind()), local, group=split.group)
        stats = merged([RowStats._make(of.unbind()) for of in every.unbind()], divisor)
    if split.nowhere is not None:
        stats = stats._replace(target=stats.target.masked_fill(split.nowhere, math.nan))
    return stats


def _outputs(
    stats: RowStats, divisor: Scalar | None, mask: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [M], 0 where masked."""
    log_probs = stats.log_probs(divisor)
    entropy = stats.entropy() if with_entropy else None
    if mask is not None:
        log_probs.masked_fill_(~mask, 0.0)
        entropy = None if entropy is None else entropy.masked_fill_(~mask, 0.0)
    return log_probs, entropy


class _Slopes(NamedTuple):
    """The gradient by a logit: e (offset + slope t), plus `target` at the index; [M, 1] each."""

    maximum: Tensor
    offset: Tensor
    slope: Tensor | None
    target: Tensor | None
    """0 where the index is another process's"""
    unread: Tensor | None
    """Rows to be 0 whatever they hold"""


def _slopes(
    stats: RowStats,
    split: _Split,
    divisor: Scalar | None,
    mask: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
) -> _Slopes:
    """From upstream gradients [M] of log-probs and entropies, at least one of them given."""

    def column(upstream: Tensor) -> Tensor:
        if mask is not None:
            upstream = upstream.masked_fill(~mask, 0.0)
        upstream = upstream.unsqueeze(1)
        return upstream if divisor is None else upstream / divisor

    total = stats.total
    offset, active = torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)
    slope = target = None
    if g is not None:
        g = column(g).masked_fill(stats.target == -math.inf, 0.0)
        offset, active = -g / total, g != 0
        target = g.masked_fill(~split.here, 0.0)
    if h is not None:
        h = column(h)
        slope = -h / total
        offset, active = offset - slope * stats.mean, active | (h != 0)
    # A row without upstream gradient comes out 0 by itself, unless it is NaN.
    quiet = may_read(total.device) and not bool(total.isnan().any())
    return _Slopes(stats.maximum, offset, slope, target, None if quiet else ~active)


def _turn(
    logits: Tensor,
    out: Tensor,
    own: slice,
    slopes: _Slopes,
    split: _Split,
    divisor: Scalar | None,
) -> None:
    """Write the gradient by the local logits [R, V_r] of a range of rows to `out`, which they may be."""
    maximum, offset, slope, target, unread = (None if row is None else row[own] for row in slopes)
    assert maximum is not None
    assert offset is not None
    at, dtype = split.at[own], maximum.dtype
    for block_own, (block,), (t, e) in Blocks(2, dtype, logits):
        x = converted(block, dtype, t)
        t = shifted(x, maximum[block_own], divisor, t)
        if slope is None:
            d = t.exp_().mul_(offset[block_own])
        else:
            d = torch.exp(t.clamp_(min=LOWEST), out=e)
            d.mul_(t.mul_(slope[block_own]).add_(offset[block_own]))
        if target is not None:
            d.scatter_add_(1, at[block_own], target[block_own])
        if unread is not None:
            d.masked_fill_(unread[block_own], 0.0)
        out[block_own].copy_(d)


@overload
def parallel_log_probs_from_logits(
    local_logits: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    temperature: Scalar = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    shard: VocabShard | None = ...,
) -> Tensor: ...


@overload
def parallel_log_probs_from_logits(
    local_logits: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    temperature: Scalar = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
    shard: VocabShard | None = ...,
) -> tuple[Tensor, Tensor]: ...


def parallel_log_probs_from_logits(
    local_logits: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    temperature: Scalar = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_probs_from_logits` where each process has the logits of a part of the vocabulary.

    The definitions there hold, for -inf, +inf and NaN too. One all-gather of four numbers a row; the
    gradient of the local logits needs none. The upstream gradients are taken to be the same on every
    process of the group, as where each computes the same loss from the outputs.

    Args:
        local_logits: [..., V_r] floating, V_r >= 1: this process's logits, of consecutive tokens in the
            order of ranks. Sizes may differ. Differentiable.
        index: [...] int64 or int32, tokens of the whole vocabulary; the same on every process. Out of
            range raises on a CPU, and makes the row's log-probability NaN on a GPU.
        group: the processes that share the vocabulary; None is this one alone.
        temperature, mask, with_entropy: as in `log_probs_from_logits`.
        shard: from `vocab_shard`, called once. If None, sizes are exchanged on every call, and the
            host waits for that. Give it on every process or on none.

    Returns:
        log_probs [...], or (log_probs, entropy), the same on every process: float32, or float64 for
        float64 logits.

    Raises:
        IndexError: an unmasked index is outside the whole vocabulary (CPU).
        NotImplementedError: called under a `torch.func` transform, or differentiated twice.
        ValueError: shapes, dtypes or devices do not fit, or temperature is not positive.
    """
    op = "parallel_log_probs_from_logits"
    check_logits(op, local_logits)
    if index.shape != local_logits.shape[:-1]:
        raise ValueError(
            f"{op}: index is {list(index.shape)}, local_logits {list(local_logits.shape)}; "
            f"index must be {list(local_logits.shape[:-1])}, one entry a row"
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: index is {index.dtype}; expected int64 or int32")
    check_mask(op, mask, index.shape)
    for name, tensor in (("index", index), ("mask", mask)):
        if tensor is not None and tensor.device != local_logits.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, local_logits on {local_logits.device}"
            )
    divisor = check_temperature(op, temperature)
    flat_mask = None if mask is None else mask.reshape(-1)
    size = local_logits.shape[-1]
    split = _split(op, index.reshape(-1), flat_mask, size, group, shard)
    rows = local_logits.reshape(-1, size)
    log_probs, entropy = _FromLogits.apply(rows, split, divisor, flat_mask, with_entropy)
    log_probs = log_probs.view(index.shape)
    return (log_probs, entropy.view(index.shape)) if with_entropy else log_probs


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        split: _Split,
        divisor: Scalar | None,
        mask: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(logits)
        part = _partial(logits, slice(0, len(logits)), split, dtype, divisor, with_entropy)
        ctx.stats = _exchanged([part], split, divisor)
        ctx.split, ctx.divisor, ctx.mask = split, divisor, mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits)
        return _outputs(ctx.stats, divisor, mask, with_entropy)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("parallel_log_probs_from_logits")
        (logits,) = ctx.saved_tensors
        if g is None and h is None:
            return None, None, None, None, None
        slopes = _slopes(ctx.stats, ctx.split, ctx.divisor, ctx.mask, g, h)
        gradient = torch.empty_like(logits)
        _turn(logits, gradient, slice(0, len(logits)), slopes, ctx.split, ctx.divisor)
        return gradient, None, None, None, None


class _Parallel(NamedTuple):
    """Rows to be worked on, and the vocabulary they are worked on with."""

    job: Job
    split: _Split

    def swept(self, with_entropy: bool, keep: bool) -> tuple[RowStats, by_rows._Chunk | None]:
        """The stats of all rows; and their logits, if asked for and all in one chunk."""
        job, divisor = self.job, self.job.head.divisor
        parts, chunk = [], None
        for chunk in by_rows._chunks(job, keep):
            given = chunk.logits, chunk.own, self.split, job.dtype, divisor, with_entropy
            parts.append(_partial(*given))
        if not parts:
            parts = [RowStats._make(job.hidden.new_empty(4, 0, 1, dtype=job.dtype).unbind())]
        return _exchanged(parts, self.split, divisor), chunk if keep and len(parts) == 1 else None

    def propagate(
        self,
        stats: RowStats,
        g: Tensor | None,
        h: Tensor | None,
        sinks: Sinks,
        kept: by_rows._Chunk | None = None,
    ) -> None:
        """Add the gradients of upstream g, h [M] into the sinks, the hidden states' over all processes."""
        job, divisor = self.job, self.job.head.divisor
        if not job.number:
            return
        slopes = _slopes(stats, self.split, divisor, job.mask, g, h)
        for chunk in by_rows._chunks(job, True) if kept is None else (kept,):
            _turn(chunk.logits, chunk.logits, chunk.own, slopes, self.split, divisor)
            chunk.carry_on(chunk.logits, sinks)
        if sinks.hidden is not None and not self.split.alone:
            dist.all_reduce(sinks.hidden, group=self.split.group)


def _parallel(
    op: str,
    hidden: Tensor,
    index: Tensor,
    mask: Tensor | None,
    head: Head,
    workspace_mb: float,
    group: Group | None,
    shard: VocabShard | None,
) -> _Parallel:
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    mask = None if mask is None else mask.reshape(-1)
    split = _split(op, index.reshape(-1), mask, weight.shape[0], group, shard)
    job = Job(
        hidden.detach().reshape(-1, hidden.shape[-1]),
        split.at.squeeze(1),
        None,
        mask,
        head._replace(weight=weight, bias=bias),
        compute_dtype(hidden, weight),
        int(workspace_mb * MEGABYTE),
    )
    return _Parallel(job, split)


def _new_sinks(job: Job, wanted: Sequence[bool]) -> Sinks:
    like, dtype = job.head.weight, job.dtype
    of_weight = None
    if wanted[1]:
        new = torch.empty_like if job.number else torch.zeros_like
        of_weight = new(like, dtype=dtype)
    return Sinks(
        torch.empty(job.hidden.shape, dtype=dtype, device=like.device) if wanted[0] else None,
        of_weight,
        like.new_zeros(like.shape[0], dtype=dtype) if wanted[2] else None,
        fresh=True,
    )


@overload
def parallel_log_probs_from_hidden(
    hidden: Tensor,
    local_weight: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    bias: Tensor | None = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    workspace_mb: float = ...,
    shard: VocabShard | None = ...,
) -> Tensor: ...


@overload
def parallel_log_probs_from_hidden(
    hidden: Tensor,
    local_weight: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    bias: Tensor | None = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
    workspace_mb: float = ...,
    shard: VocabShard | None = ...,
) -> tuple[Tensor, Tensor]: ...


def parallel_log_probs_from_hidden(
    hidden: Tensor,
    local_weight: Tensor,
    index: Tensor,
    group: Group | None,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    workspace_mb: float = WORKSPACE_MB,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_probs_from_hidden` where each process has some rows of the head's weight.

    One all-gather of four numbers a row in the forward, and one all-reduce of [M, D] in the backward,
    if `hidden` requires a gradient. What the upstream gradients are taken to be:
    `parallel_log_probs_from_logits`.

    Args:
        hidden: [..., D] floating, the same on every process. Differentiable: its gradient is summed
            over the processes here, and must not be once more outside.
        local_weight: [V_r, D], V_r >= 1: consecutive rows in the order of ranks. Sizes may differ.
            Differentiable, with a gradient of its own part.
        index: [...] int64 or int32, tokens of the whole vocabulary; the same on every process. Out of
            range raises on a CPU, and makes the row's log-probability NaN on a GPU.
        group: the processes that share the vocabulary; None is this one alone.
        bias: [V_r]; differentiable.
        temperature, softcap, logit_scale, mask, with_entropy: as in `log_probs_from_hidden`. Masked
            rows are multiplied out.
        workspace_mb: at most so many MiB of local logits at a time (one row at least).
        shard: as in `parallel_log_probs_from_logits`.

    Returns:
        log_probs [...], or (log_probs, entropy), the same on every process: float32, or float64 if an
        input is.

    Raises:
        IndexError: an unmasked index is outside the whole vocabulary (CPU).
        NotImplementedError: called under a `torch.func` transform, or differentiated twice.
        ValueError: shapes, dtypes or devices do not fit, or a number is out of range.
    """
    op = "parallel_log_probs_from_hidden"
    numbers = temperature, softcap, logit_scale, mask, workspace_mb
    check_head(op, hidden, local_weight, index, bias, *numbers)
    head = Head(local_weight, bias, temperature, softcap, logit_scale)
    work = _parallel(op, hidden, index, mask, head, workspace_mb, group, shard)
    log_probs, entropy = _FromHidden.apply(hidden, local_weight, bias, work, with_entropy)
    log_probs = log_probs.view(index.shape)
    return (log_probs, entropy.view(index.shape)) if with_entropy else log_probs


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: _Parallel,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            ctx.stats, _ = work.swept(with_entropy, keep=False)
        ctx.set_materialize_grads(False)
        ctx.work = work
        # Kept as the inputs they are, so that an edit in place before the backward is noticed.
        ctx.save_for_backward(hidden, weight, bias)
        return _outputs(ctx.stats, work.job.head.divisor, work.job.mask, with_entropy)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("parallel_log_probs_from_hidden")
        inputs = ctx.saved_tensors
        if g is None and h is None:
            return None, None, None, None, None
        sinks = _new_sinks(ctx.work.job, ctx.needs_input_grad[:3])
        with torch.autocast(inputs[0].device.type, enabled=False):
            ctx.work.propagate(ctx.stats, g, h, sinks)
        gradients = [
            None if sink is None else sink.view(x.shape).to(x.dtype)
            for sink, x in zip(sinks[:3], inputs, strict=True)
        ]
        return *gradients, None, None


def parallel_ppo_loss_from_hidden(
    hidden: Tensor,
    local_weight: Tensor,
    index: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    group: Group | None,
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
    shard: VocabShard | None = None,
) -> PPOLoss:
    """`ppo_loss_from_hidden` where each process has some rows of the head's weight.

    Loss, metrics and gradients are computed together: an all-gather of four numbers a row, and an
    all-reduce of [M, D] if `hidden` requires a gradient, both in this call; the backward exchanges
    nothing. Three matrix products where `workspace_mb` holds all local logits, else four: their
    gradient needs what only the all-gather tells.

    Args:
        hidden, local_weight, index, group, bias, workspace_mb, shard: as in
            `parallel_log_probs_from_hidden`. A weight without requires_grad costs no product.
        old_log_probs, advantages: [...]; these and all others are the same on every process.
        temperature, softcap, logit_scale: as in `log_probs_from_hidden`.
        clip_coef: as in `ppo_loss`, with all further arguments.
        weight_grad: [V_r, D]; as in `ppo_loss_from_hidden`.

    Returns:
        PPOLoss, the same on every process: `loss`, differentiable by `hidden`, `local_weight`, `bias`
        and `values`; `stats`. float32, or float64 if an input is.

    Raises:
        As `ppo_loss_from_hidden`.
    """
    op = "parallel_ppo_loss_from_hidden"
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
    check_terms(op, t, entropy_given=True)
    numbers = temperature, softcap, logit_scale, mask, workspace_mb
    check_head(op, hidden, local_weight, index, bias, *numbers)
    check_rows(op, t, index.shape)
    if weight_grad is not None:
        check_buffer(op, "weight_grad", weight_grad, local_weight)
        if not torch.is_grad_enabled():
            raise ValueError(
                f"{op}: weight_grad is given where gradients are off; leave it out for the loss alone"
            )
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, local_weight, bias)
    ]
    wanted[1] = wanted[1] and weight_grad is None
    head = Head(local_weight, bias, temperature, softcap, logit_scale)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        work = _parallel(op, hidden, index, mask, head, workspace_mb, group, shard)
        result, sinks, grad_values = _loss(op, work, index.shape, t, wanted, weight_grad)
    gradients = [
        (hidden, sinks.hidden),
        (local_weight, sinks.weight if weight_grad is None else None),
        (bias, sinks.bias),
        (values, grad_values),
    ]
    return PPOLoss(_attached(result.loss, gradients, weight_grad is not None), result.stats)


def _loss(
    op: str,
    work: _Parallel,
    shape: torch.Size,
    t: Terms,
    wanted: Sequence[bool],
    weight_grad: Tensor | None,
) -> tuple[PPOLoss, Sinks, Tensor | None]:
    """The loss, the gradients that are asked for, and that of the values [M]."""
    job = work.job
    rows, count, inv_n = to_rows(op, t, shape, job.dtype)
    sinks = _new_sinks(job, wanted)._replace(scale=inv_n)
    if weight_grad is not None:
        sinks = sinks._replace(weight=weight_grad, fresh=False)
    differentiated = any(sink is not None for sink in sinks[:3])
    stats, kept = work.swept(True, differentiated)
    part = nothing(rows)
    if job.number:
        log_probs, entropy = _outputs(stats, job.head.divisor, job.mask, True)
        assert entropy is not None
        part = surrogate(log_probs.clamp(min=ILLEGAL), entropy, rows, t)
        if differentiated:
            h = None
            if is_on(t.ent_coef):
                h = torch.zeros_like(entropy).sub_(row_ent_coef(rows, t))
            work.propagate(stats, part.grad_log_probs, h, sinks, kept)
    grad_values = None if part.grad_values is None else part.grad_values.mul_(inv_n)
    return assemble(part, count, inv_n, t, ()), sinks, grad_values


def local_head(weight: Tensor) -> tuple[Tensor, VocabShard, Group | None]:
    """This process's rows of a head's weight that is a DTensor over a 1-D mesh.

    For the `parallel_` ops, every process of the mesh having the same rows of the batch. Under FSDP
    each has its own: there `full_head` is what is wanted.

    Args:
        weight: [V, D] `torch.distributed.tensor.DTensor`, `Shard(0)` or `Replicate()`.

    Returns:
        The local rows, whose gradient flows back into `weight` as a DTensor placed as it is; where in
        the vocabulary they lie; and the group to give to the ops, None where this process has all.

    Raises:
        TypeError: `weight` is not a DTensor.
        ValueError: its mesh or placement is another, or a process would have no row.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    op = "local_head"
    if not isinstance(weight, DTensor):
        raise TypeError(
            f"{op}: weight is a {type(weight).__name__}; expected a DTensor (a plain weight goes in "
            "as it is, with the process group that it is sharded over)"
        )
    _check_mesh(op, weight)
    (placement,) = weight.placements
    total, size = weight.shape[0], weight.device_mesh.size()
    if isinstance(placement, Replicate):
        return weight.to_local(), VocabShard(0, total), None
    if type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"{op}: weight is placed as {placement}; expected Shard(0), rows of the vocabulary, or "
            "Replicate(); weight.redistribute(placements=[Shard(0)]) makes it so"
        )
    # As DTensor cuts: equal parts, rounded up, until nothing is left.
    step = math.ceil(total / size)
    if step * (size - 1) >= total:
        raise ValueError(
            f"{op}: {total} rows over {size} processes leave some without any; use fewer processes"
        )
    group = weight.device_mesh.get_group()
    local = weight.to_local(grad_placements=[placement])
    return local, VocabShard(step * group.rank(), total), group


def full_head(weight: Tensor, *, reduce: Literal["sum", "avg"] = "sum") -> Tensor:
    """The whole weight [V, D] of a head that FSDP2 shards, for `ppo_loss_from_hidden` and the like.

    One all-gather here, and a reduce-scatter in the backward, which every process has to reach: the
    gradient comes back to each process's part of `weight`, from the rows of the batch of all of them.

    Args:
        weight: DTensor over a 1-D mesh. A plain tensor is returned as it is: inside the forward of a
            module that holds it, FSDP2 has gathered it already and reduces its gradient itself.
        reduce: how the gradients of processes are put together: "sum" where losses divide by counts
            over all processes (`ppo_fast.distributed`); "avg" is what FSDP2 does with all other
            parameters, unless told otherwise by `set_gradient_divide_factor(1.0)`.

    Raises:
        ValueError: the mesh has more dimensions, or `reduce` is another word.
    """
    from torch.distributed.tensor import DTensor, Partial

    op = "full_head"
    if reduce not in ("sum", "avg"):
        raise ValueError(f"{op}: reduce is {reduce!r}; expected 'sum' or 'avg'")
    if not isinstance(weight, DTensor):
        return weight
    _check_mesh(op, weight)
    return weight.full_tensor(grad_placements=[Partial(reduce)])


def _check_mesh(op: str, weight: Any) -> None:
    if weight.device_mesh.ndim != 1:
        raise ValueError(
            f"{op}: weight is on a mesh of {weight.device_mesh.ndim} dimensions, "
            f"{weight.device_mesh.mesh_dim_names}; expected one"
        )
