"""The PPO loss straight from small heads: categorical, multi-discrete and Gaussian.

A thread owns a row, or a share of one where rows are wide: it holds the logits in registers, as
tiles [rows, W] with W the columns that one load brings to a row's lanes. So what is reduced over
actions stays within a thread or a few lanes, and the PPO terms are computed about once a row. Loads
of neighbouring threads are a row apart; the first-level cache joins them.

    log p_j = u_j - log l,  H = log l - s / l,   u = (x - max x) / T,  l = Σ e^u,  s = Σ u e^u

of which, with g the row's n d loss / d log p(action) and c the weight of its entropy,

    d_j = (g (1[j = action] - p_j) + c p_j (log p_j + H)) / T,   log p_j + H = u_j - s / l

is one multiply-add and one product a logit. Programs take several tiles of rows each where there
are many rows, so that the one that adds their sums up has few of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.device_errors import mark_of
from ppo_fast.kernels._launch import (
    INTERPRETED,
    LN2,
    LOG2E,
    LOWEST,
    as_rows,
    check_grad_once,
    launch,
    next_power_of_2,
    number,
)
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._softmax import FAR
from ppo_fast.kernels._surrogate import (
    ALL,
    ILLEGAL,
    Packed,
    Prepared,
    Scalar,
    advantage_whitening,
    finish,
    prepared,
    store_sums,
    surrogate,
    ticket_for,
)
from ppo_fast.results import PPO_STATS, PPOLoss

WIDEST_GAUSSIAN = 512
"""Dimensions of an action beyond which the reference serves."""

WIDEST_HEAD = 128
"""Logits of one head beyond which it is a vocabulary."""

PROGRAMS = (4, 4) if INTERPRETED else (660, 396)
"""At most, where a thread owns a row and where it shares one: as many as 132 multiprocessors run at
once with 96 and with 168 registers a thread."""

THREADS = 128

HEADS_IN_REGISTERS = 8
"""More than these are read again for their gradient, by a loop over the heads."""

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))

OUT_OF_HEAD = tl.constexpr(2)
"""Key of `ppo_fast.device_errors.ERRORS`."""


@triton.jit
def _beside(pointers, offset):
    """The pointers moved on; None stays None."""
    moved = pointers
    if pointers is not None:
        moved = pointers + offset
    return moved


@triton.jit
def _columns(k, W: tl.constexpr):
    return (k * W + tl.arange(0, W))[None, :]


@triton.jit
def _within(rows, k, size, SIZE: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr):
    """Where tile k of a row of `size` entries has one; SIZE is that, or with RAGGED the most."""
    mask = rows[:, None]
    if RAGGED or (k + 1) * W > SIZE:
        mask = mask & (_columns(k, W) < size)
    return mask


@triton.jit
def _head(
    logits,  # [BLOCK] pointers to the rows' first logits of this head
    action_mask,  # the same, or None
    actions,  # [BLOCK] pointers
    inside,
    keep,
    inv_temperature,
    mark,
    MASKED: tl.constexpr,  # whether `keep` says more than `inside`
    size,
    SIZE: tl.constexpr,
    W: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """`(log_prob, entropy)` [BLOCK] of one head, and what its gradient takes.

    That is (t, e, 1 / l, m, action): t = u log2(e) and e = exp2(t) in tuples of [BLOCK, W] tiles,
    l = Σ e, and m the mean of t. Logits that are illegal or of a row not kept count as -inf.
    """
    action = tl.load(actions, mask=inside, other=0)
    known = (action >= 0) & (action < size)
    tl.store(mark + tl.zeros_like(action).to(tl.int32), OUT_OF_HEAD, mask=keep & (known == 0))
    action = tl.where(known, action, 0).to(tl.int32)
    taken = tl.load(logits + action, mask=inside, other=0.0).to(tl.float32)
    if action_mask is not None:
        is_legal = tl.load(action_mask + action, mask=inside, other=True)
        taken = tl.where(is_legal, taken, float("-inf"))

    xs = ()
    for k in tl.static_range((SIZE + W - 1) // W):
        is_entry = _within(inside, k, size, SIZE, W, RAGGED)
        x = tl.load(logits[:, None] + _columns(k, W), mask=is_entry, other=float("-inf"))
        x = x.to(tl.float32)
        if action_mask is not None:
            legal = tl.load(action_mask[:, None] + _columns(k, W), mask=is_entry, other=False)
            x = tl.where(legal, x, float("-inf"))
        if MASKED:
            x = tl.where(keep[:, None], x, float("-inf"))
        xs += (x,)
    largest = xs[0]
    for k in tl.static_range(1, len(xs)):
        largest = tl.maximum(largest, xs[k])
    largest = tl.maximum(tl.max(largest, 1), LOWEST)
    ts, es = (), ()
    l, m = tl.zeros_like(xs[0]), tl.zeros_like(xs[0])
    for k in tl.static_range(len(xs)):
        t = (xs[k] - largest[:, None]) * (inv_temperature * LOG2E)
        e = tl.exp2(t)
        # -inf is held off where it is multiplied by e = 0; a NaN has to come through e.
        t = tl.maximum(t, FAR)
        l += e
        m += e * t
        ts += (t,)
        es += (e,)
    l = tl.sum(l, 1)
    # At least 1, or 0 where nothing is legal, or NaN.
    l = tl.where(l < 1.0, 1.0, l)
    inv_l = 1.0 / l
    m = tl.sum(m, 1) * inv_l
    log_l = tl.log(l)
    log_prob = (taken - largest) * inv_temperature - log_l
    log_prob = tl.maximum(log_prob, ILLEGAL, propagate_nan=ALL)
    log_prob = tl.where(known, log_prob, float("nan"))
    return log_prob, log_l - m * LN2, (ts, es, inv_l, m, action)


@triton.jit
def _store_head_gradient(
    gradients,  # [BLOCK] pointers to the rows' first entries of this head
    head,  # as `_head` returns it
    g,  # [BLOCK]: n d loss / d log_prob, over the temperature
    c,  # [BLOCK]: the entropy's weight, over the temperature; or None
    inside,
    size,
    SIZE: tl.constexpr,
    W: tl.constexpr,
    RAGGED: tl.constexpr,
):
    ts, es, inv_l, m, action = head
    offset = -g * inv_l
    if c is not None:
        slope = c * LN2 * inv_l
        offset -= slope * m
    for k in tl.static_range(len(ts)):
        pull = offset[:, None]
        if c is not None:
            pull += slope[:, None] * ts[k]
        gradient = es[k] * pull
        gradient += tl.where(_columns(k, W) == action[:, None], g[:, None], 0.0)
        is_entry = _within(inside, k, size, SIZE, W, RAGGED)
        tl.store(gradients[:, None] + _columns(k, W), gradient, mask=is_entry)


@triton.jit
def _no_sums(BLOCK: tl.constexpr):
    nothing = tl.zeros((BLOCK,), tl.float32)
    return (nothing,) * 12


@triton.jit
def _added(sums, terms, entropy, keep):
    """A program's sums, lane by lane, with those of another tile of rows."""
    largest = tl.maximum(sums[9], terms[9], propagate_nan=ALL)
    total = ()
    for i in tl.static_range(9):
        total += (sums[i] + terms[i],)
    total += (largest, sums[10] + entropy, sums[11] + keep.to(tl.float32))
    return total


