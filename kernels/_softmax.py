"""One softmax a row, reduced to three numbers in a single reading: for any number of columns.

With c = log2(e) / T and t = (x - m) c, logits come down to

    m = max x,   l = Σ exp2(t),   s = Σ exp2(t) t,

all that log-probability, entropy and gradient need. Two sets together are rescaled to the larger
maximum, so a row may be read in any pieces: online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867), with the sum of the shifted logits beside it so that the entropy does not cancel,
however far the logits are from 0.

A thread reads 16 bytes at a time and keeps its own (m, l, s): nothing crosses lanes until the row
ends. Logits of -inf count nothing, also where there is nothing else: l is then 0 and m finite. NaN
and +inf make l NaN.
"""

import triton
import triton.language as tl

from ppo_fast.kernels._launch import LN2, LOWEST

FAR = tl.constexpr(-1.0e4)
"""Stands for t = -inf where it is multiplied by exp2(t): both give 0, but 0 * -inf is NaN."""

NO_POLICY = tl.constexpr("")
"""The eviction policy of plain loads."""


@triton.jit
def softmax_start(W: tl.constexpr):
    """(m, l, s) of no logits, for W lanes."""
    zero = tl.zeros((W,), tl.float32)
    return zero + LOWEST, zero, zero


@triton.jit
def softmax_step(m, l, s, x, c, ENTROPY: tl.constexpr):
    """Take the logits x [K, W, VEC], float32, into the (m, l, s) of W lanes; s only with ENTROPY."""
    top = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    gap = tl.maximum((m - top) * c, FAR)
    scale = tl.exp2(gap)
    t = (x - top[None, :, None]) * c
    e = tl.exp2(t)
    if ENTROPY:
        # Clamped here only: a NaN has to come through e.
        weighted = tl.sum(tl.sum(e * tl.maximum(t, FAR), 2), 0)
        s = (s + gap * l) * scale + weighted
    l = l * scale + tl.sum(tl.sum(e, 2), 0)
    return top, l, s


@triton.jit
def softmax_merged(m, l, s, c, ENTROPY: tl.constexpr, AXIS: tl.constexpr):
    """(m, l, s) of sets of logits along AXIS together, in a fixed order."""
    top = tl.max(m, AXIS)
    gap = tl.maximum((m - tl.expand_dims(top, AXIS)) * c, FAR)
    scale = tl.exp2(gap)
    if ENTROPY:
        s = tl.sum((s + gap * l) * scale, AXIS)
    else:
        s = top * 0.0
    return top, tl.sum(l * scale, AXIS), s


@triton.jit
def softmax_of_tile(x, c, ENTROPY: tl.constexpr):
    """(m, l, s) [R] of the rows of x [R, V], float32, -inf where there is no logit."""
    m = tl.maximum(tl.max(x, 1), LOWEST)
    t = (x - m[:, None]) * c
    e = tl.exp2(t)
    if ENTROPY:
        s = tl.sum(e * tl.maximum(t, FAR), 1)
    else:
        s = m * 0.0
    return m, tl.sum(e, 1), s


@triton.jit
def aligned(row, V, VEC: tl.constexpr):
    """`(head, body)`: logits of a row before its first 16-byte boundary, and the pointer to that.

    A row is read from `body` on, and its head after the end: position p is column (p + head) mod V.
    """
    head = ((0 - row.to(tl.int64)) & 15).to(tl.int32) // (16 // VEC)
    body = tl.multiple_of(row + head, 16)
    return tl.minimum(head, V), body


@triton.jit
def floats(
    tile,
    K: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
    POLICY: tl.constexpr = NO_POLICY,
):
    """Load K * W * VEC logits from a 16-byte boundary as float32 [K, W, VEC], in any order.

    POLICY is the eviction policy of `tl.load`.
    """
    # Two dimensions until loaded: with three, versions of Triton differ in which the lanes run along.
    if tile.dtype.element_ty == tl.bfloat16:
        # By pairs: a shift and a mask each, half an instruction less than taking a word apart.
        WORDS: tl.constexpr = W * VEC // 2
        offset = tl.arange(0, K)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        word = tl.load(tile.to(tl.pointer_type(tl.int32)) + offset, eviction_policy=POLICY)
        even = (word << 16).to(tl.float32, bitcast=True)
        odd = (word & -65536).to(tl.float32, bitcast=True)
        x = tl.join(even, odd)
    else:
        offset = tl.arange(0, K)[:, None] * (W * VEC) + tl.arange(0, W * VEC)[None, :]
        x = tl.load(tile + offset, eviction_policy=POLICY).to(tl.float32)
    return tl.reshape(x, (K, W, VEC))


@triton.jit
def softmax_of_row(
    row,
    V,
    c,
    K: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
    ENTROPY: tl.constexpr,
    POLICY: tl.constexpr = NO_POLICY,
):
    """(m, l, s), scalars, of the V logits that lie from the pointer `row` on; V may be 0.

    Whole tiles of K * W * VEC and a masked rest; W = 32 num_warps, VEC the logits in 16 bytes. Loads
    are of 128 bits for any V and any stride of the rows, with the eviction policy POLICY.
    """
    TILE: tl.constexpr = K * W * VEC
    REST: tl.constexpr = W * VEC
    head, body = aligned(row, V, VEC)
    whole = (V - head) // TILE * TILE
    m, l, s = softmax_start(W)
    for start in tl.range(0, whole, TILE, num_stages=1):
        x = floats(body + start, K, W, VEC, POLICY)
        m, l, s = softmax_step(m, l, s, x, c, ENTROPY)
    # A row of it to each instruction of a thread, so that here, too, lanes lie along W.
    offset = tl.arange(0, VEC)[:, None] * W + tl.arange(0, W)[None, :]
    for start in tl.range(whole, V, REST, num_stages=1):
        position = start + offset
        column = position + tl.where(position < V - head, head, head - V)
        y = tl.load(row + column, mask=position < V, other=float("-inf")).to(tl.float32)
        m, l, s = softmax_step(m, l, s, y[:, :, None], c, ENTROPY)
    return softmax_merged(m, l, s, c, ENTROPY, 0)


@triton.jit
def log_prob_of(x, m, l, temperature):
    """log p of the logit x, never positive; -inf for -inf."""
    return (x - m) / temperature - tl.log(tl.where(l < 1.0, 1.0, l))


@triton.jit
def entropy_of(l, s):
    """Entropy in nats, never negative; 0 where every logit is -inf."""
    total = tl.where(l < 1.0, 1.0, l)
    return tl.log(total) - s / total * LN2


@triton.jit
def softmax_gradient(x, m, c, offset, slope, ENTROPY: tl.constexpr):
    """exp2(t) (offset + slope t) with t = (x - m) c; `slope` takes part with ENTROPY only."""
    t = (x - m) * c
    e = tl.exp2(t)
    if ENTROPY:
        gradient = e * (offset + slope * tl.maximum(t, FAR))
    else:
        gradient = e * offset
    return gradient
