"""The PPO mathematics of a row and its gradient, and the sums over rows, for the `ppo_loss` kernels.

The twin of `ppo_fast/functional/_surrogate.py`: same terms, same edges, same order of statistics.
Whoever computes log-probs calls `surrogate` for a block of rows, writes the block's sums by
`store_sums`, and ends in `finish`: the program that draws the last ticket adds all sums up, in the
order of the programs. Only the counting is atomic, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import INTERPRETED, LOG2E, launch, number
from ppo_fast.kernels._library import pack, unpack
from ppo_fast.kernels._moments import folded, merged, moments_of, moments_of_parts, whitening

Scalar = float | Tensor

STATS = tl.constexpr(12)
"""`len(ppo_fast.results.PPO_STATS)`."""
LIMIT = tl.constexpr(20.0)
"""|log ratio| is held below this: fp32 exp overflows at 88.7, and no update survives e^20."""
ILLEGAL = tl.constexpr(-1e9)
"""Stands for log 0, as in the reference: finite, so that probability 0 times it is 0."""
ADVANTAGE_EPS = tl.constexpr(1e-8)
ALL = tl.constexpr(tl.PropagateNan.ALL)

WHITEN_IN_PLACE_ROWS = 16384
"""Up to here each program takes the advantages' moments itself, which saves a launch."""


class Rows(NamedTuple):
    """Contiguous [M] tensors, one entry a row; None where the term takes no part."""

    old_log_probs: Any
    advantages: Any
    new_values: Any
    """`values` of the op: a Triton tuple has an attribute of that name already."""
    old_values: Any
    returns: Any
    ref_log_probs: Any
    mask: Any
    weights: Any


class Numbers(NamedTuple):
    """Coefficients, as numbers or 0-d tensors; None where the term takes no part."""

    clip_coef: Any
    clip_coef_high: Any
    dual_clip: Any
    vf_coef: Any
    vf_clip_coef: Any
    ent_coef: Any
    kl_coef: Any
    old_kl_coef: Any
    normalizer: Any


@triton.jit
def _load(row, at, inside, keep):
    # A skipped row is fetched and dropped: predicated by a mask in memory, loads are 4 bytes wide.
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(keep, x, 0.0)


@triton.jit
def excess(x, exponential):
    """exp(x) - 1 - x, by its series where the difference would cancel."""
    series = 1.0 / 362880.0
    series = series * x + 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, series * x * x, exponential - 1.0 - x)


@triton.jit
def _near_mean(advantages, mask, M):
    """A number near the mean, the same in every program: sums of what is left lose no digits."""
    at = tl.arange(0, 256)
    inside = at < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + at, mask=inside, other=False)
    x = _load(advantages, at, inside, keep)
    return tl.sum(x, 0) / tl.maximum(tl.sum(keep.to(tl.float32), 0), 1.0)


@triton.jit
def _named(index, at, inside, N):
    """The rows that `index` names, 0 in place of those that are not among N."""
    row = tl.load(index + at, mask=inside, other=0).to(tl.int64)
    return tl.where((row >= 0) & (row < N), row, 0)


@triton.jit
def advantage_whitening(
    rows, moments, parts, M, NORM: tl.constexpr, BLOCK: tl.constexpr, index=None, N=None
):
    """`((shift, rest), scale)`, with which ((A - shift) - rest) * scale is whitened.

    NORM: 0 none, 1 over all M here, 2 from [parts, 3] around the pivot, 3 from the caller's [3]. With
    `index` [M] the M are those it names among N; without it N is M and may be left out.
    """
    shift, rest, scale = 0.0, 0.0, 1.0
    if NORM == 1:
        shift = _near_mean(rows.advantages, rows.mask, M if N is None else N)
        offset = tl.arange(0, BLOCK)
        count = tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, M, BLOCK):
            inside = start + offset < M
            at = start + offset
            if index is not None:
                at = _named(index, at, inside, N)
            keep = inside
            if rows.mask is not None:
                keep = tl.load(rows.mask + at, mask=inside, other=False)
            one = keep.to(tl.float32)
            x = (_load(rows.advantages, at, inside, keep) - shift) * one
            count, mean, squares = merged(count, mean, squares, one, x, one * 0.0)
        total, middle, squared = moments_of_parts(count, mean, squares)
        rest, scale = whitening(total, middle, squared, ADVANTAGE_EPS)
    elif NORM == 2:
        shift = _near_mean(rows.advantages, rows.mask, M if N is None else N)
        total, middle, squared = folded(moments, parts, 256)
        rest, scale = whitening(total, middle, squared, ADVANTAGE_EPS)
    elif NORM == 3:
        total, middle, squared = tl.load(moments), tl.load(moments + 1), tl.load(moments + 2)
        shift, scale = whitening(total, middle, squared, ADVANTAGE_EPS)
    if NORM == 1 or NORM == 2:
        # Below two entries nothing is shifted, nor scaled.
        shift = tl.where(total < 2.0, 0.0, shift)
    return (shift, rest), scale