@triton.jit(do_not_specialize=["M", "tiles", "parts", "programs", "heads"])
def categorical_loss_kernel(
    logits,
    actions,  # [M, heads]
    action_mask,
    starts,  # [heads + 1]: the heads' first columns; None where HEADS holds them
    temperature,
    rows,
    moments,
    parts,
    numbers,
    grad_logits,  # [M, A]
    grad_values,  # [M]
    partials,
    ticket,
    mark,
    loss,
    stats,
    inv_n,
    M,
    tiles,
    programs,
    heads,
    HEADS: tl.constexpr,  # of each head: (first column, size, W); with `starts`: of the largest
    A: tl.constexpr,
    STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    shift, scale = advantage_whitening(rows, moments, parts, M, NORM, 2048)
    inv_temperature = 1.0 / number(temperature)
    MASKED: tl.constexpr = rows.mask is not None
    sums = _no_sums(BLOCK)
    for tile in range(tiles):
        at = (program.to(tl.int64) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = at < M
        keep = inside
        if rows.mask is not None:
            keep = tl.load(rows.mask + at, mask=inside, other=False)

        log_probs = tl.zeros((BLOCK,), tl.float32)
        entropy = tl.zeros((BLOCK,), tl.float32)
        row = logits + at * STRIDE
        legal = _beside(action_mask, at * MASK_STRIDE)
        if starts is None:
            # A few heads stay in registers until their gradient is known.
            kept = ()
            for i in tl.static_range(len(HEADS)):
                log_prob, h, head = _head(
                    row + HEADS[i][0],
                    _beside(legal, HEADS[i][0]),
                    actions + at * len(HEADS) + i,
                    inside,
                    keep,
                    inv_temperature,
                    mark,
                    MASKED,
                    HEADS[i][1],
                    HEADS[i][1],
                    HEADS[i][2],
                    False,
                )
                log_probs += log_prob
                entropy += h
                kept += (head,)
        else:
            for i in range(heads):
                start = tl.load(starts + i)
                size = tl.load(starts + i + 1) - start
                log_prob, h, _ = _head(
                    row + start,
                    _beside(legal, start),
                    actions + at * heads + i,
                    inside,
                    keep,
                    inv_temperature,
                    mark,
                    MASKED,
                    size,
                    HEADS[0][1],
                    HEADS[0][2],
                    True,
                )
                log_probs += log_prob
                entropy += h

        terms = surrogate(log_probs, at, inside, keep, rows, numbers, shift, scale, VF_CLIPPED, KL)
        entropy = tl.where(keep, entropy, 0.0) * terms[12]
        sums = _added(sums, terms, entropy, keep)
        if grad_values is not None:
            tl.store(grad_values + at, terms[11], mask=inside)
        if grad_logits is not None:
            g = terms[10] * inv_temperature
            c = None
            if numbers.ent_coef is not None:
                c = number(numbers.ent_coef) * terms[12] * inv_temperature
            own = grad_logits + at * A
            if starts is None:
                for i in tl.static_range(len(HEADS)):
                    _store_head_gradient(
                        own + HEADS[i][0],
                        kept[i],
                        g,
                        c,
                        inside,
                        HEADS[i][1],
                        HEADS[i][1],
                        HEADS[i][2],
                        False,
                    )
            else:
                for i in range(heads):
                    start = tl.load(starts + i)
                    size = tl.load(starts + i + 1) - start
                    _, _, head = _head(
                        row + start,
                        _beside(legal, start),
                        actions + at * heads + i,
                        inside,
                        keep,
                        inv_temperature,
                        mark,
                        MASKED,
                        size,
                        HEADS[0][1],
                        HEADS[0][2],
                        True,
                    )
                    _store_head_gradient(
                        own + start,
                        head,
                        g,
                        c,
                        inside,
                        size,
                        HEADS[0][1],
                        HEADS[0][2],
                        True,
                    )
    store_sums(partials, program, sums, sums[10], sums[11], rows, numbers)
    finish(partials, ticket, programs, numbers, loss, stats, inv_n)


@triton.jit(do_not_specialize=["M", "tiles", "parts", "programs"])
def gaussian_loss_kernel(
    mean,
    log_std,
    actions,
    rows,
    moments,
    parts,
    numbers,
    grad_mean,  # [M, A]
    grad_log_std,  # [A] or [M, A]
    grad_values,  # [M]
    log_std_partials,  # [programs, A]
    partials,
    ticket,
    loss,
    stats,
    inv_n,
    M,
    tiles,
    programs,
    A: tl.constexpr,
    W: tl.constexpr,
    MEAN_STRIDE: tl.constexpr,
    STD_STRIDE: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    SHARED: tl.constexpr,  # one log_std for all rows
    SQUASH: tl.constexpr,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    TILES: tl.constexpr = (A + W - 1) // W
    A2: tl.constexpr = triton.next_power_of_2(A)
    shift, scale = advantage_whitening(rows, moments, parts, M, NORM, 2048)
    sums = _no_sums(BLOCK)
    pulls = (tl.zeros((BLOCK, W), tl.float32),) * TILES  # of log_std, over the rows
    for tile in range(tiles):
        at = (program.to(tl.int64) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = at < M
        keep = inside
        if rows.mask is not None:
            keep = tl.load(rows.mask + at, mask=inside, other=False)

        total = tl.zeros((BLOCK, W), tl.float32)
        sum_log_std = tl.zeros((BLOCK, W), tl.float32)
        product = tl.full((BLOCK, W), 1.0, tl.float32)
        zs, inv_stds = (), ()
        for k in tl.static_range(TILES):
            column = _columns(k, W)
            is_entry = _within(inside, k, A, A, W, False)
            mu = tl.load(mean + (at * MEAN_STRIDE)[:, None] + column, mask=is_entry, other=0.0)
            u = tl.load(actions + (at * ACTION_STRIDE)[:, None] + column, mask=is_entry, other=0.0)
            s = tl.load(log_std + (at * STD_STRIDE)[:, None] + column, mask=is_entry, other=0.0)
            mu, u, s = mu.to(tl.float32), u.to(tl.float32), s.to(tl.float32)
            if rows.mask is not None:
                mu, u = tl.where(keep[:, None], mu, 0.0), tl.where(keep[:, None], u, 0.0)
                s = tl.where(keep[:, None], s, 0.0)
            inv_std = tl.exp2(-s * LOG2E)
            z = (u - mu) * inv_std
            zs += (z,)
            inv_stds += (inv_std,)
            sum_log_std += s
            total -= 0.5 * z * z
            if SQUASH:
                # 2 (log 2 - u - softplus(-2u)) = 2 (log 2 - |u| - log(1 + exp(-2 |u|))), and a sum
                # of logarithms is that of a product.
                size = tl.abs(u)
                factor = 1.0 + tl.exp2(size * (-2.0 * LOG2E))
                if (k + 1) * W > A:
                    factor = tl.where(is_entry, factor, 1.0)
                product *= factor
                total += 2.0 * size
        sum_log_std = tl.sum(sum_log_std, 1)
        if SQUASH:
            total += 2.0 * tl.log(product)
            log_probs = tl.sum(total, 1) - (sum_log_std + A * (HALF_LOG_2PI + 2.0 * LN2))
            entropy = -log_probs
        else:
            log_probs = tl.sum(total, 1) - (sum_log_std + A * HALF_LOG_2PI)
            entropy = sum_log_std + A * (HALF_LOG_2PI + 0.5)

        terms = surrogate(log_probs, at, inside, keep, rows, numbers, shift, scale, VF_CLIPPED, KL)
        entropy = tl.where(keep, entropy, 0.0) * terms[12]
        sums = _added(sums, terms, entropy, keep)
        if grad_values is not None:
            tl.store(grad_values + at, terms[11], mask=inside)
        g = terms[10]
        bonus = tl.zeros_like(g)
        if numbers.ent_coef is not None:
            bonus = number(numbers.ent_coef) * terms[12]
            if SQUASH:
                # The entropy is minus the log-prob.
                g += bonus
                bonus = tl.zeros_like(g)
        added = ()
        for k in tl.static_range(TILES):
            z = zs[k]
            entry = (at * A)[:, None] + _columns(k, W)
            is_entry = _within(inside, k, A, A, W, False)
            if grad_mean is not None:
                tl.store(grad_mean + entry, g[:, None] * z * inv_stds[k], mask=is_entry)
            if grad_log_std is not None:
                pull = (z * z - 1.0) * g[:, None] - bonus[:, None]
                if SHARED:
                    added += (pulls[k] + pull,)
                else:
                    tl.store(grad_log_std + entry, pull, mask=is_entry)
        if log_std_partials is not None:
            pulls = added

    store_sums(partials, program, sums, sums[10], sums[11], rows, numbers)
    if log_std_partials is not None:
        summed = log_std_partials + program.to(tl.int64) * A
        for k in tl.static_range(TILES):
            column = k * W + tl.arange(0, W)
            tl.store(summed + column, tl.sum(pulls[k], 0), mask=column < A)
    is_last = finish(partials, ticket, programs, numbers, loss, stats, inv_n)
    if log_std_partials is not None:
        if is_last:
            R: tl.constexpr = 8192 // A2
            every = tl.arange(0, A2)
            log_std_sums = tl.zeros((A2,), tl.float32)
            for start in range(0, programs, R):
                part = (start + tl.arange(0, R))[:, None]
                is_part = (part < programs) & (every[None, :] < A)
                place = log_std_partials + part.to(tl.int64) * A + every[None, :]
                # Past the first-level cache, as in `finish`.
                log_std_part = tl.load(place, mask=is_part, other=0.0, cache_modifier=".cg")
                log_std_sums += tl.sum(log_std_part, 0)
            tl.store(grad_log_std + every, log_std_sums, mask=every < A)


def _plan(M: int, lanes: int) -> tuple[int, int, int]:
    """`(rows in a tile, tiles in a program, programs)`; a pure function of the shape."""
    block = THREADS // lanes
    tiles = max(1, triton.cdiv(M, block * PROGRAMS[lanes > 1]))
    return block, tiles, max(1, triton.cdiv(M, block * tiles))


def _lanes(size: int, each: int) -> int:
    """Threads that share a row of `size` entries, at most about `each` entries a thread."""
    return min(32, next_power_of_2(triton.cdiv(size, each)))


def _width(size: int, lanes: int, *offsets: int) -> int:
    """Columns of a tile: a load of each lane, of as many entries as lie aligned, up to four."""
    return min(lanes * math.gcd(4, size, *offsets), next_power_of_2(size))


def _offset(x: Tensor) -> int:
    """What entries of x's rows lie apart, for `_width`; 1 where the first is not aligned."""
    return x.stride(0) if x.data_ptr() % 16 == 0 else 1


@functools.lru_cache
def _starts(columns: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(columns, dtype=torch.int32, device=device)


def _outputs(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Loss, statistics, 1 / n, and n d loss / d inputs of these sizes; unwritten."""
    shapes = (), (len(PPO_STATS),), (), *((size,) for size in sizes)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


class Totals(NamedTuple):
    """Where a loss kernel leaves what it sums over the rows; see `_surrogate.finish`.

    Several launches may share these, each with the rows that follow the next one's: each has a share
    of `partials`, and the last launch, whose share is the first, adds all up.
    """

    partials: Tensor
    """[programs, 16], of this launch and those before it"""
    log_std_partials: Tensor | None
    """[programs, A], likewise"""
    ticket: Tensor
    loss: Tensor
    stats: Tensor
    inv_n: Tensor
    programs: int
    """of all launches together"""


class Tiles(NamedTuple):
    """How many rows a program takes."""

    lanes: int
    block: int
    tiles: int
    programs: int


def tiles_of_heads(M: int, head_sizes: Sequence[int]) -> Tiles:
    """For `launch_categorical`."""
    is_few = len(head_sizes) <= HEADS_IN_REGISTERS
    lanes = _lanes(sum(head_sizes) if is_few else max(head_sizes), 24)
    return Tiles(lanes, *_plan(M, lanes))


def tiles_of_gaussian(M: int, A: int) -> Tiles:
    """For `launch_gaussian`."""
    lanes = _lanes(A, 12)
    return Tiles(lanes, *_plan(M, lanes))


def launch_categorical(
    x: Tensor,
    actions: Tensor,
    legal: Tensor | None,
    head_sizes: Sequence[int],
    temperature: Scalar | None,
    p: Prepared,
    grad_logits: Tensor | None,
    grad_values: Tensor | None,
    totals: Totals,
) -> None:
    """Launch `categorical_loss_kernel` on logits and legal actions [M, A] and actions [M, heads]."""
    M, A = x.shape
    lanes, block, tiles, programs = tiles_of_heads(M, head_sizes)
    first = [sum(head_sizes[:i]) for i in range(len(head_sizes))]
    if len(head_sizes) <= HEADS_IN_REGISTERS:
        starts = None
        heads = [
            (start, size, _width(size, lanes, start, A, _offset(x)))
            for start, size in zip(first, head_sizes, strict=True)
        ]
    else:
        starts, size = _starts((*first, A), x.device), max(head_sizes)
        heads = [(0, size, _width(size, lanes, *first, *head_sizes, _offset(x)))]
    launch(
        categorical_loss_kernel,
        (programs,),
        *(x, actions, legal, starts, temperature),
        *(p.rows, p.moments, p.parts, p.numbers, grad_logits, grad_values),
        *(totals.partials, totals.ticket, mark_of(x.device)),
        *(totals.loss, totals.stats, totals.inv_n, M, tiles, totals.programs, len(head_sizes)),
        HEADS=tuple(heads),
        A=A,
        STRIDE=x.stride(0),
        MASK_STRIDE=0 if legal is None else legal.stride(0),
        BLOCK=block,
        num_warps=THREADS // 32,
        **p.meta,
    )


def launch_gaussian(
    x: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    p: Prepared,
    grad_mean: Tensor | None,
    grad_log_std: Tensor | None,
    grad_values: Tensor | None,
    totals: Totals,
) -> None:
    """Launch `gaussian_loss_kernel` on means and actions [M, A] and log_std [M, A] or [A]."""
    M, A = x.shape
    lanes, block, tiles, programs = tiles_of_gaussian(M, A)
    is_shared = log_std.dim() == 1
    s = as_rows(log_std)
    launch(
        gaussian_loss_kernel,
        (programs,),
        *(x, s, actions, p.rows, p.moments, p.parts, p.numbers),
        *(grad_mean, grad_log_std, grad_values),
        *(totals.log_std_partials, totals.partials, totals.ticket),
        *(totals.loss, totals.stats, totals.inv_n, M, tiles, totals.programs),
        A=A,
        W=_width(A, lanes, _offset(x), _offset(actions), _offset(s)),
        MEAN_STRIDE=x.stride(0),
        STD_STRIDE=0 if is_shared else s.stride(0),
        ACTION_STRIDE=actions.stride(0),
        SHARED=is_shared,
        SQUASH=squash,
        BLOCK=block,
        num_warps=THREADS // 32,
        **p.meta,
    )


def _heads_outputs(
    logits: Tensor,
    actions: Tensor,
    head_sizes: Sequence[int],
    action_mask: Tensor | None,
    temperature: Sequence[float],
    temperature_tensor: Sequence[Tensor | None],
    wanted: Sequence[int],
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, stats, inv_n, grad_logits, grad_values = _outputs(logits, wanted)
    return loss, stats, inv_n, grad_logits, grad_values


@opaque(_heads_outputs)
def _ppo_loss_from_heads(
    logits: Tensor,
    actions: Tensor,
    head_sizes: Sequence[int],
    action_mask: Tensor | None,
    temperature: Sequence[float],
    temperature_tensor: Sequence[Tensor | None],
    wanted: Sequence[int],  # gradients by logits and by values: their number, or 0
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, stats, inv_n, grad_logits, grad_values = _outputs(logits, wanted)
    x = as_rows(logits)
    legal = None if action_mask is None else as_rows(action_mask)
    M = x.shape[0]
    p = prepared(rows, moments, numbers, tensors, vf_clipped, kl, norm_adv)
    programs = tiles_of_heads(M, head_sizes).programs
    ticket = ticket_for(loss)
    totals = Totals(loss.new_empty(programs, 16), None, ticket, loss, stats, inv_n, programs)
    (temperature_given,) = unpack(temperature, temperature_tensor)
    grads = _if_any(grad_logits), _if_any(grad_values)
    launch_categorical(x, actions, legal, head_sizes, temperature_given, p, *grads, totals)
    return loss, stats, inv_n, grad_logits, grad_values


def _gaussian_outputs(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    wanted: Sequence[int],
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, stats, inv_n, grad_mean, grad_log_std, grad_values = _outputs(mean, wanted)
    return loss, stats, inv_n, grad_mean, grad_log_std, grad_values


@opaque(_gaussian_outputs)
def _ppo_loss_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    wanted: Sequence[int],  # gradients by mean, log_std and values: their number, or 0
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, stats, inv_n, grad_mean, grad_log_std, grad_values = _outputs(mean, wanted)
    x, u = as_rows(mean), as_rows(actions)
    M, A = x.shape
    p = prepared(rows, moments, numbers, tensors, vf_clipped, kl, norm_adv)
    programs = tiles_of_gaussian(M, A).programs
    log_std_partials = None
    if log_std.dim() == 1 and wanted[1]:
        log_std_partials = loss.new_empty(programs, A)
    partials, ticket = loss.new_empty(programs, 16), ticket_for(loss)
    totals = Totals(partials, log_std_partials, ticket, loss, stats, inv_n, programs)
    grads = _if_any(grad_mean), _if_any(grad_log_std), _if_any(grad_values)
    launch_gaussian(x, log_std, u, squash, p, *grads, totals)
    return loss, stats, inv_n, grad_mean, grad_log_std, grad_values


def _if_any(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _wanted(ctx: Any, recording: bool, *inputs: Tensor | None) -> list[int]:
    """Note a Function's first inputs; the number of gradients by each, 0 where not needed."""
    ctx.inputs = [
        (x.shape, x.dtype) if recording and needed and x is not None else None
        for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    return [0 if given is None else given[0].numel() for given in ctx.inputs]


def _keep(ctx: Any, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    loss, stats, inv_n, *gradients = results
    pairs = zip(gradients, ctx.inputs, strict=True)
    ctx.save_for_backward(inv_n, *(gradient for gradient, given in pairs if given is not None))
    ctx.mark_non_differentiable(stats)
    return loss, stats


def _scaled(op: str, ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients by a Function's first inputs."""
    check_grad_once(op)
    inv_n, *gradients = ctx.saved_tensors
    scaled = iter(torch._foreach_mul(gradients, grad_loss * inv_n))
    return [
        None if given is None else next(scaled).to(given[1]).view(given[0]) for given in ctx.inputs
    ]


class _FromHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        recording: bool,
        policy: Any,
        terms: Packed,
    ) -> tuple[Tensor, Tensor]:
        wanted = _wanted(ctx, recording, logits, values)
        return _keep(ctx, _ppo_loss_from_heads(logits, *policy, wanted, *terms))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *_scaled("ppo_loss_from_logits", ctx, grad_loss), None, None, None


class _FromGaussian(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        log_std: Tensor,
        values: Tensor | None,
        recording: bool,
        actions: Tensor,
        squash: bool,
        terms: Packed,
    ) -> tuple[Tensor, Tensor]:
        wanted = _wanted(ctx, recording, mean, log_std, values)
        return _keep(ctx, _ppo_loss_from_gaussian(mean, log_std, actions, squash, wanted, *terms))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *_scaled("ppo_loss_from_gaussian", ctx, grad_loss), None, None, None, None


def loss_from_heads(
    logits: Tensor,
    actions: Tensor,
    head_sizes: tuple[int, ...],
    action_mask: Tensor | None,
    temperature: Scalar,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    """`ppo_loss_from_logits` of logits [..., A] and actions [...] or [..., heads], in one launch.

    Two where the advantages of many rows are to be whitened.
    """
    policy = (
        actions.reshape(-1).contiguous(),
        [int(size) for size in head_sizes],
        action_mask,
        *pack(temperature),
    )
    # Inside a Function it is always off.
    recording = torch.is_grad_enabled()
    return PPOLoss(*_FromHeads.apply(logits, values, recording, policy, terms))


def loss_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    """`ppo_loss_from_gaussian`, in one launch as `loss_from_heads`."""
    inputs = mean, log_std, values, torch.is_grad_enabled(), actions.detach(), squash, terms
    return PPOLoss(*_FromGaussian.apply(*inputs))
