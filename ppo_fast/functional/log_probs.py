"""Log-probability and entropy of a categorical policy from its logits, gradient written by hand.

What costs is not arithmetic but fresh vocabulary-sized memory: autograd's `log_softmax`, `exp` and
product each allocate one, and faulting its pages in takes longer than computing what goes there.
So the rows are walked in blocks whose scratch stays in cache, three numbers a row are kept for the
backward, and the gradient is the only vocabulary-sized tensor ever allocated.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
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
    gathered,
    may_ask,
    refuse_double_backward,
    shifted,
    softmax_stats,
)

# Few logits in all, or a short last dimension, are evaluated whole: calls cost more than memory.
WHOLE_ELEMENTS = 1 << 15
SHORT_ROW = 64
# Reductions over a short last dimension cost 25 to 50 ns a row, over the first nearly nothing.
FEATURE_MAJOR_ROWS = 128


def _validate(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> None:
    name = "log_probs_from_logits"
    check_logits(name, logits)
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: index is {list(index.shape)}, logits {list(logits.shape)}; "
            f"index must be {list(logits.shape[:-1])}, one entry a row of logits"
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: index is {index.dtype}; expected int64 or int32")
    check_mask(name, mask, index.shape)
    for what, tensor in (("index", index), ("mask", mask)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name}: {what} is on {tensor.device}, logits on {logits.device}")
    check_temperature(name, temperature)
    if inplace_backward:
        check_overwritable(name, logits)


@overload
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...


@overload
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@accelerated(validate=_validate)
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one index per row under softmax(logits / temperature), and the entropy.

        log p(y) = (x_y - m) / T - log l,   m = max_j x_j,   l = Σ_j exp((x_j - m) / T)
        H        = log l - Σ_j p_j (x_j - m) / T

    Both terms of H are non-negative: nothing cancels, however far the logits are from 0. Gradients,
    for upstream gradients g of the log-probability and h of the entropy:

        ∂/∂x_j = (g (1[j = y] - p_j) - h p_j (log p_j + H)) / T

    A logit of -inf has probability 0, gradient 0 and entropy term 0. An index of probability 0
    because its logit is -inf has log-probability -inf and passes no gradient to its row. A row all
    -inf has log-probability -inf, entropy 0, gradient 0. A NaN or +inf logit makes its own row NaN.
    A row whose upstream gradients are 0 gets gradient 0, whatever its logits.

    The gradient is the only vocabulary-sized allocation. It is not itself differentiable, and
    `torch.func` transforms are refused.

    Args:
        logits: [..., V] floating point. Leading strides are free; if the last dimension is not
            contiguous the logits are copied once.
        index: [...] int64 or int32 in [0, V). Out of range raises on the CPU; on a GPU, where
            asking would stall the stream, the kernel makes its row's log-probability NaN, and
            `ppo_fast.device_errors.raise_device_errors` tells.
        temperature: T > 0, a number or a 0-d tensor (not differentiated; its sign is not checked).
        mask: [...] bool. Where False the outputs and the gradient are 0, and what logits and index
            hold does not matter.
        with_entropy: also return the entropy, in nats.
        inplace_backward: write the gradient over the logits, which saves memory of their size. Only
            for logits that the caller and the rest of the graph no longer need: whatever else kept
            them for its backward fails there, as after any edit in place.

    Returns:
        log_probs [...], or (log_probs, entropy): float32, or float64 for float64 logits. Never > 0
        and never < 0 respectively.

    Raises:
        IndexError: an unmasked index is outside [0, V) (CPU).
        NotImplementedError: called under a `torch.func` transform.
        RuntimeError: in the backward, with `inplace_backward`: the logits were edited since.
        ValueError: shapes, dtypes or devices do not fit, V is 0, or temperature is not a positive
            number; or, with `inplace_backward`, the logits are a leaf that requires grad or a view
            of one, are not rows [M, V] in memory without a copy, or are being compiled.
    """
    _validate(
        logits,
        index,
        temperature=temperature,
        mask=mask,
        inplace_backward=inplace_backward,
    )
    divisor = check_temperature("log_probs_from_logits", temperature)
    index = index.long()
    if mask is not None:
        index = index.masked_fill(~mask, 0)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.requires_grad and torch.is_grad_enabled():
        log_probs, entropy = _LogProbs.apply(
            logits, index, divisor, mask, with_entropy, inplace_backward
        )
    else:
        log_probs, entropy, _ = _forward(logits, index, divisor, mask, with_entropy)
    return (log_probs, entropy) if with_entropy else log_probs


class _Rows(NamedTuple):
    """Kept for the backward of `_blocked`; [M, 1] each."""

    maximum: Tensor
    total: Tensor
    mean: Tensor
    """Sum of p t: log p_j + H = t_j - mean."""
    target: Tensor
    """The logit at the index."""


class _Whole(NamedTuple):
    """Kept for the backward of `_whole`, in its layout: [V, M] or [M, V]."""

    log_p: Tensor | None
    """None with entropy; the three below are None without."""
    p: Tensor | None
    p_log_p: Tensor | None
    neg_entropy: Tensor | None
    """[M]"""


