"""The PPO loss straight from the logits of a large vocabulary: one launch, one gradient buffer.

A program takes a row at a time: it reads it to the three numbers of `_softmax.py`, does the PPO
mathematics of that one log-prob, and reads the row again, from its end, to write the gradient. Not
more programs are started than rows fit the L2 cache together, so the second reading should not
reach memory: one read and one write of the logits in all. Short rows are held whole, several to a
program.

The gradient is written already divided by n, and the backward pass multiplies it in place only if
the upstream gradient is not 1, which the device decides: usually it costs nothing. A backward that
retains the graph pays for a second buffer. float16 gradients
are divided in the backward pass instead, as 1/n would take the smaller ones below float16's range
where a loss scaler cannot bring them back.

Rows masked out, and rows without gradient (clipped ones, if there is no entropy bonus), are not read
a second time, and masked ones not a first time either.
"""

from __future__ import annotations

import math
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
    aligned,
    entropy_of,
    floats,
    log_prob_of,
    softmax_gradient,
    softmax_merged,
    softmax_of_row,
    softmax_of_tile,
    softmax_start,
    softmax_step,
)
from ppo_fast.kernels._surrogate import (
    ALL,
    ILLEGAL,
    WHITEN_IN_PLACE_ROWS,
    Packed,
    Scalar,
    advantage_whitening,
    finish,
    prepared,
    sums_of,
    sums_together,
    surrogate,
    ticket_for,
)
from ppo_fast.results import PPO_STATS, PPOLoss

PROGRAMS = 132
"""Multiprocessors of the GPU the tiles are chosen for. No GPU is asked for its own number: with the
same shape the same programs sum the same rows, and results repeat bitwise."""


SHORT = 1024
"""Rows of at most this many logits are held whole, several to a program, and read once."""

TILE = 1024
"""Logits of a tile of short rows, at least: it has no fewer than two of them."""


STRIDES = ("logits_b", "logits_t", "legal_b", "legal_t", "gradient_t")