@triton.jit
def surrogate(
    log_probs,  # [BLOCK] float32; anything finite where `keep` is False
    at,  # [BLOCK]: the rows' numbers
    inside,  # [BLOCK] bool: rows that exist
    keep,  # [BLOCK] bool: rows that exist and are not masked
    rows,
    numbers,
    shift,
    scale,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
):
    """Per row: the terms of `PPO_STATS` (all but entropy and count), and n d loss / d of what.

    Returns (policy_loss, value_loss, kl, old_kl, log_ratio, clipped, held, value_clipped, ratio,
    deviation, grad_log_probs, grad_values, weight), [BLOCK] each. Loss terms and gradients are
    weighted and 0 where `keep` is False; so are the statistics.
    """
    one = keep.to(tl.float32)
    nothing = tl.zeros_like(log_probs)
    weight = one
    if rows.weights is not None:
        weight = _load(rows.weights, at, inside, keep)

    unlimited = tl.where(keep, log_probs, 0.0) - _load(rows.old_log_probs, at, inside, keep)
    log_ratio = tl.clamp(unlimited, -LIMIT, LIMIT, propagate_nan=ALL)
    within = (unlimited == log_ratio).to(tl.float32)
    ratio = tl.exp2(log_ratio * LOG2E)
    old_kl = excess(log_ratio, ratio)
    ratio_minus_one = old_kl + log_ratio

    advantages = (_load(rows.advantages, at, inside, keep) - shift[0]) - shift[1]
    neg_advantages = tl.where(keep, -advantages * scale, 0.0)
    low = number(numbers.clip_coef)
    high = low
    if numbers.clip_coef_high is not None:
        high = number(numbers.clip_coef_high)
    clipped_ratio = tl.clamp(ratio, 1.0 - low, 1.0 + high, propagate_nan=ALL)
    unclipped_loss = neg_advantages * ratio
    clipped_loss = neg_advantages * clipped_ratio
    policy_loss = tl.maximum(unclipped_loss, clipped_loss, propagate_nan=ALL)
    # Inside the range both branches are the same number, so ties belong to the unclipped one.
    active = (clipped_loss <= unclipped_loss).to(tl.float32)
    held = nothing
    if numbers.dual_clip is not None:
        ceiling = neg_advantages * number(numbers.dual_clip)
        is_held = (neg_advantages > 0.0) & (policy_loss > ceiling)
        policy_loss = tl.where(is_held, ceiling, policy_loss)
        held = is_held.to(tl.float32)
        active = active * (1.0 - held)
    # Products rather than selections, so that a NaN shows in the gradient.
    grad_log_probs = unclipped_loss * active
    if numbers.old_kl_coef is not None:
        grad_log_probs += number(numbers.old_kl_coef) * ratio_minus_one
    grad_log_probs *= within

    kl = nothing
    if rows.ref_log_probs is not None:
        gap = tl.where(keep, _load(rows.ref_log_probs, at, inside, keep) - log_probs, 0.0)
        difference = tl.clamp(gap, -LIMIT, LIMIT, propagate_nan=ALL)
        grad_kl = (gap == difference).to(tl.float32)
        if KL == 1:
            kl = -difference
        elif KL == 2:
            kl = 0.5 * difference * difference
            grad_kl *= -difference
        else:
            kl = excess(difference, tl.exp2(difference * LOG2E))
            grad_kl *= -(kl + difference)
        if numbers.kl_coef is not None:
            grad_log_probs += number(numbers.kl_coef) * grad_kl

    value_loss, value_clipped, grad_values = nothing, nothing, nothing
    if rows.new_values is not None:
        values = _load(rows.new_values, at, inside, keep)
        of_value = value_terms(values, at, inside, keep, rows, numbers, VF_CLIPPED)
        value_loss, value_clipped, grad_values = of_value[0], of_value[1], of_value[2]

    return (
        policy_loss * weight,
        value_loss,
        kl * weight,
        old_kl * weight,
        log_ratio * one,
        (clipped_ratio != ratio).to(tl.float32) * one,
        held * one,
        value_clipped,
        ratio * one,
        tl.abs(ratio_minus_one) * one,
        grad_log_probs * weight,
        grad_values,
        weight,
    )