_Saved = _Rows | _Whole


def _forward(
    logits: Tensor,
    index: Tensor,
    divisor: float | Tensor | None,
    mask: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, _Saved]:
    """Return log_probs, entropy (a stand-in unless asked for) and what the backward needs."""
    small = logits.shape[-1] < SHORT_ROW or logits.numel() <= WHOLE_ELEMENTS
    result: tuple[Tensor, Tensor, _Saved] | None = None
    if small and divisor is None and may_ask(logits):
        result = _whole(logits, index, with_entropy)
    if result is None:
        result = _blocked(logits, index, divisor, mask, with_entropy)
    if mask is not None:
        hidden = ~mask
        result[0].masked_fill_(hidden, 0.0)
        if with_entropy:
            result[1].masked_fill_(hidden, 0.0)
    return result


def _feature_major(logits: Tensor) -> bool:
    """Whether `_whole` lays logits out as [V, M]."""
    width = logits.shape[-1]
    return width < SHORT_ROW and logits.numel() >= FEATURE_MAJOR_ROWS * width


def _whole(
    logits: Tensor, index: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, _Whole] | None:
    """Few or short rows, by few calls. None unless every log-probability is finite."""
    dtype = compute_dtype(logits)
    rows = logits if logits.dtype is dtype else logits.to(dtype)
    if rows.dim() != 2:
        rows = rows.reshape(-1, rows.shape[-1])
    dim = 1
    if _feature_major(logits):
        rows, dim = rows.t().contiguous(), 0
    log_p = torch.log_softmax(rows, dim)
    chosen = gathered("log_probs_from_logits", log_p, index.reshape(-1).unsqueeze(dim), dim)
    # A row with NaN, +inf or nothing but -inf is NaN here; those are left to `_blocked`.
    if not math.isfinite(chosen.sum()):
        return None
    # Not a view, which the caller could not edit in place.
    log_probs = chosen.squeeze_(dim) if index.dim() == 1 else chosen.view(index.shape).clone()
    if not with_entropy:
        return log_probs, log_probs, _Whole(log_p, None, None, None)
    p = log_p.exp()
    p_log_p = log_p.clamp_(min=LOWEST).mul_(p)
    neg_entropy = p_log_p.sum(dim)
    return log_probs, neg_entropy.view(index.shape).neg(), _Whole(None, p, p_log_p, neg_entropy)


def _whole_gradient(
    logits: Tensor, index: Tensor, saved: _Whole, g: Tensor | None, h: Tensor | None
) -> Tensor:
    """Gradient g (1[j = y] - p) - h p (log p + H), by few calls; g and h are [M]."""
    dim = 0 if _feature_major(logits) else 1
    if h is None:
        assert g is not None
        if saved.p is None:
            assert saved.log_p is not None
            gradient = saved.log_p.exp().mul_(-g.unsqueeze(dim))
        else:
            gradient = saved.p * -g.unsqueeze(dim)
    else:
        assert saved.p is not None and saved.p_log_p is not None and saved.neg_entropy is not None
        pull = h * saved.neg_entropy
        pull = pull if g is None else pull.sub_(g)
        gradient = (saved.p_log_p * -h.unsqueeze(dim)).addcmul_(saved.p, pull.unsqueeze(dim))
    if g is not None:
        gradient.scatter_add_(dim, index.reshape(-1).unsqueeze(dim), g.unsqueeze(dim))
    if dim == 0:
        gradient = gradient.t()
    if gradient.dtype is not logits.dtype:
        gradient = gradient.to(logits.dtype)
    return gradient if logits.dim() == 2 else gradient.reshape(logits.shape)


def _blocked(
    logits: Tensor,
    index: Tensor,
    divisor: float | Tensor | None,
    mask: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, _Rows]:
    """Any rows, in blocks that stay in cache."""
    dtype = compute_dtype(logits)
    target = gathered("log_probs_from_logits", logits, index.unsqueeze(-1), -1)
    target = target.reshape(-1, 1).to(dtype)
    blocks = Blocks(2 if with_entropy else 1, dtype, logits)
    keep = None
    if mask is not None and not blocks.single and may_ask(logits):
        keep = mask.reshape(-1)
    parts = []
    for own, (block,), scratch in blocks:
        if keep is not None and not keep[own].any():
            zeros = target.new_zeros(block.shape[0], 1)
            parts.append(Stats(zeros, zeros, zeros))
        else:
            parts.append(softmax_stats(block, dtype, divisor, with_entropy, *scratch)[0])
    maximum, total, weighted = concatenated(parts)

    # Only a row all -inf is below 1; with l = 1 it needs no case of its own from here on.
    total = total.clamp(min=1.0)
    log_total = total.log()
    t = shifted(target, maximum, divisor, None)
    log_total = log_total.view(index.shape)
    log_probs = t.view(index.shape) - log_total
    if not with_entropy:
        return log_probs, log_probs, _Rows(maximum, total, weighted, target)
    mean = weighted / total
    entropy = log_total - mean.view(index.shape)
    return log_probs, entropy, _Rows(maximum, total, mean, target)


