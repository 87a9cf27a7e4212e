"""Exact KL divergence of two categorical policies in one reading of both logits, and its gradient.

With t = x - max x of the first distribution's logits and w = z - max z of the second's,

    KL = s / l - (log l - log l'),   l = Σ exp t,   l' = Σ exp w,   s = Σ exp(t) (t - w),

kept online by each thread for what it reads, as in `_softmax.py`. Shifted, not as Σ p (x - z) less a
difference of log-sum-exps, it loses nothing where the logits are far from 0.

Small vocabularies have several rows a program. For few rows the columns are cut into pieces, merged
in a fixed order by a second launch. The backward reads both logits again; rows without gradient are
written 0 unread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import LOG2E, as_rows, check_grad_once, launch, next_power_of_2
from ppo_fast.kernels._library import opaque
from ppo_fast.kernels._softmax import LOWEST, floats

PROGRAMS = 1056
"""Enough programs of four warps to fill a large GPU; with under half as many rows, columns are cut."""

FAR = tl.constexpr(-1.0e30)
"""Stands for the difference of two maxima that is -inf, where it is multiplied by a mass of 0."""

SMALL = 1024
"""Widest row that a program holds whole, with others."""


@triton.jit
def _step(m, l, m2, l2, s, x, z):
    """Take the logits x and z [K, W, VEC], float32, into the state of W lanes."""
    top = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    top2 = tl.maximum(m2, tl.max(tl.max(z, 2), 0))
    t = x - top[None, :, None]
    w = z - top2[None, :, None]
    e = tl.exp2(t * LOG2E)
    # A term of probability 0 counts nothing, whatever w is; a NaN comes through l.
    terms = tl.where(e > 0.0, e * (t - w), 0.0)
    gap = tl.maximum(m - top, FAR)
    gap2 = tl.maximum(m2 - top2, FAR)
    scale = tl.exp2(gap * LOG2E)
    s = tl.where(scale > 0.0, (s + (gap - gap2) * l) * scale, 0.0)
    s += tl.sum(tl.sum(terms, 2), 0)
    l = l * scale + tl.sum(tl.sum(e, 2), 0)
    l2 = l2 * tl.exp2(gap2 * LOG2E) + tl.sum(tl.sum(tl.exp2(w * LOG2E), 2), 0)
    return top, l, top2, l2, s


@triton.jit
def _merged(m, l, m2, l2, s):
    """The states of parts of a row together, as scalars."""
    top = tl.max(m, 0)
    top2 = tl.max(m2, 0)
    gap = tl.maximum(m - top, FAR)
    gap2 = tl.maximum(m2 - top2, FAR)
    scale = tl.exp2(gap * LOG2E)
    s = tl.sum(tl.where(scale > 0.0, (s + (gap - gap2) * l) * scale, 0.0), 0)
    return top, tl.sum(l * scale, 0), top2, tl.sum(l2 * tl.exp2(gap2 * LOG2E), 0), s


@triton.jit
def _finish(out, stats, row, m, l, m2, l2, s, inside):
    """Write the divergences of rows, and what their gradient needs: l is 0 where there is none."""
    no_terms = l < 1.0  # only where every logit is -inf, or none was read
    total = tl.where(no_terms, 1.0, l)
    mean = s / total
    value = mean - (tl.log(total) - tl.log(tl.where(l2 < 1.0, 1.0, l2)))
    kl = tl.where((value < 0.0) | no_terms, 0.0, value)
    tl.store(out + row, kl, mask=inside)
    if stats is not None:
        dead = no_terms | (value == float("inf"))
        # NaN in either makes NaN of the row's whole gradient.
        l = tl.where(dead, 0.0, tl.where(value == value, l, value))
        # Behind 2^31 / 5 rows an int32 offset would overflow.
        at = stats + row.to(tl.int64) * 5
        tl.store(at, m, mask=inside)
        tl.store(at + 1, l, mask=inside)
        tl.store(at + 2, m2, mask=inside)
        tl.store(at + 3, l2, mask=inside)
        tl.store(at + 4, mean, mask=inside)


@triton.jit(do_not_specialize=["M", "V", "mask_row"])
def kl_rows_kernel(
    first,
    second,
    mask,
    out,
    stats,  # [M, 5]: maximum, total, those of the second, mean of t - w; or None
    M,
    V,
    first_row,
    second_row,
    mask_row,
    R: tl.constexpr,
    C: tl.constexpr,  # V, rounded up to a power of two
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + row.to(tl.int64) * mask_row, mask=inside, other=False) != 0
    column = tl.arange(0, C)[None, :]
    wide = row.to(tl.int64)[:, None]
    read = keep[:, None] & (column < V)
    x = tl.load(first + wide * first_row + column, mask=read, other=float("-inf")).to(tl.float32)
    z = tl.load(second + wide * second_row + column, mask=read, other=float("-inf")).to(tl.float32)
    m = tl.maximum(tl.max(x, 1), LOWEST)
    m2 = tl.maximum(tl.max(z, 1), LOWEST)
    t = x - m[:, None]
    w = z - m2[:, None]
    e = tl.exp2(t * LOG2E)
    s = tl.sum(tl.where(e > 0.0, e * (t - w), 0.0), 1)
    l2 = tl.sum(tl.exp2(w * LOG2E), 1)
    _finish(out, stats, row, m, tl.sum(e, 1), m2, l2, s, inside)


@triton.jit
def _head(row, V, VEC: tl.constexpr, ALIKE: tl.constexpr):
    """Logits of a row before its first 16-byte boundary; 0 where the rows are not aligned alike.

    A row is read from there on, and its head after the end: position p is column (p + head) mod V.
    """
    head = 0
    if ALIKE:
        head = ((0 - row.to(tl.int64)) & 15).to(tl.int32) // (16 // VEC)
    return tl.minimum(head, V)


@triton.jit
def _body(row, head, ALIKE: tl.constexpr):
    body = row + head
    if ALIKE:
        body = tl.multiple_of(body, 16)
    return body


@triton.jit
def _tile_of(body, K: tl.constexpr, W: tl.constexpr, VEC: tl.constexpr, ALIKE: tl.constexpr):
    """K * W * VEC logits as float32 [K, W, VEC]; of the two rows in the same order."""
    if ALIKE:
        x = floats(body, K, W, VEC)
    else:
        offset = tl.arange(0, K)[:, None] * (W * VEC) + tl.arange(0, W * VEC)[None, :]
        x = tl.reshape(tl.load(body + offset).to(tl.float32), (K, W, VEC))
    return x


@triton.jit(do_not_specialize=["V", "mask_row", "piece_size"])
def kl_kernel(
    first,
    second,
    mask,
    out,
    stats,
    pieces,  # [M, number of pieces, 5]: the state of each; or None
    V,
    first_row,
    second_row,
    mask_row,
    piece_size,
    W: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    ALIKE: tl.constexpr,
):
    TILE: tl.constexpr = W * K * VEC
    row = tl.program_id(0)
    piece = tl.program_id(1)
    begin = piece * piece_size
    length = tl.minimum(V - begin, piece_size)
    if mask is not None:
        length = tl.where(tl.load(mask + row.to(tl.int64) * mask_row) != 0, length, 0)
    x_row = first + row.to(tl.int64) * first_row + begin
    z_row = second + row.to(tl.int64) * second_row + begin
    head = _head(x_row, length, VEC, ALIKE)
    x_body = _body(x_row, head, ALIKE)
    z_body = _body(z_row, head, ALIKE)

    zero = tl.zeros((W,), tl.float32)
    m, l, m2, l2, s = zero + LOWEST, zero, zero + LOWEST, zero, zero
    whole = (length - head) // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=1):
        x = _tile_of(x_body + start, K, W, VEC, ALIKE)
        z = _tile_of(z_body + start, K, W, VEC, ALIKE)
        m, l, m2, l2, s = _step(m, l, m2, l2, s, x, z)
    offset = tl.arange(0, VEC)[:, None] * W + tl.arange(0, W)[None, :]
    for start in tl.range(whole, length, W * VEC, num_stages=1):
        position = start + offset
        column = position + tl.where(position < length - head, head, head - length)
        inside = position < length
        x = tl.load(x_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.load(z_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        m, l, m2, l2, s = _step(m, l, m2, l2, s, x[:, :, None], z[:, :, None])
    m, l, m2, l2, s = _merged(m, l, m2, l2, s)

    if pieces is None:
        _finish(out, stats, row, m, l, m2, l2, s, row >= 0)
    else:
        at = pieces + (row.to(tl.int64) * tl.num_programs(1) + piece) * 5
        tl.store(at, m)
        tl.store(at + 1, l)
        tl.store(at + 2, m2)
        tl.store(at + 3, l2)
        tl.store(at + 4, s)


@triton.jit(do_not_specialize=["number"])
def kl_merge_kernel(pieces, out, stats, number, PIECES: tl.constexpr):
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES)
    at = pieces + row.to(tl.int64) * number * 5 + piece * 5
    inside = piece < number
    m, l, m2, l2, s = _merged(
        tl.load(at, mask=inside, other=LOWEST),
        tl.load(at + 1, mask=inside, other=0.0),
        tl.load(at + 2, mask=inside, other=LOWEST),
        tl.load(at + 3, mask=inside, other=0.0),
        tl.load(at + 4, mask=inside, other=0.0),
    )
    _finish(out, stats, row, m, l, m2, l2, s, row >= 0)


@triton.jit
def _gradient(x, z, m, l, m2, l2, mean, g, FORWARD: tl.constexpr):
    """Gradient entries from the logits x and z; l and m are of the first distribution.

    forward: p (t - w - mean) g;  reverse, with the second distribution p: (p - q) g.
    """
    if FORWARD:
        t = x - m
        e = tl.exp2(t * LOG2E)
        # Where e is 0 a w of -inf is harmless.
        value = tl.where(e == 0.0, 0.0, e * ((t - (z - m2)) - mean)) * (g / l)
    else:
        value = tl.exp2((x - m2) * LOG2E) * (g / l2) - tl.exp2((z - m) * LOG2E) * (g / l)
    return value


@triton.jit(do_not_specialize=["M", "V", "upstream_row"])
def kl_rows_backward_kernel(
    logits,
    ref_logits,
    stats,
    upstream,
    gradient,
    M,
    V,
    logits_row,
    ref_row,
    upstream_row,
    FORWARD: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < M
    wide = row.to(tl.int64)
    g = tl.load(upstream + wide * upstream_row, mask=inside, other=0.0).to(tl.float32)
    at = stats + wide * 5
    l = tl.load(at + 1, mask=inside, other=0.0)
    active = (g != 0.0) & (l != 0.0)
    m = tl.load(at, mask=active, other=0.0)[:, None]
    m2 = tl.load(at + 2, mask=active, other=0.0)[:, None]
    l2 = tl.load(at + 3, mask=active, other=1.0)[:, None]
    mean = tl.load(at + 4, mask=active, other=0.0)[:, None]
    l = tl.where(active, l, 1.0)[:, None]
    g = g[:, None]
    column = tl.arange(0, C)[None, :]
    wide = wide[:, None]
    written = inside[:, None] & (column < V)
    read = active[:, None] & (column < V)
    x = tl.load(logits + wide * logits_row + column, mask=read, other=0.0).to(tl.float32)
    z = tl.load(ref_logits + wide * ref_row + column, mask=read, other=0.0).to(tl.float32)
    value = tl.where(read, _gradient(x, z, m, l, m2, l2, mean, g, FORWARD), 0.0)
    to = gradient + wide * V + column
    tl.store(to, value.to(gradient.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["V", "upstream_row"])
def kl_backward_kernel(
    logits,
    ref_logits,
    stats,
    upstream,
    gradient,
    V,
    logits_row,
    ref_row,
    gradient_row,
    upstream_row,
    FORWARD: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    ALIKE: tl.constexpr,
):
    TILE: tl.constexpr = W * K * VEC
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    g = tl.load(upstream + row * upstream_row).to(tl.float32)
    saved = stats + row * 5
    m = tl.load(saved)
    l = tl.load(saved + 1)
    m2 = tl.load(saved + 2)
    l2 = tl.load(saved + 3)
    mean = tl.load(saved + 4)
    active = (g != 0.0) & (l != 0.0)

    x_row = logits + row * logits_row
    z_row = ref_logits + row * ref_row
    to_row = gradient + row * gradient_row
    head = _head(x_row, V, VEC, ALIKE)
    x_body = _body(x_row, head, ALIKE) + start
    z_body = _body(z_row, head, ALIKE) + start
    to_body = _body(to_row, head, ALIKE) + start
    offset = tl.arange(0, K)[:, None] * (W * VEC) + tl.arange(0, W * VEC)[None, :]
    if start + TILE <= V - head:
        value = tl.zeros((K, W * VEC), tl.float32)
        if active:
            x = tl.load(x_body + offset).to(tl.float32)
            z = tl.load(z_body + offset).to(tl.float32)
            value = _gradient(x, z, m, l, m2, l2, mean, g, FORWARD)
        tl.store(to_body + offset, value.to(gradient.dtype.element_ty))
    else:
        position = start + offset
        column = position + tl.where(position < V - head, head, head - V)
        read = position < tl.where(active, V, 0)
        x = tl.load(x_row + column, mask=read, other=0.0).to(tl.float32)
        z = tl.load(z_row + column, mask=read, other=0.0).to(tl.float32)
        value = tl.where(active, _gradient(x, z, m, l, m2, l2, mean, g, FORWARD), 0.0)
        tl.store(to_row + column, value.to(gradient.dtype.element_ty), mask=position < V)


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "forward",
    mask: Tensor | None = None,
) -> Tensor:
    """See `ppo_fast.functional.kl.kl_from_logits`."""
    forward = direction == "forward"
    if logits.requires_grad and torch.is_grad_enabled():
        return _KL.apply(logits, ref_logits, forward, mask)
    return _kl(logits, ref_logits, mask, forward, False)[0]


def _unsupported(logits: Tensor, ref_logits: Tensor, **kwargs: object) -> str | None:
    if torch.float64 in (logits.dtype, ref_logits.dtype):
        return "float64 tensors run on the reference"
    return None


kl_from_logits.unsupported = _unsupported  # type: ignore[attr-defined]


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, forward: bool, mask: Tensor | None
    ) -> Tensor:
        kl, stats = _kl(logits, ref_logits, mask, forward, True)
        ctx.forward_direction = forward
        ctx.save_for_backward(logits, ref_logits, stats)
        return kl

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        check_grad_once("kl_from_logits")
        gradient = _kl_backward(*ctx.saved_tensors, g, ctx.forward_direction)
        return gradient, None, None, None


def _tile(*logits: Tensor) -> dict[str, Any]:
    """Lanes, 16-byte loads per lane, logits in each; and whether all rows' boundaries coincide."""
    size = min(x.element_size() for x in logits)
    alike = len({(x.element_size(), x.data_ptr() % 16) for x in logits}) == 1
    alike = alike and len({x.stride(0) * size % 16 for x in logits}) == 1
    VEC = 16 // size
    return {"W": 128, "K": 16 // VEC, "VEC": VEC, "ALIKE": alike, "num_warps": 4}


def _rows_tile(M: int, V: int) -> dict[str, int]:
    """Rows a program and their width: few rows a program where there are few."""
    C = next_power_of_2(V)
    elements = 2048 if M * C >= 1 << 21 else 512
    return {"R": max(1, elements // C), "C": C, "num_warps": 4}


def _outputs(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, forward: bool, with_stats: bool
) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    kl = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return kl, kl.new_empty(shape.numel() if with_stats else 0, 5)


@opaque(_outputs)
def _kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, forward: bool, with_stats: bool
) -> tuple[Tensor, Tensor]:
    kl, stats = _outputs(logits, ref_logits, mask, forward, with_stats)
    pair = as_rows(logits), as_rows(ref_logits)
    first, second = pair if forward else pair[::-1]
    M, V = first.shape
    saved = stats if with_stats else None
    kept, kept_row = None, 0
    if mask is not None:
        kept = mask.reshape(-1)
        kept_row = kept.stride(0)
    rows = first.stride(0), second.stride(0), kept_row
    if V <= SMALL:
        tile = _rows_tile(M, V)
        grid = (triton.cdiv(M, tile["R"]),)
        launch(kl_rows_kernel, grid, first, second, kept, kl, saved, M, V, *rows, **tile)
        return kl, stats

    tile = _tile(first, second)
    size = tile["W"] * tile["K"] * tile["VEC"]
    number = 1
    if 0 < M * 2 <= PROGRAMS:
        number = min(triton.cdiv(V, 2 * size), triton.cdiv(PROGRAMS, M))
    piece_size = triton.cdiv(triton.cdiv(V, number), size) * size
    number = triton.cdiv(V, piece_size)
    pieces = kl.new_empty(M, number, 5) if number > 1 else None
    args = (first, second, kept, kl, saved, pieces, V, *rows, piece_size)
    launch(kl_kernel, (M, number), *args, **tile)
    if number > 1:
        PIECES = next_power_of_2(number)
        launch(kl_merge_kernel, (M,), pieces, kl, saved, number, PIECES=PIECES, num_warps=1)
    return kl, stats


def _like(
    logits: Tensor, ref_logits: Tensor, stats: Tensor, upstream: Tensor, forward: bool
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@opaque(_like)
def _kl_backward(
    logits: Tensor, ref_logits: Tensor, stats: Tensor, upstream: Tensor, forward: bool
) -> Tensor:
    gradient = _like(logits, ref_logits, stats, upstream, forward)
    x, z, to = as_rows(logits), as_rows(ref_logits), as_rows(gradient)
    M, V = x.shape
    g = upstream.reshape(-1)
    tensors = x, z, stats, g, gradient
    if V <= SMALL:
        tile = _rows_tile(M, V)
        grid = (triton.cdiv(M, tile["R"]),)
        args = (*tensors, M, V, x.stride(0), z.stride(0), g.stride(0))
        launch(kl_rows_backward_kernel, grid, *args, FORWARD=forward, **tile)
        return gradient
    tile = _tile(x, z, to)
    grid = (M, triton.cdiv(V, tile["W"] * tile["K"] * tile["VEC"]))
    rows = x.stride(0), z.stride(0), to.stride(0), g.stride(0)
    launch(kl_backward_kernel, grid, *tensors, V, *rows, FORWARD=forward, **tile)
    return gradient
