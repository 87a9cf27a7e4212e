"""Calls of `masked_whiten`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.whiten import masked_whiten, moments

# More than one program's share, and a tail.
LARGE = 20_011


def entries(*shape: int, offset: float = 3.0, masked: bool = False, dtype=torch.float32, **kwargs):
    """Normal numbers around `offset`; masked ones are NaN, so reading them shows."""
    x = (offset + 2.0 * torch.randn(shape)).to(dtype)
    if masked:
        mask = torch.rand(shape) < 0.7
        return Call(masked_whiten, (x.masked_fill(~mask, math.nan), mask), kwargs)
    return Call(masked_whiten, (x,), kwargs)


def known(*shape: int, **options) -> Call:
    """The moments given."""
    call = entries(*shape, **options)
    mask = call.args[1] if len(call.args) > 1 else None
    found = moments(call.args[0].float(), mask)
    return call._replace(kwargs=call.kwargs | {"moments": found})


def strided(*shape: int, masked: bool = True) -> Call:
    """Rows that lie apart, and a mask that lies as it likes."""
    call = entries(*shape, masked=masked)
    wide = torch.full((shape[0], shape[1] + 5), math.nan)
    wide[:, 2:-3] = call.args[0]
    masks = tuple(x.t().contiguous().t() for x in call.args[1:])
    return Call(masked_whiten, (wide[:, 2:-3], *masks), {})


def transposed(*shape: int) -> Call:
    call = entries(*shape, masked=True)
    return Call(masked_whiten, tuple(x.t() for x in call.args), {})


CASES = {
    "few": partial(entries, 7, 11),
    "few, masked": partial(entries, 100, masked=True),
    "no shift": partial(entries, 513, masked=True, shift_mean=False),
    "one program": partial(entries, 9000, masked=True),
    "programs": partial(entries, LARGE),
    "programs, all options": partial(entries, LARGE, masked=True, shift_mean=False),
    "programs, bf16": partial(entries, LARGE, dtype=torch.bfloat16),
    "large mean": partial(entries, LARGE, offset=1e5, masked=True),
    "moments, library": partial(known, 10_000, masked=True),
    "moments, no shift": partial(known, 33, shift_mean=False),
    "strided": partial(strided, 30, 41),
    "strided, programs": partial(strided, 130, 129),
    "transposed": partial(transposed, 12, 9),
    "eps on the device": partial(lambda: entries(50, eps=torch.tensor(0.5))),
    "one entry": partial(entries, 1),
}

MUTANTS = [
    Mutant("whiten.py", "tl.maximum(total - 1.0, 1.0)", "tl.maximum(total, 1.0)", "few"),
    Mutant("whiten.py", "alone = total < 2.0", "alone = total < 1.0", "one entry"),
    Mutant("whiten.py", "back = mean + rest", "back = 0.0", "no shift"),
    Mutant("whiten.py", "std + number(eps)", "std", "eps on the device"),
    Mutant("whiten.py", "tl.where(keep, value, 0.0)", "value", "few, masked"),
    Mutant("whiten.py", "tl.where(keep > 0.0, y, 0.0)", "y", "one program"),
    Mutant(
        "whiten.py", "centred_moments_of(value * keep,", "centred_moments_of(value,", "large mean"
    ),
    Mutant("whiten.py", "tiles = tl.cdiv(N, TILE)", "tiles = (N // TILE)", "few"),
    Mutant("whiten.py", "rest += middle - (mean - pivot)", "rest += 0.0", "large mean"),
    Mutant("whiten.py", "- rest) * scale", ") * scale", "large mean"),
    Mutant("whiten.py", "row * mask_row", "row * x_row", "strided"),
    Mutant("whiten.py", "tl.load(moments + 2)", "tl.load(moments + 1)", "moments, library"),
    Mutant(
        "_moments.py",
        "return total, middle, remaining, tl.sum(squares + count * difference * difference, 0)",
        "return total, middle, remaining, tl.sum(squares, 0)",
        "programs",
    ),
]


def large(*shape: int, masked: bool = False, dtype=torch.float32, **kwargs) -> Call:
    x = torch.empty(shape, dtype=dtype)
    args = (x, torch.empty(shape, dtype=torch.bool)) if masked else (x,)
    return Call(masked_whiten, args, kwargs)


AOT_CASES = {
    "few": partial(large, 2000, masked=True),
    "one program": partial(large, 16_000, masked=True),
    "many": partial(large, 1 << 22),
    "many, masked": partial(large, 1 << 22, masked=True),
    "many, bf16": partial(large, 1 << 22, masked=True, dtype=torch.bfloat16),
    "many, strided": partial(lambda: Call(masked_whiten, (torch.empty(4096, 1040)[:, :1000],), {})),
    "many, moments": partial(lambda: large(1 << 22, masked=True, moments=torch.empty(3))),
}
HOT = {"wide_loads": True, "quiet_loop": True}
BUDGETS = [
    # 27 instructions an element go by while its 4 bytes do, on an H200.
    Budget("few", "whiten_kernel", 96, wide_loads=True),
    Budget("one program", "whiten_kernel", 112, wide_loads=True),
    Budget("many", "whiten_kernel", 96, **HOT, elements=16, instructions=9.0),
    Budget("many, masked", "whiten_kernel", 80, **HOT, elements=16, instructions=17.0),
    Budget("many, bf16", "whiten_kernel", 80, wide_loads=True, elements=16, instructions=17.5),
    Budget("many, strided", "whiten_kernel", 56),
    Budget("many, moments", "whiten_kernel", 80, **HOT, elements=16, instructions=9.0),
]
