"""Log-probability and entropy of a categorical policy from its logits, gradient written by hand.

What costs is not arithmetic but fresh vocabulary-sized memory: autograd's `log_softmax`, `exp` and
product each allocate one, and faulting its pages in takes longer than computing what goes there.
So the rows are walked in blocks whose scratch stays in cache, three numbers a row are kept for the
backward, and the gradient is the only vocabulary-sized tensor ever allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated

# Elements of a block for each thread: 512 KiB of fp32, so that the logits passing through and two
# scratch buffers fit a server core's 2 MiB L2 cache.
CPU_BLOCK_ELEMENTS = 1 << 17
# On a GPU a block has only to be large beside a launch: 64 MiB of fp32.
GPU_BLOCK_ELEMENTS = 1 << 24
# Few logits in all, or a short last dimension, are evaluated whole: calls cost more than memory.
WHOLE_ELEMENTS = 1 << 15
SHORT_ROW = 64
# Reductions over a short last dimension cost 25 to 50 ns a row, over the first nearly nothing.
FEATURE_MAJOR_ROWS = 128
# exp(LOWEST) is 0 in every dtype and 0 * LOWEST is 0, where 0 * -inf would be NaN.
LOWEST = -1e4


@overload
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@accelerated
def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
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
            asking would stall the stream, it fails PyTorch's device-side assertion.
        temperature: T > 0, a number or a 0-d tensor (not differentiated; its sign is not checked).
        mask: [...] bool. Where False the outputs and the gradient are 0, and what logits and index
            hold does not matter.
        with_entropy: also return the entropy, in nats.

    Returns:
        log_probs [...], or (log_probs, entropy): float32, or float64 for float64 logits. Never > 0
        and never < 0 respectively.

    Raises:
        IndexError: an unmasked index is outside [0, V) (CPU).
        NotImplementedError: called under a `torch.func` transform.
        ValueError: shapes or dtypes do not fit, V is 0, or temperature is not a positive number.
    """
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
    divisor = check_temperature(name, temperature)
    index = index.long()
    if mask is not None:
        index = index.masked_fill(~mask, 0)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.requires_grad and torch.is_grad_enabled():
        log_probs, entropy = _LogProbs.apply(logits, index, divisor, mask, with_entropy)
    else:
        log_probs, entropy, _ = _forward(logits, index, divisor, mask, with_entropy)
    return (log_probs, entropy) if with_entropy else log_probs


def check_logits(name: str, logits: Tensor) -> None:
    """Raise unless `logits` is a floating-point [..., V] tensor outside `torch.func` transforms."""
    if not logits.is_floating_point():
        raise ValueError(f"{name}: logits are {logits.dtype}; expected a floating-point dtype")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name}: logits are {list(logits.shape)}; expected [..., V] with V at least 1"
        )
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name}: torch.func transforms (vmap, grad, jvp) are not supported; the op takes any "
            "number of leading dimensions, so call it on the whole batch"
        )


def check_mask(name: str, mask: Tensor | None, shape: torch.Size) -> None:
    """Raise unless `mask` is None or a bool tensor with one entry a row."""
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != shape):
        raise ValueError(
            f"{name}: mask is {list(mask.shape)} {mask.dtype}; "
            f"expected {list(shape)} torch.bool, one entry a row of logits"
        )