@triton.jit
def value_terms(values, at, inside, keep, rows, numbers, VF_CLIPPED: tl.constexpr):
    """`(value_loss, value_clipped, grad_values)` of each row; as in `surrogate`."""
    one = keep.to(tl.float32)
    weight = one
    if rows.weights is not None:
        weight = _load(rows.weights, at, inside, keep)
    values = tl.where(keep, values, 0.0)
    error = values - _load(rows.returns, at, inside, keep)
    vf_coef = 0.0
    if numbers.vf_coef is not None:
        vf_coef = number(numbers.vf_coef)
    if numbers.vf_clip_coef is None:
        value_clipped = tl.zeros_like(error)
        value_loss = 0.5 * error * error
        grad_values = error * vf_coef
    else:
        limit = number(numbers.vf_clip_coef)
        moved = values - _load(rows.old_values, at, inside, keep)
        # Exactly 0 inside the range, so there both errors are one number.
        beyond = moved - tl.clamp(moved, -limit, limit, propagate_nan=ALL)
        clipped_error = error - beyond
        value_clipped = (beyond != 0.0).to(tl.float32)
        if VF_CLIPPED:
            value_loss = 0.5 * clipped_error * clipped_error
            grad_values = (error - error * value_clipped) * vf_coef
        else:
            size, clipped_size = tl.abs(error), tl.abs(clipped_error)
            largest = tl.maximum(size, clipped_size, propagate_nan=ALL)
            value_loss = 0.5 * largest * largest
            grad_values = (size >= clipped_size).to(tl.float32) * error * vf_coef
    return value_loss * weight, value_clipped * one, grad_values * weight


@triton.jit
def sums_of(terms, entropy, keep, rows, numbers):
    """[16]: sums over a block of rows; place 10 is a maximum."""
    place = tl.arange(0, 16)
    ratio = tl.sum(terms[8], 0)
    # tl.max passes over NaN; 0 times the sum brings it back.
    deviation = tl.max(terms[9], 0) + 0.0 * ratio
    sums = tl.where(place == 0, tl.sum(terms[0], 0), 0.0)
    sums = tl.where(place == 4, tl.sum(terms[3], 0), sums)
    sums = tl.where(place == 5, -tl.sum(terms[4], 0), sums)
    sums = tl.where(place == 6, tl.sum(terms[5], 0), sums)
    sums = tl.where(place == 9, ratio, sums)
    if rows.new_values is not None:
        sums = tl.where(place == 1, tl.sum(terms[1], 0), sums)
    if entropy is not None:
        sums = tl.where(place == 2, tl.sum(entropy, 0), sums)
    if rows.ref_log_probs is not None:
        sums = tl.where(place == 3, tl.sum(terms[2], 0), sums)
    if numbers.dual_clip is not None:
        sums = tl.where(place == 7, tl.sum(terms[6], 0), sums)
    if numbers.vf_clip_coef is not None:
        sums = tl.where(place == 8, tl.sum(terms[7], 0), sums)
    sums = tl.where(place == 10, deviation, sums)
    return tl.where(place == 11, tl.sum(keep.to(tl.float32), 0), sums)


@triton.jit
def sums_together(sums, others):
    """The `sums_of` two sets of rows as one set's."""
    largest = tl.maximum(sums, others, propagate_nan=ALL)
    return tl.where(tl.arange(0, 16) == 10, largest, sums + others)


