"""Walking the rows of vocabulary-sized tensors in blocks that stay in cache, and their softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.capture import may_read

# Elements of a block for each thread: 512 KiB of fp32, so that the logits passing through and two
# scratch buffers fit a server core's 2 MiB L2 cache.
CPU_BLOCK_ELEMENTS = 1 << 17
# On a GPU a block has only to be large beside a launch: 64 MiB of fp32.
GPU_BLOCK_ELEMENTS = 1 << 24
# exp(LOWEST) is 0 in every dtype and 0 * LOWEST is 0, where 0 * -inf would be NaN.
LOWEST = -1e4


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
    return may_read(tensor.device) and not torch.compiler.is_compiling()


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
