"""Count, mean and sum of squared deviations, and how those of parts make those of the whole.

Never E[x^2] - E[x]^2: on numbers around 1000 it is off by a fifth in fp32. Parts are merged in a
fixed order (Chan, Golub and LeVeque 1983), so the same input gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def moments_of(x, keep, AXIS: tl.constexpr):
    """Count, mean and sum of squared deviations of x along AXIS, where `keep` is 1 and not 0."""
    count = tl.sum(keep, AXIS)
    mean = tl.sum(x * keep, AXIS) / tl.maximum(count, 1.0)
    deviation = (x - tl.expand_dims(mean, AXIS)) * keep
    return count, mean, tl.sum(deviation * deviation, AXIS)


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
    middle = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    difference = mean - middle
    return total, middle, tl.sum(squares + count * difference * difference, 0)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(partials, moments, parts, BLOCK: tl.constexpr):
    """[parts, 3] to [3], by one program."""
    offset = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + offset
        row = partials + part * 3
        inside = part < parts
        count, mean, squares = merged(
            count,
            mean,
            squares,
            tl.load(row, mask=inside, other=0.0),
            tl.load(row + 1, mask=inside, other=0.0),
            tl.load(row + 2, mask=inside, other=0.0),
        )
    total, middle, squared = moments_of_parts(count, mean, squares)
    tl.store(moments, total)
    tl.store(moments + 1, middle)
    tl.store(moments + 2, squared)