@triton.jit
def store_sums(partials, program, terms, entropy, keep, rows, numbers):
    """Write a program's `sums_of` many rows as row `program` of [programs, 16]."""
    nothing = tl.zeros_like(terms[0])
    h = nothing
    if entropy is not None:
        h = entropy
    # Side by side in [rows, 16] they are one reduction, and not twelve with their barriers. Joined
    # are those whose places differ in one bit, the highest first.
    by_4 = tl.join(tl.join(terms[0], terms[7]), tl.join(terms[3], nothing))
    by_4_plus_1 = tl.join(tl.join(terms[1], terms[8]), tl.join(-terms[4], nothing))
    by_4_plus_2 = tl.join(tl.join(h, nothing), tl.join(terms[5], nothing))
    by_4_plus_3 = tl.join(tl.join(terms[2], keep.to(tl.float32)), tl.join(terms[6], nothing))
    table = tl.join(tl.join(by_4, by_4_plus_2), tl.join(by_4_plus_1, by_4_plus_3))
    sums = tl.sum(tl.reshape(table, (terms[0].shape[0], 16)), 0)
    place = tl.arange(0, 16)
    deviation = tl.max(terms[9], 0) + 0.0 * _entry(sums, 9)
    sums = tl.where(place == 10, deviation, sums)
    tl.store(partials + program.to(tl.int64) * 16 + place, sums)


@triton.jit
def finish(partials, ticket, programs, numbers, loss, stats, inv_n, BLOCK: tl.constexpr = 256):
    """Add up all programs' sums, in the program that comes last; the others do nothing.

    Returns whether this is that program.
    """
    # All lanes have to have written their part before one of them says so.
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket, 1, sem="acq_rel")
    if drawn == programs - 1:
        place = tl.arange(0, 16)
        total = tl.zeros((16,), tl.float32)
        largest = tl.zeros((16,), tl.float32)
        for start in range(0, programs, BLOCK):
            program = start + tl.arange(0, BLOCK)
            at = partials + program.to(tl.int64)[:, None] * 16 + place[None, :]
            # Past the first-level cache, which knows nothing of other programs' writes.
            sums = tl.load(at, mask=(program < programs)[:, None], other=0.0, cache_modifier=".cg")
            total += tl.sum(sums, 0)
            largest = tl.maximum(largest, tl.max(sums, 0))
        scale = conclude(total, largest, numbers, loss, stats)
        tl.store(inv_n, scale)
        tl.store(ticket, 0)
    return drawn == programs - 1


@triton.jit
def mean_scale(count, numbers):
    """1 / what means divide by, and 1 for 0: an empty batch has loss 0."""
    n = count
    if numbers.normalizer is not None:
        n = number(numbers.normalizer)
    return 1.0 / tl.where(n == 0.0, 1.0, n)


@triton.jit
def conclude(total, largest, numbers, loss, stats):
    """Store loss and statistics, from the sums [16] over all rows and their maxima; return 1 / n."""
    count = _entry(total, 11)
    scale = mean_scale(count, numbers)
    means = total * scale
    # The largest deviation; a NaN among them shows in the sum alone.
    deviation = _entry(largest, 10) + 0.0 * _entry(total, 10)
    value = _entry(means, 0)
    if numbers.vf_coef is not None:
        value += number(numbers.vf_coef) * _entry(means, 1)
    if numbers.ent_coef is not None:
        value -= number(numbers.ent_coef) * _entry(means, 2)
    if numbers.kl_coef is not None:
        value += number(numbers.kl_coef) * _entry(means, 3)
    if numbers.old_kl_coef is not None:
        value += number(numbers.old_kl_coef) * _entry(means, 4)
    place = tl.arange(0, 16)
    means = tl.where(place == 10, deviation, tl.where(place == 11, count, means))
    tl.store(stats + place, means, mask=place < STATS)
    tl.store(loss, value)
    return scale


@triton.jit
def _entry(x, number):
    return tl.sum(tl.where(tl.arange(0, 16) == number, x, 0.0), 0)


