"""Log-probability and entropy from logits in one reading, their gradient in one more and a writing.

Long rows are read by a program each, or in parts by several where rows are too few to fill a GPU; a
second launch then merges the parts. Short rows are tiled several to a program. Four numbers a row
are kept for the backward: m, l and s of `_softmax.py` and the logit at the index.

A masked row is not read, nor is, in the backward, one without upstream gradient: most rows of a PPO
minibatch that clips or pads much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.device_errors import mark_of
from ppo_fast.kernels._launch import (
    LN2,
    LOG2E,
    check_grad_once,
    launch,
    next_power_of_2,
    number,
)
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._rows import leading, row_offset, rows_of
from ppo_fast.kernels._softmax import (
    LOWEST,
    aligned,
    entropy_of,
    log_prob_of,
    softmax_gradient,
    softmax_merged,
    softmax_of_row,
    softmax_of_tile,
)

SHORT = 256
"""Rows of at most this many logits are tiled."""

TILE = 1024
"""Elements of a tile of short rows."""

FEW_ROWS = 2 * 132
PROGRAMS = 4 * 132
"""Below FEW_ROWS rows are split into parts, for PROGRAMS programs in all on a large GPU."""

PART = 8192
"""A part has at least this many logits; in the backward, exactly."""


@triton.jit
def _finish(
    logits, index, temperature, log_probs, entropy, stats, mark, V, row, inside, keep, m, l, s
):
    """Write the results of rows, or of one; `logits` and `index` point to theirs."""
    y = tl.load(index, mask=keep, other=0).to(tl.int64)
    known = (y >= 0) & (y < V)
    x = tl.load(logits + y, mask=keep & known, other=float("nan")).to(tl.float32)
    tl.store(mark + row * 0, 1, mask=keep & (known == 0))
    tl.store(log_probs + row, tl.where(keep, log_prob_of(x, m, l, temperature), 0.0), mask=inside)
    if entropy is not None:
        tl.store(entropy + row, tl.where(keep, entropy_of(l, s), 0.0), mask=inside)
    own = stats + row.to(tl.int64) * 4
    tl.store(own, m, mask=inside)
    tl.store(own + 1, l, mask=inside)
    tl.store(own + 2, s, mask=inside)
    tl.store(own + 3, x, mask=inside)


FORWARD_SIZES = (
    *("M", "V", "T", "logits_b", "logits_t", "index_b", "index_t", "mask_b", "mask_t"),
    *("parts", "part_size"),
)


@triton.jit(do_not_specialize=FORWARD_SIZES)
def log_probs_kernel(
    logits,
    index,
    mask,
    temperature,
    log_probs,
    entropy,
    stats,  # [M, 4]: m, l, s, logit at the index
    partials,  # [M, parts, 3]: m, l, s
    mark,
    M,
    V,
    T,
    logits_b,
    logits_t,
    index_b,
    index_t,
    mask_b,
    mask_t,
    parts,
    part_size,
    K: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
):
    """A program reads one row, or one part of one."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    keep = row < M
    if mask is not None:
        keep = tl.load(mask + row_offset(row, T, mask_b, mask_t)) != 0
    temperature = number(temperature)
    begin = part * part_size
    count = tl.where(keep, tl.minimum(V - begin, part_size), 0)
    logits += row_offset(row, T, logits_b, logits_t)
    ENTROPY: tl.constexpr = entropy is not None
    m, l, s = softmax_of_row(logits + begin, count, LOG2E / temperature, K, W, VEC, ENTROPY)
    if partials is None:
        index += row_offset(row, T, index_b, index_t)
        _finish(
            *(logits, index, temperature, log_probs, entropy, stats, mark),
            *(V, row, row < M, keep, m, l, s),
        )
    else:
        own = partials + tl.program_id(0).to(tl.int64) * 3
        tl.store(own, m)
        tl.store(own + 1, l)
        tl.store(own + 2, s)


@triton.jit(do_not_specialize=FORWARD_SIZES)
def log_probs_merge_kernel(
    logits,
    index,
    mask,
    temperature,
    log_probs,
    entropy,
    stats,
    partials,
    mark,
    M,
    V,
    T,
    logits_b,
    logits_t,
    index_b,
    index_t,
    mask_b,
    mask_t,
    parts,
    part_size,
    PARTS: tl.constexpr,
):
    """A program merges the parts of one row."""
    row = tl.program_id(0)
    keep = row < M
    if mask is not None:
        keep = tl.load(mask + row_offset(row, T, mask_b, mask_t)) != 0
    temperature = number(temperature)
    part = tl.arange(0, PARTS)
    own = partials + (row.to(tl.int64) * parts + part) * 3
    m = tl.load(own, mask=part < parts, other=LOWEST)
    l = tl.load(own + 1, mask=part < parts, other=0.0)
    s = tl.load(own + 2, mask=part < parts, other=0.0)
    m, l, s = softmax_merged(m, l, s, LOG2E / temperature, entropy is not None, 0)
    logits += row_offset(row, T, logits_b, logits_t)
    index += row_offset(row, T, index_b, index_t)
    _finish(
        *(logits, index, temperature, log_probs, entropy, stats, mark),
        *(V, row, row < M, keep, m, l, s),
    )


