"""Count, mean and sum of squared deviations, and how those of parts make those of the whole.

Never E[x^2] - E[x]^2: on numbers around 1000 it is off by a fifth in fp32. Parts are merged in a
fixed order (Chan, Golub and LeVeque 1983), so the same input gives the same bits.
"""

import triton
import triton.language as tl

from ppo_fast.kernels._launch import LOWEST


@triton.jit
def moments_of(x, keep, AXIS: tl.constexpr):
    """Count, mean and sum of squared deviations of x along AXIS, where `keep` is 1 and not 0.

    The mean is taken around an entry: of equal entries it is then that entry to the last bit, which
    whitening relies on.
    """
    count = tl.sum(keep, AXIS)
    pivot = _pivot(x, keep, count, AXIS)
    x = (x - tl.expand_dims(pivot, AXIS)) * keep
    mean = tl.sum(x, AXIS) / tl.maximum(count, 1.0)
    deviation = (x - tl.expand_dims(mean, AXIS)) * keep
    return count, pivot + mean, tl.sum(deviation * deviation, AXIS)


@triton.jit
def _pivot(x, keep, count, AXIS: tl.constexpr):
    largest = tl.max(tl.where(keep > 0.0, x, LOWEST), AXIS)
    return tl.where(count > 0.0, largest, 0.0)


@triton.jit
def merged(count, mean, squares, other_count, other_mean, other_squares):
    """The moments of two parts together."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    difference = other_mean - mean
    squares += other_squares + difference * difference * count * share
    return total, mean + difference * share, squares


@triton.jit
def moments_of_parts(count, mean, squares):
    """The moments of all entries of three [B] vectors together, as scalars."""
    total = tl.sum(count, 0)
    pivot = _pivot(mean, count, total, 0)
    middle = pivot + tl.sum(count * (mean - pivot), 0) / tl.maximum(total, 1.0)
    difference = mean - middle
    return total, middle, tl.sum(squares + count * difference * difference, 0)


@triton.jit
def folded(partials, parts, BLOCK: tl.constexpr):
    """The moments of [parts, 3] partials together, as scalars."""
    offset = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        row = partials + (start + offset) * 3
        inside = start + offset < parts
        count, mean, squares = merged(
            count,
            mean,
            squares,
            tl.load(row, mask=inside, other=0.0),
            tl.load(row + 1, mask=inside, other=0.0),
            tl.load(row + 2, mask=inside, other=0.0),
        )
    return moments_of_parts(count, mean, squares)


@triton.jit
def whitening(count, mean, squares, eps):
    """`(shift, scale)` with which (x - shift) * scale is whitened; (0, 1) below two entries."""
    deviation = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))
    few = count < 2.0
    return tl.where(few, 0.0, mean), tl.where(few, 1.0, 1.0 / (deviation + eps))


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(partials, moments, parts, BLOCK: tl.constexpr):
    """[parts, 3] to [3], by one program."""
    total, middle, squares = folded(partials, parts, BLOCK)
    tl.store(moments, total)
    tl.store(moments + 1, middle)
    tl.store(moments + 2, squares)


@triton.jit
def centred_moments_of(x, keep, AXIS: tl.constexpr):
    """`moments_of` with a mean exact for equal entries; x is 0 where `keep` is, None keeps all."""
    total = tl.sum(x, AXIS)
    if keep is None:
        count = tl.full(total.shape, x.shape[AXIS], tl.float32)
    else:
        count = tl.sum(keep, AXIS)
    at_least_one = tl.maximum(count, 1.0)
    mean = total / at_least_one
    deviation = x - tl.expand_dims(mean, AXIS)
    if keep is not None:
        deviation *= keep
    rest = tl.sum(deviation, AXIS) / at_least_one
    deviation -= tl.expand_dims(rest, AXIS)
    if keep is not None:
        deviation *= keep
    return count, mean + rest, tl.sum(deviation * deviation, AXIS)


@triton.jit
def centred_moments_of_parts(count, mean, rest, squares):
    """`moments_of_parts` of means `mean + rest`, with the mean in two such parts.

    Equal means give exactly that mean and a rest of 0.
    """
    total = tl.sum(count, 0)
    at_least_one = tl.maximum(total, 1.0)
    middle = tl.sum(count * mean, 0) / at_least_one
    middle += tl.sum(count * (mean - middle), 0) / at_least_one
    difference = (mean - middle) + rest
    remaining = tl.sum(count * difference, 0) / at_least_one
    difference -= remaining
    return total, middle, remaining, tl.sum(squares + count * difference * difference, 0)
