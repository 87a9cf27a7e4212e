"""Generalized Advantage Estimation as a tiled reverse scan.

The recursion A_t = delta_t + decay_t A_{t+1} is a scan of affine maps backwards in time. A program
holds a tile of BT rows by BN columns, scans it, and carries the first row's advantage to the tile
before it. Where there are too few columns to fill a GPU, time is cut into chunks: one launch
reduces each chunk to its affine map, a second folds the maps of the later chunks into its carry and
writes. The second reading comes from the L2 cache: problems of that kind are small.

Rollouts [T, N] are tiled as they lie, batches of sequences [B, T].t() with the axes exchanged, so
neither is ever copied. The strides along time are kept from being specialised: told that they are
multiples of 16, the compiler gives a thread several columns and shuffles the scan across lanes;
not told, each thread scans its own column in registers, without a shuffle or a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import launch, next_power_of_2, number
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._moments import merge_kernel, merged, moments_of, moments_of_parts

Scalar = float | Tensor

PROGRAMS = 528
"""Enough programs to fill a large GPU four times over; with fewer, time is cut into chunks."""

COLUMN_BLOCKS = 128
"""Blocks of 32 columns from which time is walked in one piece."""

MAX_CHUNKS = 512


@triton.jit
def _follow(decay_later, delta_later, decay, delta):
    """Two affine maps as one; the arguments come in the order of the scan, backwards in time."""
    return decay_later * decay, delta + decay * delta_later


@triton.jit
def _last(x, is_last, AXIS: tl.constexpr):
    return tl.sum(tl.where(is_last, x, 0.0), AXIS)


@triton.jit(
    do_not_specialize=[
        *("T", "N", "chunks", "chunk_size"),
        *("rewards_t", "values_t", "terminated_t", "truncated_t"),
        *("bootstrap_t", "mask_t", "ratios_t", "out_t"),
    ]
)
def gae_kernel(
    rewards,
    values,
    next_value,
    terminated,
    truncated,
    bootstrap,
    mask,
    ratios,
    cu_seqlens,
    gamma,
    gae_lambda,
    rho_clip,
    c_clip,
    advantages,
    returns,
    summaries,  # [2, chunks, N]: each chunk's affine map
    partials,  # [programs, 3]: moments
    T,
    N,
    chunks,
    chunk_size,
    rewards_t,
    rewards_n,
    values_t,
    values_n,
    terminated_t,
    terminated_n,
    truncated_t,
    truncated_n,
    bootstrap_t,
    bootstrap_n,
    mask_t,
    mask_n,
    ratios_t,
    ratios_n,
    next_value_n,
    lambda_n,
    out_t,
    out_n,
    LAMBDA_PER_COLUMN: tl.constexpr,
    TIME_AXIS: tl.constexpr,  # 0: tiles [BT, BN], 1: tiles [BN, BT]
    SUMMARIZE: tl.constexpr,
    FOLD: tl.constexpr,  # maps of later chunks folded at a time; 0 if there is one chunk
    ONE_TILE: tl.constexpr,  # whether no column has rows beyond one tile
    FAR: tl.constexpr,  # whether a tile's rows lie further apart than 32 bits reach
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    COLUMN_AXIS: tl.constexpr = 1 - TIME_AXIS
    block = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    column = block * BN + tl.arange(0, BN)
    is_column = column < N
    length = T
    first = column.to(tl.int64) * 0  # of the column's tokens among all, where they are packed
    if cu_seqlens is not None:
        # Packed sequences come one a program: BN is 1.
        first = tl.load(cu_seqlens + column).to(tl.int64)
        length = tl.sum(tl.load(cu_seqlens + column + 1).to(tl.int64) - first, 0).to(tl.int32)
        chunk_size = tl.cdiv(tl.cdiv(length, chunks), BT) * BT
    begin = tl.minimum(chunk * chunk_size, length)
    end = tl.minimum(begin + chunk_size, length)

    wide_n = tl.expand_dims(column.to(tl.int64), TIME_AXIS)
    is_wide_n = tl.expand_dims(is_column, TIME_AXIS)
    base = tl.expand_dims(first, TIME_AXIS)
    step = tl.expand_dims(tl.arange(0, BT), COLUMN_AXIS)

    g = number(gamma)
    if LAMBDA_PER_COLUMN:
        lam = tl.load(gae_lambda + column * lambda_n, mask=is_column, other=0.0).to(tl.float32)
        lam = tl.expand_dims(lam, TIME_AXIS)
    else:
        lam = number(gae_lambda)

    # What follows the chunk: the value of its next row, and the advantage there.
    after = tl.load(next_value + column * next_value_n, mask=is_column, other=0.0).to(tl.float32)
    if mask is None:
        row = values + (first + end) * values_t + column.to(tl.int64) * values_n
        within = tl.load(row, mask=is_column & (end < length), other=0.0).to(tl.float32)
        after = tl.where(end < length, within, after)
    else:
        # The value of the next row that is not skipped, wherever it is.
        searching = is_column.to(tl.int32)
        ahead = end
        while (ahead < length) & (tl.max(searching, 0) > 0):
            t = ahead + step
            kept = tl.load(
                mask + (base + t) * mask_t + wide_n * mask_n,
                mask=(t < length) & is_wide_n,
                other=False,
            )
            nearest = tl.min(tl.where(kept, t, length), TIME_AXIS)
            found = (nearest < length) & (searching > 0)
            row = values + (first + nearest) * values_t + column.to(tl.int64) * values_n
            after = tl.where(found, tl.load(row, mask=found, other=0.0).to(tl.float32), after)
            searching = tl.where(found, 0, searching)
            ahead += BT

    carry = tl.zeros((BN,), tl.float32)
    product = tl.full((BN,), 1.0, tl.float32)
    if not SUMMARIZE and FOLD > 0:
        for done in range(0, chunks - 1 - chunk, FOLD):
            later = chunks - 1 - done - tl.expand_dims(tl.arange(0, FOLD), COLUMN_AXIS)
            maps = summaries + later.to(tl.int64) * N + wide_n
            is_later = (later > chunk) & is_wide_n
            decays = tl.load(maps, mask=is_later, other=1.0)
            deltas = tl.load(maps + N.to(tl.int64) * chunks, mask=is_later, other=0.0)
            decays, deltas = tl.associative_scan((decays, deltas), TIME_AXIS, _follow)
            deltas += decays * tl.expand_dims(carry, TIME_AXIS)
            carry = _last(deltas, later == chunks - done - FOLD, TIME_AXIS)
    count = tl.zeros((BN,), tl.float32)
    mean = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)

    is_last = step == BT - 1
    # Rows of a tile lie near each other: their offsets from its last row fit 32 bits nearly always.
    back = step
    if FAR:
        back = step.to(tl.int64)
    for tile in range(0, tl.cdiv(end - begin, BT)):
        top = end - 1 - tile * BT
        t = top - step
        at = base + top
        inside = (t >= begin) & is_wide_n
        keep = inside
        if mask is not None:
            skip_or_keep = mask + at * mask_t + wide_n * mask_n - back * mask_t
            keep = tl.load(skip_or_keep, mask=inside, other=False)
        r = tl.load(
            rewards + at * rewards_t + wide_n * rewards_n - back * rewards_t, mask=keep, other=0.0
        ).to(tl.float32)
        value = values + at * values_t + wide_n * values_n - back * values_t
        v = tl.load(value, mask=keep, other=0.0).to(tl.float32)
        ended = tl.load(
            terminated + at * terminated_t + wide_n * terminated_n - back * terminated_t,
            mask=keep,
            other=False,
        )

        # V(s'_t): of the row after, or of the next row that is not skipped.
        ends_chunk = (step == 0) & (tile == 0)
        has_next = inside & (ends_chunk == 0)
        if mask is None:
            next_v = tl.load(value + values_t, mask=has_next, other=0.0).to(tl.float32)
            next_v = tl.where(ends_chunk, tl.expand_dims(after, TIME_AXIS), next_v)
        else:
            known = tl.load(skip_or_keep + mask_t, mask=has_next, other=False)
            next_v = tl.load(value + values_t, mask=known, other=0.0).to(tl.float32)
            passing = tl.where(known, 0.0, 1.0)
            passing, next_v = tl.associative_scan((passing, next_v), TIME_AXIS, _follow)
            # A product with 0 would let an infinite value after the chunk through.
            next_v = tl.where(passing > 0.0, tl.expand_dims(after, TIME_AXIS), next_v)
            if not ONE_TILE:
                after = _last(next_v, is_last, TIME_AXIS)

        discount = tl.where(ended, 0.0, g)
        decay = discount * lam
        if truncated is not None:
            cut = tl.load(
                truncated + at * truncated_t + wide_n * truncated_n - back * truncated_t,
                mask=keep,
                other=False,
            )
            cut = cut & (ended == 0)
            boot = tl.load(
                bootstrap + at * bootstrap_t + wide_n * bootstrap_n - back * bootstrap_t,
                mask=cut,
                other=0.0,
            ).to(tl.float32)
            next_v = tl.where(cut, boot, next_v)
            decay = tl.where(cut, 0.0, decay)
        delta = r + discount * next_v - v
        if ratios is not None:
            ratio = tl.load(
                ratios + at * ratios_t + wide_n * ratios_n - back * ratios_t, mask=keep, other=0.0
            ).to(tl.float32)
            delta *= tl.minimum(ratio, number(rho_clip))
            decay *= tl.minimum(ratio, number(c_clip))
        # A skipped row hands on, undiscounted, what comes after it. So does one outside, where its
        # carry matters; its delta is 0 as it is.
        if mask is not None:
            delta = tl.where(keep, delta, 0.0)
        if SUMMARIZE or mask is not None:
            decay = tl.where(keep, decay, 1.0)

        decay, delta = tl.associative_scan((decay, delta), TIME_AXIS, _follow)
        advantage = delta
        if not ONE_TILE:
            advantage += decay * tl.expand_dims(carry, TIME_AXIS)
            carry = _last(advantage, is_last, TIME_AXIS)
        if SUMMARIZE:
            product *= _last(decay, is_last, TIME_AXIS)
        else:
            result = advantage + v
            if mask is not None:
                advantage = tl.where(keep, advantage, 0.0)
                result = tl.where(keep, result, 0.0)
            out = at * out_t + wide_n * out_n
            tl.store(advantages + out - back * out_t, advantage, mask=inside)
            tl.store(returns + out - back * out_t, result, mask=inside)
            if partials is not None:
                parts = moments_of(advantage, keep.to(tl.float32), TIME_AXIS)
                count, mean, squares = merged(count, mean, squares, parts[0], parts[1], parts[2])

    if SUMMARIZE:
        own = summaries + chunk.to(tl.int64) * N + column
        tl.store(own, product, mask=is_column)
        tl.store(own + N.to(tl.int64) * chunks, carry, mask=is_column)
    elif partials is not None:
        total, middle, squared = moments_of_parts(count, mean, squares)
        row = partials + tl.program_id(0) * 3
        tl.store(row, total)
        tl.store(row + 1, middle)
        tl.store(row + 2, squared)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    ratios: Tensor | None = None,
    rho_clip: Scalar = 1.0,
    c_clip: Scalar = 1.0,
    with_moments: bool = False,
) -> tuple[Tensor, ...]:
    """See `ppo_fast.functional.gae.gae`."""
    numbers, tensors = pack(gamma, gae_lambda, rho_clip, c_clip)
    flags = truncated, bootstrap_values, mask, ratios
    results = _gae(
        rewards, values, next_value, terminated, *flags, None, numbers, tensors, with_moments
    )
    return results if with_moments else results[:2]


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    cu_seqlens: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    ratios: Tensor | None = None,
    rho_clip: Scalar = 1.0,
    c_clip: Scalar = 1.0,
    with_moments: bool = False,
) -> tuple[Tensor, ...]:
    """See `ppo_fast.functional.gae.gae_packed`."""
    numbers, tensors = pack(gamma, gae_lambda, rho_clip, c_clip)
    flags = truncated, bootstrap_values, mask, ratios
    results = _gae(
        rewards, values, next_value, terminated, *flags, cu_seqlens, numbers, tensors, with_moments
    )
    return results if with_moments else results[:2]


def _unsupported(rewards: Tensor, values: Tensor, *args: object, **kwargs: object) -> str | None:
    tensors = [x for x in (rewards, values, *args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.dtype == torch.float64 and x.dim() for x in tensors):
        return "float64 tensors run on the reference"
    return None


gae.unsupported = gae_packed.unsupported = _unsupported  # type: ignore[attr-defined]


def _tiles(T: int, N: int, time_axis: int, rows: int) -> tuple[int, int, int, int]:
    """Choose `(BT, BN, num_warps, chunks)`; a pure function of the call, so results repeat.

    `rows` is how many rows of a column a thread holds: more are more loads on their way, and more
    registers.
    """
    if time_axis == 0:
        blocks = triton.cdiv(N, 32)
        if rows >= T:
            return next_power_of_2(T), 32, 1, 1
        if 8 * rows >= T and blocks <= PROGRAMS:
            BT = next_power_of_2(T)
            return BT, 32, BT // rows, 1
        if blocks >= COLUMN_BLOCKS:
            # About 1000 warps keep the memory busy; more only cost barriers.
            num_warps = 1 << max(0, min(3, (8 * COLUMN_BLOCKS // blocks).bit_length() - 1))
            return rows * num_warps, 32, num_warps, 1
        return rows, 32, 1, _chunks(T, rows, blocks)
    if N >= 8 * PROGRAMS:
        # A warp along time and a few rows each: shuffles, but no barrier and no shared memory.
        BT = min(128, max(32, next_power_of_2(T)))
        return BT, 16 * rows // BT, 1, 1
    BT = min(1024, max(32, next_power_of_2(T)))
    return BT, 1, max(1, BT // 256), _chunks(T, BT, N)


def _chunks(T: int, BT: int, blocks: int) -> int:
    """How many pieces to cut time into: few columns, whose second reading the L2 cache serves."""
    if 2 * blocks > PROGRAMS or T <= 2 * BT:
        return 1
    return min(triton.cdiv(T, BT), triton.cdiv(PROGRAMS, blocks), MAX_CHUNKS)


def _outputs(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    mask: Tensor | None,
    ratios: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    advantages = torch.empty_like(values, dtype=torch.float32)
    moments = advantages.new_empty(3 if with_moments else 0)
    return advantages, torch.empty_like(advantages), moments


@opaque(_outputs)
def _gae(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    mask: Tensor | None,
    ratios: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    with_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gamma, gae_lambda, rho_clip, c_clip = unpack(numbers, tensors)
    advantages = torch.empty_like(values, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    moments = advantages.new_empty(3 if with_moments else 0)
    if rewards.numel() == 0:
        return advantages, returns, moments.zero_()

    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    strides = _strides(rewards, values, terminated, truncated, bootstrap_values, mask, ratios)
    far = 1024 * max(map(abs, strides[::2])) >= 1 << 31
    rows = 8 if far or mask is not None or ratios is not None else 16
    if cu_seqlens is None:
        T, N = rewards.shape
        # Columns that lie contiguous in time are read along it.
        time_axis = int(rewards.stride(0) == 1 and T > 1)
        BT, BN, num_warps, chunks = _tiles(T, N, time_axis, rows)
    else:
        T, N, time_axis = rewards.shape[0], cu_seqlens.shape[0] - 1, 1
        # How long the sequences are is on the device; the average decides.
        BT, BN, num_warps, chunks = _tiles(triton.cdiv(T, N), min(N, 8 * PROGRAMS - 1), 1, rows)
    chunk_size = triton.cdiv(triton.cdiv(T, chunks), BT) * BT
    if cu_seqlens is None:
        chunks = triton.cdiv(T, chunk_size)
    programs = triton.cdiv(N, BN) * chunks
    per_column = isinstance(gae_lambda, Tensor) and gae_lambda.dim() == 1
    summaries = advantages.new_empty(2, chunks, N) if chunks > 1 else None
    partials = advantages.new_empty(programs, 3) if with_moments else None

    args = (
        *(rewards, values, next_value, terminated, truncated, bootstrap_values, mask, ratios),
        *(cu_seqlens, gamma, gae_lambda, rho_clip, c_clip),
        *(advantages, returns, summaries, partials, T, N, chunks, chunk_size),
        *strides,
        next_value.stride(0),
        gae_lambda.stride(0) if per_column else 0,  # type: ignore[union-attr]
        *_strides(advantages),
    )
    meta = {"LAMBDA_PER_COLUMN": per_column, "TIME_AXIS": time_axis, "BT": BT, "BN": BN, "FAR": far}
    meta["ONE_TILE"] = chunks == 1 and cu_seqlens is None and T <= BT
    fold = min(next_power_of_2(chunks), 16 if time_axis == 0 else MAX_CHUNKS)
    meta |= {"FOLD": fold if chunks > 1 else 0, "num_warps": num_warps}
    if chunks > 1:
        launch(gae_kernel, (programs,), *args, SUMMARIZE=True, **meta)
    launch(gae_kernel, (programs,), *args, SUMMARIZE=False, **meta)
    if with_moments:
        launch(merge_kernel, (1,), partials, moments, programs, BLOCK=256)
    return advantages, returns, moments


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides along time and columns of each; those of a missing or one-dimensional one are 0."""
    strides = []
    for x in tensors:
        strides += [0, 0] if x is None else [x.stride(0), x.stride(1) if x.dim() == 2 else 0]
    return strides