@triton.jit(do_not_specialize=FORWARD_SIZES)
def log_probs_tile_kernel(
    logits,
    index,
    mask,
    temperature,
    log_probs,
    entropy,
    stats,
    partials,
    mark,
    M,
    V,
    T,
    logits_b,
    logits_t,
    index_b,
    index_t,
    mask_b,
    mask_t,
    parts,
    part_size,
    R: tl.constexpr,
    V2: tl.constexpr,
):
    """A program reads R short rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, V2)
    inside = row < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + row_offset(row, T, mask_b, mask_t), mask=inside, other=False) != 0
    temperature = number(temperature)
    rows = logits + row_offset(row, T, logits_b, logits_t)
    x = tl.load(
        rows[:, None] + column[None, :],
        mask=keep[:, None] & (column < V)[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    m, l, s = softmax_of_tile(x, LOG2E / temperature, entropy is not None)
    index += row_offset(row, T, index_b, index_t)
    _finish(
        *(rows, index, temperature, log_probs, entropy, stats, mark),
        *(V, row, inside, keep, m, l, s),
    )


@triton.jit
def _coefficients(g, h, stats, temperature, row, keep):
    """`(m, offset, slope, peak, active)` of rows, or of one, from pointers to upstream gradients.

    ∂/∂x_j = exp2(t_j) (offset + slope t_j) + peak 1[j = y]  where active, else 0
    """
    own = stats + row.to(tl.int64) * 4
    m = tl.load(own, mask=keep, other=0.0)
    l = tl.load(own + 1, mask=keep, other=1.0)
    s = tl.load(own + 2, mask=keep, other=0.0)
    x = tl.load(own + 3, mask=keep, other=0.0)
    l = tl.where(l < 1.0, 1.0, l)
    up = tl.where(l > 0.0, 0.0, 0.0)  # not m * 0: m may be infinite
    if g is not None:
        up = tl.load(g, mask=keep, other=0.0).to(tl.float32)
        up = tl.where(x == float("-inf"), 0.0, up)
        # A log-probability made NaN by an index out of range has no other gradient.
        up = tl.where((x != x) & (up != 0.0), x, up)
    up_entropy = tl.where(l > 0.0, 0.0, 0.0)
    if h is not None:
        up_entropy = tl.load(h, mask=keep, other=0.0).to(tl.float32)
    active = (up != 0.0) | (up_entropy != 0.0)
    offset = (up_entropy * (s / l * LN2) - up) / (temperature * l)
    slope = up_entropy * (-LN2 / temperature) / l
    return m, offset, slope, up / temperature, active


BACKWARD_SIZES = (
    *("M", "V", "T", "logits_b", "logits_t", "index_b", "index_t", "mask_b", "mask_t"),
    *("gradient_b", "gradient_t", "g_b", "g_t", "h_b", "h_t"),
)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def log_probs_grad_kernel(
    logits,
    index,
    mask,
    temperature,
    stats,
    g,
    h,
    gradient,
    M,
    V,
    T,
    logits_b,
    logits_t,
    index_b,
    index_t,
    mask_b,
    mask_t,
    gradient_b,
    gradient_t,
    g_b,
    g_t,
    h_b,
    h_t,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,  # a row of logits and of its gradient lie alike to 16 bytes
):
    """A program writes SIZE columns of one row; maybe over the logits."""
    blocks = tl.cdiv(V, SIZE)
    row = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * SIZE
    keep = row < M
    if mask is not None:
        keep = tl.load(mask + row_offset(row, T, mask_b, mask_t)) != 0
    temperature = number(temperature)
    c = LOG2E / temperature
    if g is not None:
        g += row_offset(row, T, g_b, g_t)
    if h is not None:
        h += row_offset(row, T, h_b, h_t)
    m, offset, slope, peak, active = _coefficients(g, h, stats, temperature, row, keep)
    y = tl.load(index + row_offset(row, T, index_b, index_t), mask=active, other=0).to(tl.int32)

    logits += row_offset(row, T, logits_b, logits_t)
    gradient += row_offset(row, T, gradient_b, gradient_t)
    head, out = aligned(gradient, V, VEC)
    source = logits + head
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    whole = (V - head) // TILE * TILE
    end = tl.minimum(begin + SIZE, V)
    lane = tl.arange(0, TILE)
    if active:
        for start in tl.range(begin, tl.minimum(end, whole), TILE, num_stages=1):
            x = tl.load(source + start + lane).to(tl.float32)
            dx = softmax_gradient(x, m, c, offset, slope, h is not None)
            dx += tl.where(lane == y - head - start, peak, 0.0)
            tl.store(out + start + lane, dx.to(out.dtype.element_ty))
        for start in tl.range(tl.maximum(begin, whole), end, TILE, num_stages=1):
            position = start + lane
            column = position + tl.where(position < V - head, head, head - V)
            x = tl.load(logits + column, mask=position < end, other=0.0).to(tl.float32)
            dx = softmax_gradient(x, m, c, offset, slope, h is not None)
            dx += tl.where(column == y, peak, 0.0)
            tl.store(gradient + column, dx.to(out.dtype.element_ty), mask=position < end)
    else:
        zero = tl.zeros((TILE,), out.dtype.element_ty)
        for start in tl.range(begin, tl.minimum(end, whole), TILE, num_stages=1):
            tl.store(out + start + lane, zero)
        for start in tl.range(tl.maximum(begin, whole), end, TILE, num_stages=1):
            position = start + lane
            column = position + tl.where(position < V - head, head, head - V)
            tl.store(gradient + column, zero, mask=position < end)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def log_probs_grad_tile_kernel(
    logits,
    index,
    mask,
    temperature,
    stats,
    g,
    h,
    gradient,
    M,
    V,
    T,
    logits_b,
    logits_t,
    index_b,
    index_t,
    mask_b,
    mask_t,
    gradient_b,
    gradient_t,
    g_b,
    g_t,
    h_b,
    h_t,
    R: tl.constexpr,
    V2: tl.constexpr,
):
    """A program writes R short rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, V2)
    inside = row < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + row_offset(row, T, mask_b, mask_t), mask=inside, other=False) != 0
    temperature = number(temperature)
    if g is not None:
        g += row_offset(row, T, g_b, g_t)
    if h is not None:
        h += row_offset(row, T, h_b, h_t)
    m, offset, slope, peak, active = _coefficients(g, h, stats, temperature, row, keep)
    y = tl.load(index + row_offset(row, T, index_b, index_t), mask=active, other=0).to(tl.int32)
    is_column = (column < V)[None, :]
    rows = logits + row_offset(row, T, logits_b, logits_t)
    x = tl.load(rows[:, None] + column[None, :], mask=active[:, None] & is_column, other=0.0).to(
        tl.float32
    )
    c = LOG2E / temperature
    dx = softmax_gradient(x, m[:, None], c, offset[:, None], slope[:, None], h is not None)
    dx += tl.where(column[None, :] == y[:, None], peak[:, None], 0.0)
    out = gradient + row_offset(row, T, gradient_b, gradient_t)
    tl.store(
        out[:, None] + column[None, :],
        tl.where(active[:, None], dx, 0.0).to(gradient.dtype.element_ty),
        mask=inside[:, None] & is_column,
    )


