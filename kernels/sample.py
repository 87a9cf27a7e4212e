"""Drawing from a categorical policy: one reading of the logits, two random numbers a row.

The columns are cut into segments of 512, as in the reference. A warp reduces each segment to its
(m, l, s) (see `_softmax.py`), all within the warp; from those of a row come total mass, entropy, and
by the first random number the segment; that one is read again and the second random number picks
the column. The searches are the reference's, by float64 cumulative sums, so both draw the same
action unless a random number falls within rounding of a boundary.

Where rows are few their segments are shared out over programs, and a second launch draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import LOG2E, as_rows, launch, next_power_of_2, number
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._softmax import (
    LOWEST,
    entropy_of,
    log_prob_of,
    softmax_merged,
    softmax_of_tile,
)
from ppo_fast.results import Sample

SEGMENT = tl.constexpr(512)

WARPS = 2112
"""Programs of one warp that fill a large GPU; with under half as many rows, columns are shared."""

ONE_LAUNCH = 4096
"""Up to so many columns a second launch would cost more than it gains."""


@triton.jit
def _first_above(weight, u, AXIS: tl.constexpr):
    """First column whose cumulative weight exceeds u times the total; -1 if no weight is positive.

    Never a column of weight 0, nor one beyond the last positive, however the sums round.
    """
    cumulative = tl.cumsum(weight.to(tl.float64), AXIS)
    target = u * tl.max(cumulative, AXIS)
    column = tl.arange(0, weight.shape[AXIS])
    if AXIS == 1:
        column = column[None, :]
    last = tl.max(tl.where(weight > 0.0, column, -1), AXIS)
    above = (cumulative > tl.expand_dims(target, AXIS)) & (weight > 0.0)
    return tl.min(tl.where(above, column, tl.expand_dims(last, AXIS)), AXIS)


@triton.jit(do_not_specialize=["M", "V", "mask_row"])
def sample_rows_kernel(
    logits,
    mask,
    uniform,  # [M, 2] float64
    temperature,
    actions,
    log_probs,
    entropy,
    M,
    V,
    logits_row,
    mask_row,
    R: tl.constexpr,
    C: tl.constexpr,  # V, rounded up to a power of two
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < M
    keep = inside
    wide = row.to(tl.int64)
    if mask is not None:
        keep = tl.load(mask + wide * mask_row, mask=inside, other=False) != 0
    T = number(temperature)
    c = LOG2E / T
    column = tl.arange(0, C)[None, :]
    at = logits + wide[:, None] * logits_row + column
    x = tl.load(at, mask=keep[:, None] & (column < V), other=float("-inf")).to(tl.float32)
    m, l, s = softmax_of_tile(x, c, True)
    u = tl.load(uniform + wide * 2 + 1, mask=inside, other=0.0)
    action = _first_above(tl.exp2((x - m[:, None]) * c), u, 1)
    action = tl.where(action < 0, V - 1, action)
    picked = tl.sum(tl.where(column == action[:, None], x, 0.0), 1)
    tl.store(actions + row, tl.where(keep, action, 0).to(tl.int64), mask=inside)
    tl.store(log_probs + row, tl.where(keep, log_prob_of(picked, m, l, T), 0.0), mask=inside)
    tl.store(entropy + row, entropy_of(l, s), mask=inside)


@triton.jit
def _draw(
    logits,
    segments,
    uniform,
    temperature,
    actions,
    log_probs,
    entropy,
    row,
    keep,
    V,
    logits_row,
    SEGMENTS: tl.constexpr,
):
    """Draw in one row from the (m, l, s) of its segments and write what was drawn."""
    T = number(temperature)
    c = LOG2E / T
    count = tl.cdiv(V, SEGMENT)
    wide = row.to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    at = segments + wide * count * 3 + segment * 3
    inside = segment < tl.where(keep, count, 0)
    part_m = tl.load(at, mask=inside, other=LOWEST)
    part_l = tl.load(at + 1, mask=inside, other=0.0)
    part_s = tl.load(at + 2, mask=inside, other=0.0)
    m, l, s = softmax_merged(part_m, part_l, part_s, c, True, 0)

    mass = part_l * tl.exp2((part_m - m) * c)
    chosen = _first_above(mass, tl.load(uniform + wide * 2), 0)
    chosen = tl.where(chosen < 0, count - 1, chosen)
    column = chosen * SEGMENT + tl.arange(0, SEGMENT)
    readable = column < tl.where(keep, V, 0)
    at = logits + wide * logits_row + column
    x = tl.load(at, mask=readable, other=float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, 0), LOWEST)
    action = _first_above(tl.exp2((x - top) * c), tl.load(uniform + wide * 2 + 1), 0)
    action = tl.where(action < 0, V - 1, chosen * SEGMENT + action)
    picked = tl.sum(tl.where(column == action, x, 0.0), 0)
    tl.store(actions + row, tl.where(keep, action, 0).to(tl.int64))
    tl.store(log_probs + row, tl.where(keep, log_prob_of(picked, m, l, T), 0.0))
    tl.store(entropy + row, entropy_of(l, s))


@triton.jit
def _keep_segments(segments, segment, count, x, c):
    m, l, s = softmax_of_tile(x, c, True)
    at = segments + segment * 3
    tl.store(at, m, mask=segment < count)
    tl.store(at + 1, l, mask=segment < count)
    tl.store(at + 2, s, mask=segment < count)


@triton.jit(do_not_specialize=["V", "mask_row", "share"])
def sample_kernel(
    logits,
    mask,
    uniform,  # [M, 2] float64
    temperature,
    actions,
    log_probs,
    entropy,
    segments,  # [M, number of segments, 3]: (m, l, s)
    V,
    logits_row,
    mask_row,
    share,  # segments of a program, a multiple of K
    K: tl.constexpr,  # segments read at once
    SEGMENTS: tl.constexpr,  # their number in a row, rounded up to a power of two
    DRAW: tl.constexpr,
):
    row = tl.program_id(0)
    keep = row >= 0
    if mask is not None:
        keep = tl.load(mask + row.to(tl.int64) * mask_row) != 0
    c = LOG2E / number(temperature)
    count = tl.cdiv(V, SEGMENT)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tl.where(keep, count, 0))
    # Only the last K segments may run beyond the row.
    whole = tl.minimum(end, V // SEGMENT)
    whole = begin + tl.maximum(whole - begin, 0) // K * K
    x_row = logits + row.to(tl.int64) * logits_row
    own = segments + row.to(tl.int64) * count * 3
    column = tl.arange(0, SEGMENT)[None, :]
    group = tl.arange(0, K)
    for first in tl.range(begin, whole, K, num_stages=1):
        x = tl.load(x_row + first * SEGMENT + group[:, None] * SEGMENT + column).to(tl.float32)
        _keep_segments(own, first + group, count, x, c)
    for first in tl.range(whole, end, K, num_stages=1):
        at = first * SEGMENT + group[:, None] * SEGMENT + column
        x = tl.load(x_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        _keep_segments(own, first + group, count, x, c)
    if DRAW:
        # What other lanes have stored is read next.
        tl.debug_barrier()
        _draw(
            logits,
            segments,
            uniform,
            temperature,
            actions,
            log_probs,
            entropy,
            row,
            keep,
            V,
            logits_row,
            SEGMENTS,
        )


@triton.jit(do_not_specialize=["V", "mask_row"])
def sample_draw_kernel(
    logits,
    mask,
    uniform,
    temperature,
    actions,
    log_probs,
    entropy,
    segments,
    V,
    logits_row,
    mask_row,
    SEGMENTS: tl.constexpr,
):
    row = tl.program_id(0)
    keep = row >= 0
    if mask is not None:
        keep = tl.load(mask + row.to(tl.int64) * mask_row) != 0
    _draw(
        logits,
        segments,
        uniform,
        temperature,
        actions,
        log_probs,
        entropy,
        row,
        keep,
        V,
        logits_row,
        SEGMENTS,
    )


def sample_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Sample:
    """See `ppo_fast.functional.sample.sample_from_logits`."""
    if uniform is None:
        # The reference's own random numbers; drawn outside the op, which is then a pure function.
        uniform = torch.empty(logits.shape[0], 2, dtype=torch.float64, device=logits.device)
        uniform.uniform_(generator=generator)
    uniform = uniform.contiguous()
    numbers, tensors = pack(temperature)
    return Sample(*_sample(logits.detach(), mask, uniform, numbers, tensors))


def _unsupported(logits: Tensor, **kwargs: object) -> str | None:
    return "float64 tensors run on the reference" if logits.dtype == torch.float64 else None


sample_from_logits.unsupported = _unsupported  # type: ignore[attr-defined]


def _outputs(
    logits: Tensor,
    mask: Tensor | None,
    uniform: Tensor,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    M = logits.shape[0]
    actions = torch.empty(M, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(M, dtype=torch.float32, device=logits.device)
    return actions, log_probs, torch.empty_like(log_probs)


@opaque(_outputs)
def _sample(
    logits: Tensor,
    mask: Tensor | None,
    uniform: Tensor,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, mask, uniform, numbers, tensors)
    (temperature,) = unpack(numbers, tensors)
    logits = as_rows(logits)
    M, V = logits.shape
    mask_row = 0 if mask is None else mask.stride(0)
    count = triton.cdiv(V, SEGMENT.value)
    if count == 1:
        C = next_power_of_2(V)
        # Few rows a program where there are few.
        R = max(1, (2048 if M * C >= 1 << 21 else 512) // C)
        args = (logits, mask, uniform, temperature, *outputs, M, V, logits.stride(0), mask_row)
        launch(sample_rows_kernel, (triton.cdiv(M, R),), *args, R=R, C=C, num_warps=4)
        return outputs

    K = 4
    programs = 1
    if V > ONE_LAUNCH and 0 < M * 2 <= WARPS:
        programs = min(triton.cdiv(count, K), triton.cdiv(WARPS, M))
    share = triton.cdiv(triton.cdiv(count, programs), K) * K
    programs = triton.cdiv(count, share)
    segments = outputs[1].new_empty(M, count, 3)
    args = (logits, mask, uniform, temperature, *outputs, segments, V, logits.stride(0), mask_row)
    meta = {"SEGMENTS": next_power_of_2(count), "num_warps": 1}
    launch(sample_kernel, (M, programs), *args, share, K=K, DRAW=programs == 1, **meta)
    if programs > 1:
        launch(sample_draw_kernel, (M,), *args, **meta)
    return outputs
