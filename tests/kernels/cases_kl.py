"""Calls of `kl_from_logits`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.kl import kl_from_logits


def pair(
    *shape: int,
    direction: str = "forward",
    masked: bool = False,
    dtype=torch.float32,
    ref_dtype=None,
    offset: float = 0.0,
    requires_grad: bool = True,
) -> Call:
    """Two policies near each other; masked rows hold NaN."""
    logits = 2.0 * torch.randn(shape) + offset
    ref_logits = logits + torch.randn(shape) - 3.0
    kwargs = {"direction": direction}
    if masked:
        mask = torch.rand(shape[:-1]) < 0.6
        logits[~mask] = math.nan
        ref_logits[~mask] = math.nan
        kwargs["mask"] = mask
    logits = logits.to(dtype).requires_grad_(requires_grad)
    return Call(kl_from_logits, (logits, ref_logits.to(ref_dtype or dtype)), kwargs)


def illegal(M: int, V: int, direction: str = "forward") -> Call:
    """Rows with -inf in one, in the other, in both, throughout; NaN and +inf; each to its own row."""
    call = pair(M, V, direction=direction)
    x, z = (t.detach().clone() for t in call.args)
    x[0, : V // 2] = -math.inf  # the second is positive there
    z[1, : V // 2] = -math.inf  # ... the first
    x[2, ::2] = z[2, ::2] = -math.inf
    x[3], z[4] = -math.inf, -math.inf
    x[5] = z[5] = -math.inf
    x[6, V - 1], z[7, 0] = math.nan, math.nan
    x[7, :2] = -math.inf  # the NaN meets a probability of 0
    x[8, V // 2], z[9, V // 2] = math.inf, math.inf
    x[10] = z[10] = torch.finfo(torch.float32).min
    x[11, : V - 1] = z[11, 1:] = -math.inf  # nothing in common
    x[12, 0] = z[12, 0] = 200.0  # and a place of probability 0 that the other rules out
    x[12, 1], z[12, 1] = -200.0, -math.inf
    x[13, 1], z[13, 1] = -math.inf, -200.0
    z[14] = x[14]
    return Call(kl_from_logits, (x.requires_grad_(), z), call.kwargs)


def strided(*shape: int) -> Call:
    """Rows that lie apart, one of the two with its last dimension not contiguous."""
    call = pair(*shape[:-1], shape[-1] + 3, direction="reverse", masked=True)
    x, z = (t.detach()[..., 2:-1] for t in call.args)
    z = z.transpose(0, -1).contiguous().transpose(0, -1)
    return Call(kl_from_logits, (x.requires_grad_(), z), call.kwargs)


CASES = {
    "small": partial(pair, 5, 7),
    "small, reverse": partial(pair, 5, 7, direction="reverse"),
    "small, masked": partial(pair, 3, 40, 33, masked=True),
    "small, illegal": partial(illegal, 15, 9),
    "small, illegal, reverse": partial(illegal, 15, 9, direction="reverse"),
    "small, strided": partial(strided, 4, 3, 17),
    "row": partial(pair, 1030),
    "one column": partial(pair, 6, 1),
    "large": partial(pair, 5, 2053),
    "large, reverse": partial(pair, 3, 3000, direction="reverse", masked=True),
    "large, illegal": partial(illegal, 15, 2053),
    "large, illegal, reverse": partial(illegal, 15, 2053, direction="reverse"),
    "large, strided": partial(strided, 5, 2100),
    "large, no gradient": partial(pair, 2, 1025, requires_grad=False),
    "large, offset": partial(pair, 3, 2500, offset=5000.0),
    "pieces, all options": partial(pair, 3, 9001, masked=True),
    "pieces, bf16": partial(pair, 2, 8300, dtype=torch.bfloat16),
    "pieces, two dtypes": partial(pair, 2, 8300, dtype=torch.bfloat16, ref_dtype=torch.float32),
    "fp16": partial(pair, 2, 1029, dtype=torch.float16, direction="reverse"),
}

MUTANTS = [
    Mutant(
        "kl.py",
        "(s + (gap - gap2) * l) * scale, 0.0)\n    s +=",
        "s * scale, 0.0)\n    s +=",
        "pieces, all options",
    ),
    Mutant(
        "kl.py", "tl.where(position < length - head, head", "tl.where(position < V, head", "large"
    ),
    Mutant("kl.py", "(value < 0.0) | no_terms, 0.0", "value < 0.0, 0.0", "small, illegal"),
    Mutant("kl.py", '| (value == float("inf"))', "", "small, illegal"),
    Mutant("kl.py", "value == value, l, value", "value == value, l, l", "small, illegal"),
    Mutant("kl.py", "tl.where(e > 0.0, e * (t - w), 0.0), 1)", "e * (t - w), 1)", "small, illegal"),
    Mutant("kl.py", "- mean)) * (g / l)", ")) * (g / l)", "small"),
    Mutant("kl.py", "* (g / l2) - tl", "* (g / l2) + tl", "small, reverse"),
    Mutant(
        "kl.py", "* mask_row) != 0, length, 0)", "* mask_row) != 0, length, V)", "large, reverse"
    ),
    Mutant(
        "kl.py",
        "return top, tl.sum(l * scale, 0),",
        "return top, tl.sum(l, 0),",
        "pieces, all options",
    ),
    Mutant("kl.py", "l2 * tl.exp2(gap2 * LOG2E), 0)", "l2, 0)", "pieces, all options"),
    Mutant(
        "kl.py",
        "begin = piece * piece_size",
        "begin = piece * (piece_size - 1)",
        "pieces, all options",
    ),
    Mutant("kl.py", "(l != 0.0)\n\n", "(l == l)\n\n", "large, illegal"),
]


def big(M: int, V: int, direction: str = "forward", dtype=torch.bfloat16, masked=False) -> Call:
    logits = torch.empty(M, V, dtype=dtype, requires_grad=True)
    kwargs = {"direction": direction}
    if masked:
        kwargs["mask"] = torch.empty(M, dtype=torch.bool)
    return Call(kl_from_logits, (logits, torch.empty(M, V, dtype=dtype)), kwargs)


AOT_CASES = {
    "small": partial(big, 4096, 18, dtype=torch.float32),
    "small, many rows": partial(big, 1 << 17, 18, dtype=torch.float32),
    "small, wide": partial(big, 4096, 1000),
    "large": partial(big, 1024, 32768, masked=True),
    "large, odd": partial(big, 1024, 32001),
    "large, reverse": partial(big, 1024, 32768, "reverse"),
    "large, fp32": partial(big, 1024, 32768, dtype=torch.float32),
    "pieces": partial(big, 16, 32768),
}
HOT = {"wide_loads": True, "quiet_loop": True}
BUDGETS = [
    # 27 instructions a pair of logits go by while its 4 bytes do, on an H200.
    Budget("small", "kl_rows_kernel", 56),
    Budget("small", "kl_rows_backward_kernel", 56),
    Budget("small, wide", "kl_rows_kernel", 64),
    Budget("small, wide", "kl_rows_backward_kernel", 80),
    Budget("large", "kl_kernel", 64, **HOT, elements=16, instructions=19.5),
    Budget("large", "kl_backward_kernel", 88, wide_loads=True),
    Budget("large, odd", "kl_kernel", 64, **HOT, elements=16, instructions=19.5),
    Budget("large, odd", "kl_backward_kernel", 88, wide_loads=True),
    Budget("large, reverse", "kl_backward_kernel", 88, wide_loads=True),
    Budget("large, fp32", "kl_kernel", 64, **HOT, elements=16, instructions=18.0),
    Budget("pieces", "kl_kernel", 64, **HOT, elements=16, instructions=19.5),
    Budget("pieces", "kl_merge_kernel", 32),
]