@triton.jit
def _count(mask, M, BLOCK: tl.constexpr):
    """How many of M rows are unmasked."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        total += (tl.load(mask + start + offset, mask=start + offset < M, other=0) != 0).to(
            tl.int32
        )
    return tl.sum(total, 0)


@triton.jit
def _scaling(rows, numbers, count, M, BLOCK: tl.constexpr):
    """1/n, and 1 for n = 0, as `finish` has it."""
    if numbers.normalizer is not None:
        n = number(numbers.normalizer)
    elif rows.mask is None:
        n = M.to(tl.float32)
    elif count is not None:
        n = tl.load(count).to(tl.float32)
    else:
        n = _count(rows.mask, M, BLOCK).to(tl.float32)
    return 1.0 / tl.where(n == 0.0, 1.0, n)


@triton.jit
def _loaded(row, legal, column, V, TAIL: tl.constexpr):
    """Logits of a row at `column` as float32, -inf where illegal or beyond V."""
    if TAIL:
        inside = column < V
        x = tl.load(row + column, mask=inside, other=float("-inf")).to(tl.float32)
        if legal is not None:
            inside = tl.load(legal + column, mask=inside, other=False) != 0
            x = tl.where(inside, x, float("-inf"))
    else:
        x = tl.load(row + column).to(tl.float32)
        if legal is not None:
            x = tl.where(tl.load(legal + column) != 0, x, float("-inf"))
    return x


@triton.jit
def _softmax_of_plain_row(row, legal, V, c, W: tl.constexpr, VEC: tl.constexpr):
    """`softmax_of_row` without a shift to the 16-byte boundary, and with illegal actions."""
    TILE: tl.constexpr = W * VEC
    offset = tl.arange(0, TILE)
    m, l, s = softmax_start(W)
    whole = V // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=1):
        x = _loaded(row, legal, start + offset, V, False)
        m, l, s = softmax_step(m, l, s, tl.reshape(x, (1, W, VEC)), c, True)
    for start in tl.range(whole, V, TILE, num_stages=1):
        x = _loaded(row, legal, start + offset, V, True)
        m, l, s = softmax_step(m, l, s, tl.reshape(x, (1, W, VEC)), c, True)
    return softmax_merged(m, l, s, c, True, 0)


@triton.jit
def _coefficients(g, weight, l, s, early, temperature, numbers):
    """`(offset, slope, peak, active)` of rows, or of one, from g = n d loss / d log-prob.

    Their gradient is exp2(t) (offset + slope t) + peak 1[j = action], or all 0 unless active.
    """
    total = tl.where(l < 1.0, 1.0, l)
    peak = g * early / temperature
    active = peak != 0.0  # NaN, too
    if numbers.ent_coef is not None:
        pull = number(numbers.ent_coef) * weight * early / temperature
        active = active | (pull != 0.0)
        offset = -(peak + pull * (s / total * LN2)) / total
        slope = pull * LN2 / total
    else:
        offset = -peak / total
        slope = offset
    return offset, slope, peak, active


@triton.jit
def _sweep_back(
    row,
    out,
    V,
    m,
    c,
    offset,
    slope,
    ENTROPY: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
):
    """Write a row's gradient, its last columns first: the first sweep read them last."""
    TILE: tl.constexpr = K * W * VEC
    REST: tl.constexpr = W * VEC
    head, body = aligned(row, V, VEC)
    target = tl.multiple_of(out + head, 16)
    whole = (V - head) // TILE * TILE
    lane = tl.arange(0, VEC)[:, None] * W + tl.arange(0, W)[None, :]
    for start in tl.range(whole, V, REST, num_stages=1):
        position = start + lane
        column = position + tl.where(position < V - head, head, head - V)
        inside = position < V
        x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        dx = softmax_gradient(x, m, c, offset, slope, ENTROPY)
        tl.store(out + column, dx.to(out.dtype.element_ty), mask=inside)
    tile = tl.arange(0, K)[:, None] * (W * VEC) + tl.arange(0, W * VEC)[None, :]
    for step in tl.range(0, whole, TILE, num_stages=1):
        start = whole - TILE - step
        x = floats(body + start, K, W, VEC, "evict_first")
        dx = tl.reshape(softmax_gradient(x, m, c, offset, slope, ENTROPY), (K, W * VEC))
        tl.store(target + start + tile, dx.to(out.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def _sweep_plain(
    row,
    legal,
    out,
    V,
    m,
    c,
    offset,
    slope,
    ENTROPY: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
):
    """`_sweep_back` for rows that lie other than their gradient, or have illegal actions."""
    TILE: tl.constexpr = W * VEC
    lane = tl.arange(0, TILE)
    whole = V // TILE * TILE
    for start in tl.range(whole, V, TILE, num_stages=1):
        column = start + lane
        x = _loaded(row, legal, column, V, True)
        dx = softmax_gradient(x, m, c, offset, slope, ENTROPY)
        tl.store(out + column, dx.to(out.dtype.element_ty), mask=column < V)
    for step in tl.range(0, whole, TILE, num_stages=1):
        column = whole - TILE - step + lane
        x = _loaded(row, legal, column, V, False)
        dx = softmax_gradient(x, m, c, offset, slope, ENTROPY)
        tl.store(out + column, dx.to(out.dtype.element_ty))


@triton.jit
def _write_zeros(out, V, W: tl.constexpr, VEC: tl.constexpr):
    TILE: tl.constexpr = W * VEC
    head, body = aligned(out, V, VEC)
    lane = tl.arange(0, TILE)
    zero = tl.zeros((TILE,), out.dtype.element_ty)
    whole = (V - head) // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=1):
        tl.store(body + start + lane, zero)
    for start in tl.range(whole, V, TILE, num_stages=1):
        position = start + lane
        column = position + tl.where(position < V - head, head, head - V)
        tl.store(out + column, zero, mask=position < V)


@triton.jit(do_not_specialize=["parts", "M", "V", "T", "programs"])
def vocabulary_loss_kernel(
    logits,
    actions,  # [M], any integers
    legal,  # bool, as the logits; or None
    rows,
    moments,
    parts,
    numbers,
    temperature,
    count,  # [], of unmasked rows; or None
    gradient,  # [M, V], or None
    value_gradient,  # [M]: n d loss / d values
    partials,
    ticket,
    loss,
    stats,
    inv_n,
    mark,
    M,
    V,
    T,
    programs,
    logits_b,
    logits_t,
    legal_b,
    legal_t,
    gradient_t,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,  # the gradient is not divided by n
    PLAIN: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
):
    BLOCK: tl.constexpr = W * 2
    ENTROPY: tl.constexpr = numbers.ent_coef is not None
    # The row is to outlive, in the L2 cache, gradients and rows that are done with.
    POLICY: tl.constexpr = "" if gradient is None else "evict_last"
    program = tl.program_id(0)
    shift, scale = advantage_whitening(rows, moments, parts, M, NORM, BLOCK)
    temperature = number(temperature)
    c = LOG2E / temperature
    early = 1.0
    if gradient is not None:
        if not LATE:
            early = _scaling(rows, numbers, count, M, BLOCK)
    totals = tl.zeros((16,), tl.float32)
    for step in tl.range(0, M - program, programs, num_stages=1):
        index = program + step
        wide = index.to(tl.int64)
        row = logits + row_offset(index, T, logits_b, logits_t)
        kept = index < M
        if rows.mask is not None:
            kept = tl.load(rows.mask + wide) != 0
        action = tl.load(actions + wide).to(tl.int64)
        known = kept & (action >= 0) & (action < V)
        taken = tl.load(row + action, mask=known, other=float("nan")).to(tl.float32)
        tl.store(mark, 2, mask=kept & (known == 0))
        length = tl.where(kept, V, 0)
        if PLAIN:
            own_legal = None
            if legal is not None:
                own_legal = legal + row_offset(index, T, legal_b, legal_t)
                allowed = tl.load(own_legal + action, mask=known, other=True) != 0
                taken = tl.where(allowed, taken, float("-inf"))
            m, l, s = _softmax_of_plain_row(row, own_legal, length, c, W, VEC)
        else:
            m, l, s = softmax_of_row(row, length, c, K, W, VEC, True, POLICY)

        at = wide + tl.arange(0, 1)
        keep = (at >= 0) & kept
        log_prob = tl.maximum(log_prob_of(taken, m, l, temperature), ILLEGAL, propagate_nan=ALL)
        log_prob = tl.where(keep, log_prob, 0.0)
        terms = surrogate(log_prob, at, at < M, keep, rows, numbers, shift, scale, VF_CLIPPED, KL)
        entropy = tl.where(keep, entropy_of(l, s), 0.0) * terms[12]
        totals = sums_together(totals, sums_of(terms, entropy, keep, rows, numbers))
        if rows.new_values is not None:
            tl.store(value_gradient + at, terms[11])

        if gradient is not None:
            out = gradient + wide * gradient_t
            g, weight = tl.sum(terms[10], 0), tl.sum(terms[12], 0)
            offset, slope, peak, active = _coefficients(
                g, weight, l, s, early, temperature, numbers
            )
            if kept & active:
                if PLAIN:
                    _sweep_plain(row, own_legal, out, V, m, c, offset, slope, ENTROPY, W, VEC)
                else:
                    _sweep_back(row, out, V, m, c, offset, slope, ENTROPY, K, W, VEC)
                # Over what another thread wrote.
                tl.debug_barrier()
                peak += softmax_gradient(taken, m, c, offset, slope, ENTROPY)
                tl.store(out + action, peak.to(out.dtype.element_ty), mask=known)
            else:
                _write_zeros(out, V, W, VEC)
    tl.store(partials + program.to(tl.int64) * 16 + tl.arange(0, 16), totals)
    finish(partials, ticket, programs, numbers, loss, stats, inv_n, 256 if W >= 128 else 2 * W)


@triton.jit(do_not_specialize=["parts", "M", "V", "T", "programs", *STRIDES])
def vocabulary_tile_kernel(
    logits,
    actions,
    legal,
    rows,
    moments,
    parts,
    numbers,
    temperature,
    count,
    gradient,
    value_gradient,
    partials,
    ticket,
    loss,
    stats,
    inv_n,
    mark,
    M,
    V,
    T,
    programs,
    logits_b,
    logits_t,
    legal_b,
    legal_t,
    gradient_t,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    R: tl.constexpr,
    V2: tl.constexpr,  # V, rounded up to a power of two
    VEC: tl.constexpr,  # divides V, all strides and where the first rows lie
):
    """`vocabulary_loss_kernel` for rows so short that a program holds R of them whole."""
    BLOCK: tl.constexpr = 256
    BYTES: tl.constexpr = VEC * (logits.dtype.element_ty.primitive_bitwidth // 8)
    program = tl.program_id(0)
    shift, scale = advantage_whitening(rows, moments, parts, M, NORM, BLOCK)
    temperature = number(temperature)
    c = LOG2E / temperature
    early = 1.0
    if gradient is not None:
        if not LATE:
            early = _scaling(rows, numbers, count, M, BLOCK)
    column = tl.arange(0, V2)[None, :]
    is_logit = column < V // VEC * VEC  # V, and known to be a multiple
    totals = tl.zeros((16,), tl.float32)
    for step in tl.range(0, M - program * R, programs * R, num_stages=1):
        index = program * R + step + tl.arange(0, R)
        at = index.to(tl.int64)
        inside = index < M
        keep = inside
        if rows.mask is not None:
            keep = tl.load(rows.mask + at, mask=inside, other=False) != 0
        action = tl.load(actions + at, mask=keep, other=0).to(tl.int64)
        known = keep & (action >= 0) & (action < V)
        tl.store(mark + index * 0, 2, mask=keep & (known == 0))
        row = tl.multiple_of(logits + row_offset(index, T, logits_b, logits_t), BYTES)
        taken = tl.load(row + action, mask=known, other=float("nan")).to(tl.float32)
        read = keep[:, None] & is_logit
        x = tl.load(row[:, None] + column, mask=read, other=float("-inf")).to(tl.float32)
        if legal is not None:
            own = tl.multiple_of(legal + row_offset(index, T, legal_b, legal_t), VEC)
            allowed = tl.load(own + action, mask=known, other=True) != 0
            taken = tl.where(allowed, taken, float("-inf"))
            x = tl.where(tl.load(own[:, None] + column, mask=read, other=0) != 0, x, float("-inf"))
        m, l, s = softmax_of_tile(x, c, True)

        log_prob = tl.maximum(log_prob_of(taken, m, l, temperature), ILLEGAL, propagate_nan=ALL)
        log_prob = tl.where(keep, log_prob, 0.0)
        terms = surrogate(log_prob, at, inside, keep, rows, numbers, shift, scale, VF_CLIPPED, KL)
        entropy = tl.where(keep, entropy_of(l, s), 0.0) * terms[12]
        totals = sums_together(totals, sums_of(terms, entropy, keep, rows, numbers))
        if rows.new_values is not None:
            tl.store(value_gradient + at, terms[11], mask=inside)

        if gradient is not None:
            offset, slope, peak, active = _coefficients(
                terms[10], terms[12], l, s, early, temperature, numbers
            )
            dx = softmax_gradient(
                x, m[:, None], c, offset[:, None], slope[:, None], numbers.ent_coef is not None
            )
            dx += tl.where(column == action[:, None], peak[:, None], 0.0)
            dx = tl.where((keep & active)[:, None], dx, 0.0)
            out = gradient + tl.multiple_of(at * gradient_t, VEC)[:, None] + column
            tl.store(out, dx.to(gradient.dtype.element_ty), mask=inside[:, None] & is_logit)
    tl.store(partials + program.to(tl.int64) * 16 + tl.arange(0, 16), totals)
    finish(partials, ticket, programs, numbers, loss, stats, inv_n, 128)


@triton.jit(do_not_specialize=["N", "programs"])
def rescale_kernel(gradient, upstream, inv_n, N, programs, BLOCK: tl.constexpr):
    """Multiply N entries by `upstream` and `inv_n` (None is 1) in place, unless that is 1."""
    factor = number(upstream)
    if inv_n is not None:
        factor *= tl.load(inv_n)
    end = tl.where(factor == 1.0, 0, N).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = programs.to(tl.int64) * BLOCK
    whole = end // BLOCK * BLOCK
    for start in tl.range(first, whole, step, num_stages=1):
        at = gradient + start + offset
        x = tl.load(at).to(tl.float32) * factor
        tl.store(at, x.to(gradient.dtype.element_ty))
    at = gradient + whole + offset
    rest = (whole + offset < end) & (tl.program_id(0) == 0)
    x = tl.load(at, mask=rest, other=0.0).to(tl.float32) * factor
    tl.store(at, x.to(gradient.dtype.element_ty), mask=rest)


def _short(V: int) -> dict[str, int]:
    """Tile and number of programs for rows of V logits that a program holds whole."""
    V2 = next_power_of_2(V)
    tile = {"R": max(2, TILE // V2), "V2": V2, "num_warps": 2, "maxnreg": 128}
    return {"programs": 8 * PROGRAMS} | tile


def _tile(V: int, itemsize: int) -> dict[str, int]:
    """Tile and number of programs for rows of V logits; a pure function of the shape.

    One program per multiprocessor for the longest rows, up to 8 where 40 of 50 MB of L2 cache hold
    a row of each. 16 warps per multiprocessor in all, with 64 bytes a thread under way and 128
    registers for each: then all programs run at once, and none waits for another's rows.
    """
    size = V * itemsize
    each = 1
    while each < 8 and 2 * each * PROGRAMS * size <= 40 << 20:
        each *= 2
    num_warps = 16 // each
    tile = {"K": 4 if size > 1 << 13 else 2, "W": 32 * num_warps, "VEC": 16 // itemsize}
    # Left alone the compiler stops at 64 registers, where the PPO terms spill.
    return {"programs": each * PROGRAMS, "num_warps": num_warps, "maxnreg": 128} | tile


def _outputs(
    logits: Tensor,
    actions: Tensor,
    legal: Tensor | None,
    scale: Sequence[float],
    scales: Sequence[Tensor | None],
    wanted: bool,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=torch.float32)
    gradient = logits.new_empty((0,))
    if wanted:
        gradient = logits.new_empty_strided(logits.shape, _gradient_strides(logits))
    value_gradient = loss.new_empty(actions.numel() if rows[2] is not None else 0)
    return loss, loss.new_empty(len(PPO_STATS)), loss.new_empty(()), gradient, value_gradient


def _gradient_strides(logits: Tensor) -> list[int]:
    """Dense, but for as little padding of the rows as lets them lie like the logits' to 16 bytes."""
    V, vec = logits.shape[-1], 16 // logits.element_size()
    row = logits.stride(-2) if logits.dim() > 1 and logits.stride(-1) == 1 else V
    strides, step = [1], V + (row - V) % vec
    for size in reversed(logits.shape[:-1]):
        strides.insert(0, step)
        step *= size
    return strides


@opaque(_outputs)
def _vocabulary_loss(
    logits: Tensor,
    actions: Tensor,
    legal: Tensor | None,
    scale: Sequence[float],
    scales: Sequence[Tensor | None],
    wanted: bool,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (temperature,) = unpack(scale, scales)
    options = moments, numbers, tensors, vf_clipped, kl, norm_adv
    results = _outputs(logits, actions, legal, scale, scales, wanted, rows, *options)
    loss, stats, inv_n, gradient, value_gradient = results
    M, V = actions.numel(), logits.shape[-1]
    p = prepared(rows, *options)
    count = None
    if p.rows.mask is not None and M > WHITEN_IN_PLACE_ROWS:
        count = p.rows.mask.sum()
    logits = _by_rows(logits)
    B, T, logits_strides = rows_of(logits)
    legal_strides = (0, 0)
    if legal is not None:
        legal = _by_rows(legal)
        if rows_of(legal)[:2] != (B, T):
            legal = legal.contiguous()
        legal = legal.reshape(B, T, V)
        legal_strides = legal.stride()[:2]
    out = gradient.view(B, T, V) if wanted else None
    strides = *logits_strides, *legal_strides, 0 if out is None else out.stride(1)
    if V <= SHORT:
        kernel, meta = vocabulary_tile_kernel, _short(V)
        places = (
            logits.data_ptr() // logits.element_size(),
            0 if legal is None else legal.data_ptr(),
        )
        meta["VEC"] = math.gcd(16 // logits.element_size(), V, *strides, *places)
    else:
        kernel, meta = vocabulary_loss_kernel, _tile(V, logits.element_size())
        alike = out is None or _alike(logits, (B, T), logits_strides, out)
        meta["PLAIN"] = legal is not None or not alike
    programs = max(1, min(triton.cdiv(M, meta.get("R", 1)), meta.pop("programs")))
    launch(
        kernel,
        (programs,),
        *(logits, actions, legal, p.rows, p.moments, p.parts, p.numbers, temperature, count),
        *(out, value_gradient, loss.new_empty(programs, 16), ticket_for(loss)),
        *(loss, stats, inv_n, mark_of(logits.device), M, V, T, programs),
        *strides,
        LATE=logits.dtype == torch.float16,
        **meta,
        **p.meta,
    )
    return results


def _by_rows(x: Tensor) -> Tensor:
    """[..., V] with a contiguous last dimension and rows two strides apart; one copy if need be."""
    if x.stride(-1) != 1 or len(leading(x)) > 2:
        x = x.contiguous()
    return x


def _alike(logits: Tensor, sizes: tuple[int, int], strides: tuple[int, int], out: Tensor) -> bool:
    """Whether each row of the logits lies as that of `out` [B, T, V] does, to 16 bytes."""
    apart = logits.data_ptr() - out.data_ptr()
    for size, mine, other in zip(sizes, strides, out.stride()[:2], strict=True):
        if size > 1:
            apart |= (mine - other) * logits.element_size()
    return apart % 16 == 0


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        actions: Tensor,
        legal: Tensor | None,
        temperature: Scalar,
        wanted: bool,
        terms: Packed,
    ) -> tuple[Tensor, Tensor]:
        results = _vocabulary_loss(logits, actions, legal, *pack(temperature), wanted, *terms)
        loss, stats, inv_n, gradient, value_gradient = results
        ctx.save_for_backward(inv_n, gradient, value_gradient)
        ctx.values = None if values is None else (values.shape, values.dtype)
        ctx.address = None if torch.compiler.is_compiling() else gradient.data_ptr()
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        check_grad_once("ppo_loss_from_logits")
        inv_n, gradient, value_gradient = ctx.saved_tensors
        late = inv_n if gradient.dtype == torch.float16 else None
        for_logits = for_values = None
        if ctx.needs_input_grad[0]:
            if _may_take_over(gradient, ctx.address):
                for_logits = _rescale(gradient, grad_loss, late)
            else:
                for_logits = gradient * (grad_loss if late is None else grad_loss * late)
        if ctx.values is not None and ctx.needs_input_grad[1]:
            shape, dtype = ctx.values
            for_values = (value_gradient * (grad_loss * inv_n)).to(dtype).view(shape)
        return for_logits, for_values, None, None, None, None, None


def _may_take_over(gradient: Tensor, address: int | None) -> bool:
    """Whether a backward may hand over the saved buffer itself, scaled in place.

    Not while a graph is traced, nor if the graph is kept for another backward (retain_graph), nor if
    a saved-tensor hook brought the gradient back in memory of its own.
    """
    if torch.compiler.is_compiling() or gradient.data_ptr() != address:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _rescale(gradient: Tensor, upstream: Tensor, inv_n: Tensor | None) -> Tensor:
    """`gradient` times the upstream gradient, in place."""
    # From the first entry to the last, padding included.
    N, BLOCK = gradient.untyped_storage().nbytes() // gradient.element_size(), 4096
    programs = min(triton.cdiv(N, BLOCK), 8 * PROGRAMS)
    args = gradient, upstream, inv_n, N, programs
    launch(rescale_kernel, (programs,), *args, BLOCK=BLOCK, num_warps=8)
    return gradient


def loss_from_vocabulary(
    logits: Tensor,
    actions: Tensor,
    action_mask: Tensor | None,
    temperature: Scalar,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    """`ppo_loss_from_logits` of one head [..., V]."""
    wanted = logits.requires_grad and torch.is_grad_enabled()
    # reshape leaves a vector as it lies, which may be strided.
    args = actions.reshape(-1).contiguous(), action_mask, temperature, wanted, terms
    return PPOLoss(*_VocabularyLoss.apply(logits, values, *args))