@triton.jit(do_not_specialize=["N"])
def whitening_kernel(advantages, mask, index, partials, N, M, BLOCK: tl.constexpr):
    """The moments of BLOCK of M advantages a program less `_near_mean`, as a row of [programs, 3].

    Those that `index` [M] names among N, if given; else all, and N is M.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M
    if index is not None:
        at = _named(index, at, inside, N)
    keep = inside
    if mask is not None:
        keep = tl.load(mask + at, mask=inside, other=False)
    one = keep.to(tl.float32)
    x = (_load(advantages, at, inside, keep) - _near_mean(advantages, mask, N)) * one
    count, mean, squares = moments_of(x, one, 0)
    row = partials + tl.program_id(0) * 3
    tl.store(row, count)
    tl.store(row + 1, mean)
    tl.store(row + 2, squares)


class Packed(NamedTuple):
    """The arguments the `ppo_loss` ops share, in the types an opaque op takes."""

    rows: list[Tensor | None]
    moments: Tensor | None
    numbers: list[float]
    tensors: list[Tensor | None]
    vf_clipped: bool
    kl: int
    norm_adv: bool


def packed(
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_log_probs: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    clip_coef: Scalar,
    clip_coef_high: Scalar | None,
    dual_clip: Scalar | None,
    vf_coef: Scalar,
    vf_clip_coef: Scalar | None,
    vf_clip: str,
    ent_coef: Scalar,
    kl_coef: Scalar,
    kl_estimator: str,
    old_kl_coef: Scalar,
    norm_adv: bool,
    advantage_moments: Tensor | None,
    normalizer: Scalar | None,
) -> Packed:
    """Lay the shared arguments out as [M] vectors (one copy each where not contiguous)."""

    def on(coef: Scalar) -> Scalar | None:
        return coef if isinstance(coef, Tensor) or coef else None

    rows = Rows(
        *(old_log_probs, advantages, values, None if vf_clip_coef is None else old_values),
        *(returns, ref_log_probs, mask, weights),
    )
    scalars = Numbers(
        *(clip_coef, clip_coef_high, dual_clip, None if values is None else on(vf_coef)),
        *(vf_clip_coef, on(ent_coef), on(kl_coef), on(old_kl_coef), normalizer),
    )
    numbers, tensors = pack(*scalars)
    return Packed(
        # reshape leaves a vector as it lies, which may be strided.
        [None if row is None else row.detach().reshape(-1).contiguous() for row in rows],
        *(advantage_moments, numbers, tensors),
        *(vf_clip == "clipped", int(kl_estimator[1]), norm_adv),
    )


class Prepared(NamedTuple):
    """What every loss kernel is launched with, made of a `Packed` inside an opaque op."""

    rows: Rows
    numbers: Numbers
    moments: Tensor | None
    parts: int
    meta: dict[str, Any]


def prepared(
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> Prepared:
    """Undo `packed`; takes the advantages' moments by a launch of its own if they are many."""
    named = Rows(*rows)
    M = named.advantages.numel()
    parts, norm = 1, 0
    if moments is not None:
        norm = 3
        moments = moments.detach().float().contiguous()
    elif norm_adv and M <= WHITEN_IN_PLACE_ROWS:
        norm = 1
    elif norm_adv:
        norm = 2
        BLOCK = 4096 if M > 1 << 18 else 1024
        parts = triton.cdiv(M, BLOCK)
        moments = named.advantages.new_empty(parts, 3, dtype=torch.float32)
        args = named.advantages, named.mask, None, moments, M, M
        launch(whitening_kernel, (parts,), *args, BLOCK=BLOCK, num_warps=4)
    meta = {"VF_CLIPPED": vf_clipped, "KL": kl, "NORM": norm}
    return Prepared(named, Numbers(*unpack(numbers, tensors)), moments, parts, meta)


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def ticket_for(x: Tensor) -> Tensor:
    """A zero that the programs of one launch at a time count on; the last one sets it back to 0.

    One a stream, as launches on two streams may run at once; one a captured graph, likewise.
    """
    if INTERPRETED or not x.is_cuda:
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream
    ticket = _tickets.get(key)
    if ticket is None:
        ticket = _tickets[key] = torch.zeros(1, dtype=torch.int32, device=x.device)
    return ticket