def _blocked_gradient(
    logits: Tensor,
    index: Tensor,
    divisor: float | Tensor | None,
    saved: _Rows,
    g: Tensor | None,
    h: Tensor | None,
    inplace: bool,
) -> Tensor:
    """Gradient e (offset + slope t), plus g at the index, written once; g and h are [M]."""
    maximum, total, mean, target = saved
    index = index.reshape(-1, 1)
    slope = None
    if g is not None:
        g = g.unsqueeze(1).masked_fill(target == -math.inf, 0.0)
        g = g if divisor is None else g / divisor
        offset, active = -g / total, g != 0
    if h is not None:
        h = h.unsqueeze(1)
        h = h if divisor is None else h / divisor
        slope = -h / total
        offset = h * mean / total if g is None else (h * mean - g) / total
        active = h != 0 if g is None else active | (h != 0)
    asking = may_ask(logits)
    # A row without upstream gradient comes out 0 by itself, unless it is NaN.
    overwrite = not asking or bool(total.isnan().any())

    def fill(block: Tensor, own: slice, t: Tensor | None, e: Tensor | None) -> Tensor:
        t = shifted(converted(block, total.dtype, t), maximum[own], divisor, t)
        if slope is None:
            e = torch.exp(t, out=e).mul_(offset[own])
        else:
            e = torch.exp(t.clamp_(min=LOWEST), out=e)
            e.mul_(t.mul_(slope[own]).add_(offset[own]))
        if g is not None:
            e.scatter_add_(1, index[own], g[own])
        return e.masked_fill_(~active[own], 0.0) if overwrite else e

    direct = logits.dtype is total.dtype
    # Without entropy t is used up by exp, in the same buffer.
    blocks = Blocks((slope is not None) + (not direct), total.dtype, logits)
    if blocks.single and not inplace:
        ((own, (block,), _),) = blocks
        return fill(block, own, None, None).to(logits.dtype).view(logits.shape)

    if inplace:
        gradient = logits.detach()
    else:
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    gradient_rows = gradient.view(-1, logits.shape[-1])
    for own, (block,), scratch in blocks:
        out = gradient_rows[own]
        if asking and not active[own].any():
            out.zero_()
        elif direct:
            fill(block, own, (*scratch, out)[0], out)
        else:
            out.copy_(fill(block, own, scratch[0], scratch[-1]))
    return gradient


def check_overwritable(name: str, logits: Tensor) -> None:
    """Raise unless a backward may write the gradient over the logits."""
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{name}: inplace_backward under torch.compile, which plans memory itself; leave it out"
        )
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{name}: inplace_backward, but logits are a leaf that requires grad or a view of one; "
            "its gradient would replace its values"
        )
    try:
        rows = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        rows = None
    width = logits.shape[-1]
    apart = rows is not None and (rows.shape[0] <= 1 or rows.stride(0) >= width)
    if rows is None or not apart or (width > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name}: inplace_backward, but logits {list(logits.shape)} with strides "
            f"{list(logits.stride())} are not rows that lie in memory on their own; "
            "leave it out or pass contiguous logits"
        )


def unchanged(name: str, ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors of a backward that writes over the first of them."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: inplace_backward, but the logits were edited since the forward, by another "
            "operation or by an earlier backward; their gradient is lost"
        ) from error


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        index: Tensor,
        divisor: float | Tensor | None,
        mask: Tensor | None,
        with_entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropy, saved = _forward(logits, index, divisor, mask, with_entropy)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.inplace = type(saved), inplace
        ctx.divisor = None if isinstance(divisor, Tensor) else divisor
        tensor = divisor if isinstance(divisor, Tensor) else None
        ctx.save_for_backward(logits, index, mask, tensor, *saved)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        refuse_double_backward("log_probs_from_logits")
        if g is None and h is None:
            return None, None, None, None, None, None
        kept = unchanged("log_probs_from_logits", ctx) if ctx.inplace else ctx.saved_tensors
        logits, index, mask, tensor, *saved = kept
        hidden = None if mask is None else ~mask
        g, h = _upstream(g, hidden), _upstream(h, hidden)
        if ctx.kind is _Whole:
            gradient = _whole_gradient(logits, index, _Whole(*saved), g, h)
            if ctx.inplace:
                gradient = logits.detach().copy_(gradient)
        else:
            divisor = ctx.divisor if tensor is None else tensor
            gradient = _blocked_gradient(logits, index, divisor, _Rows(*saved), g, h, ctx.inplace)
        return gradient, None, None, None, None, None


def _upstream(grad: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """An upstream gradient as [M], 0 where hidden."""
    if grad is None:
        return None
    return (grad if hidden is None else grad.masked_fill(hidden, 0.0)).reshape(-1)
