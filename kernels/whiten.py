"""Whitening in one launch of one program for small inputs, in two launches for large ones.

Up to 528 programs each reduce a share of the entries to count, mean and sum of squared deviations;
then every program of the second launch merges all of these in the same fixed order and whitens its
share. Up to 16384 entries one program does both; with moments given only the second half runs.

A mean is kept in two parts, its rounded value and the rest: subtracting the first is exact for
entries near it, so a large mean costs no precision and equal entries become exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import launch, next_power_of_2, number
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._moments import centred_moments_of, centred_moments_of_parts, merged

PROGRAMS = 528
"""Enough programs to fill a large GPU four times over."""

ONE_PROGRAM = 16384
"""Up to so many entries a second launch would cost more than one program's second reading."""


@triton.jit
def _entries(
    x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, TAIL: tl.constexpr
):
    """Entries `start + offset` in fp32, 0 where masked; and 1 or 0 for whether they count.

    What is masked is dropped after the load: a load under such a mask is one of single entries.
    """
    if inner is not None:
        index = start.to(tl.int32) + offset
        row, col = (index // inner).to(tl.int64), index % inner
        at_x, at_mask = row * x_row + col.to(tl.int64) * x_col, 0
        if mask is not None:
            at_mask = row * mask_row + col.to(tl.int64) * mask_col
    else:
        x += start
        at_x, at_mask = offset, offset
        if mask is not None:
            mask += start
    if TAIL:
        keep = start + offset < N
        value = tl.load(x + at_x, mask=keep, other=0.0).to(tl.float32)
        if mask is not None:
            keep = tl.load(mask + at_mask, mask=keep, other=False) != 0
    else:
        keep = offset >= 0
        value = tl.load(x + at_x).to(tl.float32)
        if mask is not None:
            keep = tl.load(mask + at_mask) != 0
    return tl.where(keep, value, 0.0), keep.to(tl.float32)


@triton.jit
def _by_lane(tile, W: tl.constexpr):
    """[K, W * VEC] to [W, K * VEC]: what each lane has loaded."""
    K: tl.constexpr = tile.shape[0]
    VEC: tl.constexpr = tile.shape[1] // W
    return tl.reshape(tl.permute(tl.reshape(tile, (K, W, VEC)), (1, 0, 2)), (W, K * VEC))


@triton.jit
def _joined(state, pivot, value, keep, ALL: tl.constexpr):
    """The moments of each lane's entries less the pivot, with those of one more tile [K, W * VEC]."""
    count, mean, squares = state
    value = _by_lane(value - pivot, count.shape[0])
    if ALL:
        more, middle, squared = centred_moments_of(value, None, 1)
    else:
        keep = _by_lane(keep, count.shape[0])
        more, middle, squared = centred_moments_of(value * keep, keep, 1)
    return merged(count, mean, squares, more, middle, squared)


@triton.jit
def _put(out, start, offset, N, value, keep, mean, rest, scale, back, TAIL: tl.constexpr):
    y = ((value - mean) - rest) * scale + back
    y = tl.where(keep > 0.0, y, 0.0)
    if TAIL:
        tl.store(out + start + offset, y, mask=start + offset < N)
    else:
        tl.store(out + start + offset, y)


@triton.jit(do_not_specialize=["N", "inner", "parts"])
def whiten_kernel(
    x,
    mask,
    moments,  # [3], or None
    partials,  # [parts, 4]: count, mean, rest of the mean, sum of squared deviations; or None
    out,
    eps,
    N,
    inner,  # entries of a row, or None where x and mask lie as one row
    x_row,
    x_col,
    mask_row,
    mask_col,
    parts,
    MEASURE: tl.constexpr,
    APPLY: tl.constexpr,
    SHIFT_MEAN: tl.constexpr,
    PARTS: tl.constexpr,  # parts, rounded up to a power of two
    W: tl.constexpr,  # lanes
    K: tl.constexpr,
    VEC: tl.constexpr,  # entries of x in 16 bytes
):
    TILE: tl.constexpr = W * K * VEC
    offset = tl.arange(0, K)[:, None] * (W * VEC) + tl.arange(0, W * VEC)[None, :]
    # Else bytes of the mask, which come 16 to a load, would set the layout of x too.
    offset = tl.max_contiguous(offset, (1, VEC))
    wide = tl.zeros((), tl.int64)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    full = (N // TILE).to(tl.int32)
    tiles = tl.cdiv(N, TILE).to(tl.int32)

    total = 0.0
    mean = 0.0
    rest = 0.0
    squares = 0.0
    if MEASURE:
        # The mean of the first tile that has entries: what is left once it is subtracted is exact
        # and small, however large the mean.
        pivot = 0.0
        found = 0.0
        tile = program
        while (tile < tiles) & (found == 0.0):
            start = (wide + tile) * TILE
            value, keep = _entries(
                x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, True
            )
            found = tl.sum(tl.sum(keep, 1), 0)
            pivot = tl.sum(tl.sum(value, 1), 0) / tl.maximum(found, 1.0)
            tile += programs
        nothing = tl.zeros((W,), tl.float32)
        state = (nothing, nothing, nothing)
        for tile in range(program, full, programs):
            start = (wide + tile) * TILE
            value, keep = _entries(
                x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, False
            )
            state = _joined(state, pivot, value, keep, mask is None)
        for tile in range(full + program, tiles, programs):
            start = (wide + tile) * TILE
            value, keep = _entries(
                x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, True
            )
            state = _joined(state, pivot, value, keep, False)
        total, middle, rest, squares = centred_moments_of_parts(
            state[0], state[1], nothing, state[2]
        )
        mean = pivot + middle
        # What the sum has rounded off.
        rest += middle - (mean - pivot)
        if not APPLY:
            row = partials + program * 4
            tl.store(row, total)
            tl.store(row + 1, mean)
            tl.store(row + 2, rest)
            tl.store(row + 3, squares)
    elif moments is not None:
        total = tl.load(moments).to(tl.float32)
        mean = tl.load(moments + 1).to(tl.float32)
        squares = tl.load(moments + 2).to(tl.float32)
    else:
        part = tl.arange(0, PARTS)
        row = partials + part * 4
        total, mean, rest, squares = centred_moments_of_parts(
            tl.load(row, mask=part < parts, other=0.0),
            tl.load(row + 1, mask=part < parts, other=0.0),
            tl.load(row + 2, mask=part < parts, other=0.0),
            tl.load(row + 3, mask=part < parts, other=0.0),
        )

    if APPLY:
        # Fewer than two entries have no scale and stay.
        alone = total < 2.0
        std = tl.sqrt(squares / tl.maximum(total - 1.0, 1.0))
        scale = tl.where(alone, 1.0, 1.0 / (std + number(eps)))
        mean = tl.where(alone, 0.0, mean)
        rest = tl.where(alone, 0.0, rest)
        back = 0.0
        if not SHIFT_MEAN:
            back = mean + rest
        for tile in range(program, full, programs):
            start = (wide + tile) * TILE
            value, keep = _entries(
                x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, False
            )
            _put(out, start, offset, N, value, keep, mean, rest, scale, back, False)
        for tile in range(full + program, tiles, programs):
            start = (wide + tile) * TILE
            value, keep = _entries(
                x, mask, start, offset, N, inner, x_row, x_col, mask_row, mask_col, True
            )
            _put(out, start, offset, N, value, keep, mean, rest, scale, back, True)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float | Tensor = 1e-8,
    moments: Tensor | None = None,
) -> Tensor:
    """See `ppo_fast.functional.whiten.masked_whiten`."""
    numbers, tensors = pack(eps)
    return _masked_whiten(x.detach(), mask, shift_mean, numbers, tensors, moments)


def _unsupported(x: Tensor, *args: object, **kwargs: object) -> str | None:
    return "float64 tensors run on the reference" if x.dtype == torch.float64 else None


masked_whiten.unsupported = _unsupported  # type: ignore[attr-defined]


def _lies_dense(x: Tensor) -> bool:
    """Whether the entries fill one stretch of memory, in whatever order."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.is_contiguous() or x.permute(order).is_contiguous()


def _output(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    moments: Tensor | None,
) -> Tensor:
    """Lies as x does where that leaves no gaps."""
    if _lies_dense(x):
        return torch.empty_like(x, dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@opaque(_output)
def _masked_whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    moments: Tensor | None,
) -> Tensor:
    (eps,) = unpack(numbers, tensors)
    out = _output(x, mask, shift_mean, numbers, tensors, moments)
    moments = None if moments is None else moments.contiguous()
    N = x.numel()
    strides = [0, 0, 0, 0]
    inner = None
    if _lies_dense(x):
        if mask is not None and mask.stride() != x.stride():
            mask = torch.empty_like(x, dtype=torch.bool).copy_(mask)
    elif x.dim() == 2 and N < 2**31:
        inner = x.shape[1]
        strides = [*x.stride(), *(mask.stride() if mask is not None else (0, 0))]
    else:
        x = x.contiguous()
        mask = None if mask is None else mask.contiguous()

    small = N <= ONE_PROGRAM
    num_warps = 4 if N <= 2048 else 16 if small else 8
    VEC = 16 // x.element_size()
    W, K = 32 * num_warps, 16 // VEC
    if inner is not None:
        # Rows end anywhere: entries are read one by one.
        W, K, VEC = 4 * W, 1, 1
    programs = min(PROGRAMS, triton.cdiv(N, W * K * VEC))
    measure_first = moments is None and not small
    partials = out.new_empty(programs, 4) if measure_first else None
    args = (x, mask, moments, partials, out, eps, N, inner, *strides, programs)
    meta = {"SHIFT_MEAN": shift_mean, "PARTS": next_power_of_2(programs), "W": W, "K": K}
    meta |= {"VEC": VEC, "num_warps": num_warps}
    if measure_first:
        launch(whiten_kernel, (programs,), *args, MEASURE=True, APPLY=False, **meta)
    elif moments is None:
        programs = min(programs, 1)
    measure = moments is None and not measure_first
    launch(whiten_kernel, (programs,), *args, MEASURE=measure, APPLY=True, **meta)
    return out
