"""Where the rows of [..., V] logits lie, without a copy for up to two leading dimensions."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offset(row, T, b, t):
    """Where row b T + t of a [B, T] tensor with these strides lies; 64 bits."""
    return (row // T).to(tl.int64) * b + (row % T).to(tl.int64) * t


def leading(logits: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the dimensions before the last, merged as far as they can be."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    return dims


def rows_of(logits: Tensor) -> tuple[int, int, tuple[int, int]]:
    """`(B, T, strides)` of logits whose rows are [B, T]."""
    dims = [(1, 0), (1, 0), *leading(logits)][-2:]
    return dims[0][0], dims[1][0], (dims[0][1], dims[1][1])