def log_probs_from_logits(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ppo_fast.functional.log_probs.log_probs_from_logits`."""
    if (logits.shape[-1] > 1 and logits.stride(-1) != 1) or len(leading(logits)) > 2:
        logits = logits.contiguous()
    if logits.requires_grad and torch.is_grad_enabled():
        results = _LogProbs.apply(logits, index, mask, temperature, with_entropy, inplace_backward)
    else:
        results = _log_probs(logits, index, mask, *pack(temperature), with_entropy)
    return (results[0], results[1]) if with_entropy else results[0]


def _unsupported(logits: Tensor, *args: object, **kwargs: object) -> str | None:
    if logits.dtype == torch.float64:
        return "float64 tensors run on the reference"
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16 logits, not {logits.dtype}"
    return None


log_probs_from_logits.unsupported = _unsupported  # type: ignore[attr-defined]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        index: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        with_entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.numbers, tensors = pack(temperature)
        ctx.inplace = inplace
        log_probs, entropy, stats = _log_probs(
            logits, index, mask, ctx.numbers, tensors, with_entropy
        )
        ctx.save_for_backward(logits, index, mask, stats, *tensors)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        check_grad_once("log_probs_from_logits")
        if g is None and h is None:
            return (None,) * 6
        if not ctx.inplace:
            logits, index, mask, stats, *tensors = ctx.saved_tensors
            gradient = _log_probs_grad(logits, index, mask, stats, g, h, ctx.numbers, tensors)
        else:
            # Not at the top: that module looks this one up while it is imported.
            from ppo_fast.functional.log_probs import unchanged

            logits, index, mask, stats, *tensors = unchanged("log_probs_from_logits", ctx)
            gradient = logits.detach()
            _write_gradient(logits, index, mask, stats, g, h, ctx.numbers, tensors, gradient)
            torch.autograd.graph.increment_version(gradient)
        return gradient, None, None, None, None, None


def _strides(x: Tensor | None, B: int, T: int) -> tuple[Tensor | None, tuple[int, int]]:
    """A tensor with one entry a row as [B, T], by one copy where no view is; and its strides."""
    if x is None:
        return None, (0, 0)
    x = x.reshape(B, T)
    return x, (x.stride(0), x.stride(1))


def _short(V: int) -> dict[str, int]:
    """Tile of short rows."""
    V2 = next_power_of_2(V)
    return {"R": TILE // V2, "V2": V2, "num_warps": 4}


def _long(V: int, itemsize: int) -> dict[str, int]:
    """Tile of long rows; a pure function of the shape, so results repeat."""
    K, num_warps = (1, 1) if V <= 2048 else (4, 2) if V <= 16384 else (4, 4)
    return {"K": K, "W": 32 * num_warps, "VEC": 16 // itemsize, "num_warps": num_warps}


def _results(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = logits.new_empty(index.shape, dtype=torch.float32)
    entropy = log_probs.new_empty(index.shape if with_entropy else (0,))
    return log_probs, entropy, log_probs.new_empty(index.numel(), 4)


@opaque(_results)
def _log_probs(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (temperature,) = unpack(numbers, tensors)
    log_probs, entropy, stats = _results(logits, index, mask, numbers, tensors, with_entropy)
    M, V = index.numel(), logits.shape[-1]
    if M == 0:
        return log_probs, entropy, stats
    B, T, logits_strides = rows_of(logits)
    index, index_strides = _strides(index, B, T)
    mask, mask_strides = _strides(mask, B, T)

    parts, part_size = 1, V
    if V > SHORT:
        meta = _long(V, logits.element_size())
        if M < FEW_ROWS:
            parts = min(triton.cdiv(V, PART), triton.cdiv(PROGRAMS, M))
            tile = meta["K"] * meta["W"] * meta["VEC"]
            part_size = triton.cdiv(triton.cdiv(V, parts), tile) * tile
            parts = triton.cdiv(V, part_size)
    partials = log_probs.new_empty(M, parts, 3) if parts > 1 else None
    args = (
        *(logits, index, mask, temperature),
        *(log_probs, entropy if with_entropy else None, stats, partials, mark_of(logits.device)),
        *(M, V, T, *logits_strides, *index_strides, *mask_strides, parts, part_size),
    )
    if V <= SHORT:
        meta = _short(V)
        launch(log_probs_tile_kernel, (triton.cdiv(M, meta["R"]),), *args, **meta)
        return log_probs, entropy, stats
    launch(log_probs_kernel, (M * parts,), *args, **meta)
    if partials is not None:
        PARTS = next_power_of_2(parts)
        launch(log_probs_merge_kernel, (M,), *args, PARTS=PARTS, num_warps=1)
    return log_probs, entropy, stats


def _gradient_like(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
) -> Tensor:
    return logits.new_empty(logits.shape)


@opaque(_gradient_like)
def _log_probs_grad(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    _write_gradient(logits, index, mask, stats, g, h, numbers, tensors, gradient)
    return gradient


def _write_gradient(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    gradient: Tensor,
) -> None:
    """Write the gradient into `gradient`, which may be the logits."""
    (temperature,) = unpack(numbers, tensors)
    M, V = index.numel(), logits.shape[-1]
    if M == 0:
        return
    B, T, logits_strides = rows_of(logits)
    gradient_strides = logits_strides if gradient.stride() == logits.stride() else (T * V, V)
    index, index_strides = _strides(index, B, T)
    mask, mask_strides = _strides(mask, B, T)
    g, g_strides = _strides(g, B, T)
    h, h_strides = _strides(h, B, T)
    args = (
        *(logits, index, mask, temperature, stats, g, h, gradient),
        *(M, V, T, *logits_strides, *index_strides, *mask_strides),
        *(*gradient_strides, *g_strides, *h_strides),
    )
    if V <= SHORT:
        meta = _short(V)
        launch(log_probs_grad_tile_kernel, (triton.cdiv(M, meta["R"]),), *args, **meta)
        return
    size = logits.element_size()
    apart = logits.data_ptr() - gradient.data_ptr()
    apart |= (logits_strides[0] - gradient_strides[0]) * size
    apart |= (logits_strides[1] - gradient_strides[1]) * size
    meta = {"SIZE": PART, "VEC": 16 // size, "ALIGNED": apart % 16 == 0}
    meta |= {"TILE": 256, "num_warps": 1} if V <= 2048 else {"TILE": 2048, "num_warps": 4}
    launch(log_probs_grad_kernel, (M * triton.cdiv(V, PART),), *args, **meta)