def check_temperature(name: str, temperature: float | Tensor) -> float | Tensor | None:
    """Return the divisor of the logits, None for exactly 1; raise unless positive and finite."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or (temperature.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{name}: temperature is a tensor of shape {list(temperature.shape)} with "
                f"requires_grad={temperature.requires_grad}; expected a number or a 0-d tensor "
                "without gradient (temperature.detach())"
            )
        return temperature
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"{name}: temperature is {temperature}; expected a positive finite number "
            "(for greedy actions take logits.argmax(-1))"
        )
    return None if temperature == 1.0 else temperature


def refuse_double_backward(name: str) -> None:
    """Raise in a backward that is itself recorded (`create_graph=True`)."""
    # once_differentiable would not do: with a constant upstream gradient it drops the term silently.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name}: its gradient is not differentiable, but create_graph=True asks for that; "
            "use torch.log_softmax where second derivatives are needed"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of the results: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def may_ask(tensor: Tensor) -> bool:
    """Whether Python may look at values: not while tracing, nor where that would stall a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def rows_per_block(logits: Tensor) -> int:
    """How many rows to work on at once; at least 1."""
    if torch.compiler.is_compiling():
        return max(1, logits.numel() // logits.shape[-1])  # one block: the compiler tiles
    elements = GPU_BLOCK_ELEMENTS
    if logits.device.type == "cpu":
        elements = CPU_BLOCK_ELEMENTS * torch.get_num_threads()
    return max(1, elements // logits.shape[-1])


class Blocks:
    """Walk equally shaped [..., V] tensors in [R, V] blocks, in row-major order.

    Yields the block's range among the M rows, a block of each tensor, and `buffers` scratch buffers
    of that size, the same memory for every block. A single block gets Nones for scratch.

    Blocks are views, except that leading dimensions too short to fill a block and too oddly strided
    to merge are copied, block by block.
    """

    def __init__(self, buffers: int, dtype: torch.dtype, *tensors: Tensor) -> None:
        self.rows = rows_per_block(tensors[0])
        self.single = tensors[0].numel() <= self.rows * tensors[0].shape[-1]
        self._tensors = tensors
        self._scratch: tuple[Tensor | None, ...] = (None,) * buffers
        if not self.single:
            shape = (buffers, self.rows, tensors[0].shape[-1])
            self._scratch = torch.empty(shape, dtype=dtype, device=tensors[0].device).unbind()

    def __iter__(self) -> Iterator[tuple[slice, tuple[Tensor, ...], tuple[Tensor | None, ...]]]:
        start = 0
        for parts in _split(self.rows, self._tensors):
            count = parts[0].shape[0]
            scratch = self._scratch
            if count < self.rows:
                scratch = tuple(None if s is None else s[:count] for s in scratch)
            yield slice(start, start + count), parts, scratch
            start += count


def _split(rows: int, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    shape = tensors[0].shape
    inner = math.prod(shape[1:-1])
    if len(shape) <= 2 or all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1, shape[-1]).split(rows) for t in tensors), strict=True)
    elif inner >= rows:
        for parts in zip(*(t.unbind() for t in tensors), strict=True):
            yield from _split(rows, parts)
    else:
        for parts in zip(*(t.split(rows // inner) for t in tensors), strict=True):
            yield tuple(t.reshape(-1, shape[-1]) for t in parts)


def converted(block: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`block` in `dtype`: itself, or a copy in `out`, or a new copy."""
    if block.dtype is dtype:
        return block
    return block.to(dtype) if out is None else out.copy_(block)


def shifted(
    block: Tensor, maximum: Tensor, divisor: float | Tensor | None, out: Tensor | None
) -> Tensor:
    """(x - m) / T, in `out`; the other order, x / T - m / T, would round at the size of x."""
    t = torch.sub(block, maximum, out=out)
    return t if divisor is None else t.div_(divisor)


def row_maximum(block: Tensor) -> Tensor:
    """Largest entry of each row, [R, 1]; finite for a row all -inf, so that x - m is -inf there."""
    return block.amax(-1, keepdim=True).clamp_(min=torch.finfo(block.dtype).min)


class Stats(NamedTuple):
    """What a row's softmax comes down to; [R, 1] each. t = (x - m) / T and e = exp(t)."""

    maximum: Tensor
    """m"""
    total: Tensor
    """l = sum of e: 0 for a row all -inf, else at least 1, NaN if the row holds NaN or +inf."""
    weighted: Tensor
    """Sum of e t, never positive; meaningless unless the entropy was asked for."""


def softmax_stats(
    block: Tensor,
    dtype: torch.dtype,
    divisor: float | Tensor | None,
    with_entropy: bool,
    t: Tensor | None,
    e: Tensor | None = None,
) -> tuple[Stats, Tensor]:
    """Reduce a [R, V] block to its `Stats`; also return e, [R, V].

    `t` and `e` are scratch or None; without entropy, e takes the place of t.
    """
    block = converted(block, dtype, t)
    maximum = row_maximum(block)
    t = shifted(block, maximum, divisor, t)
    if not with_entropy:
        e = t.exp_()
        total = e.sum(-1, keepdim=True)
        return Stats(maximum, total, total), e
    e = torch.exp(t.clamp_(min=LOWEST), out=e)
    weighted_t = t.mul_(e)
    return Stats(maximum, e.sum(-1, keepdim=True), weighted_t.sum(-1, keepdim=True)), e


def concatenated(parts: list[Stats]) -> Stats:
    """Join the stats of the blocks into those of all rows."""
    return parts[0] if len(parts) == 1 else Stats(*map(torch.cat, zip(*parts, strict=True)))


def gathered(name: str, logits: Tensor, index: Tensor, dim: int) -> Tensor:
    """`logits.gather(dim, index)`, an index out of range named as such on the CPU."""
    if torch.compiler.is_compiling():
        return logits.gather(dim, index)
    try:
        return logits.gather(dim, index)
    except RuntimeError:
        # gather looked at every index already: asking again costs only where it complained.
        low, high = int(index.min()), int(index.max())
        if low >= 0 and high < logits.shape[dim]:
            raise
        raise IndexError(
            f"{name}: index runs from {low} to {high}, but there are {logits.shape[dim]} logits a "
            f"row; expected 0 to {logits.shape[dim] - 1} (mask the rows that have no index)"
        ) from None


class _Rows(NamedTuple):
    """Kept for the backward of `_blocked`; [M, 1] each."""

    maximum: Tensor
    total: Tensor
    mean: Tensor
    """Sum of p t: log p_j + H = t_j - mean."""
    target: Tensor
    """t at the index; -inf where the logit is."""


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
    target = shifted(target, maximum, divisor, None)
    log_total = log_total.view(index.shape)
    log_probs = target.view(index.shape) - log_total
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

    in_place = logits.dtype is total.dtype
    # Without entropy t is used up by exp, in the same buffer.
    blocks = Blocks((slope is not None) + (not in_place), total.dtype, logits)
    if blocks.single:
        ((own, (block,), _),) = blocks
        return fill(block, own, None, None).to(logits.dtype).view(logits.shape)

    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    gradient_rows = gradient.view(-1, logits.shape[-1])
    for own, (block,), scratch in blocks:
        out = gradient_rows[own]
        if asking and not active[own].any():
            out.zero_()
        elif in_place:
            fill(block, own, (*scratch, out)[0], out)
        else:
            out.copy_(fill(block, own, scratch[0], scratch[-1]))
    return gradient


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        index: Tensor,
        divisor: float | Tensor | None,
        mask: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropy, saved = _forward(logits, index, divisor, mask, with_entropy)
        ctx.set_materialize_grads(False)
        ctx.kind = type(saved)
        ctx.divisor = None if isinstance(divisor, Tensor) else divisor
        tensor = divisor if isinstance(divisor, Tensor) else None
        ctx.save_for_backward(logits, index, mask, tensor, *saved)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        refuse_double_backward("log_probs_from_logits")
        if g is None and h is None:
            return None, None, None, None, None
        logits, index, mask, tensor, *saved = ctx.saved_tensors
        hidden = None if mask is None else ~mask
        g, h = _upstream(g, hidden), _upstream(h, hidden)
        if ctx.kind is _Whole:
            gradient = _whole_gradient(logits, index, _Whole(*saved), g, h)
        else:
            divisor = ctx.divisor if tensor is None else tensor
            gradient = _blocked_gradient(logits, index, divisor, _Rows(*saved), g, h)
        return gradient, None, None, None, None


def _upstream(grad: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """An upstream gradient as [M], 0 where hidden."""
    if grad is None:
        return None
    return (grad if hidden is None else grad.masked_fill(hidden, 0.0)).reshape(-1)
