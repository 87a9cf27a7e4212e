"""Calls of `gae` and `gae_packed`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.gae import gae, gae_packed

HYPER = {"gamma": 0.97, "gae_lambda": 0.9}


def flags(p: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape) < p


def rollout(T: int, N: int, *options: str, dtype=torch.float32, **kwargs) -> Call:
    """A [T, N] rollout; options: truncated, mask, ratios, batch-major, strided."""

    def make(x: torch.Tensor) -> torch.Tensor:
        if "batch-major" in options:
            return x.t().contiguous().t()
        if "strided" in options:
            return torch.stack((x, x, x), -1)[..., 1]
        return x

    skipped = ~flags(0.2, T, N) if "mask" in options else torch.ones(T, N, dtype=torch.bool)

    def floats() -> torch.Tensor:
        # A skipped row holds NaN: reading it shows.
        return make(torch.randn(T, N).masked_fill(~skipped, math.nan).to(dtype))

    given = {"terminated": make(flags(0.1, T, N))}
    if "truncated" in options:
        cut = flags(0.1, T, N)
        given["truncated"] = make(cut)
        is_read = cut & ~given["terminated"]
        given["bootstrap_values"] = make(
            torch.randn(T, N).masked_fill(~is_read, math.nan).to(dtype)
        )
    if "mask" in options:
        given["mask"] = make(skipped)
    if "ratios" in options:
        given["ratios"] = make(torch.randn(T, N).exp().to(dtype))
    args = floats(), floats(), torch.randn(N).to(dtype)
    return Call(gae, args, given | HYPER | kwargs)


def packed(lengths: list[int], *options: str, **kwargs) -> Call:
    """Sequences of these lengths end to end."""
    total = sum(lengths)
    call = rollout(total, 1, *options)
    columns = {
        name: x.squeeze(1) if isinstance(x, torch.Tensor) and x.dim() == 2 else x
        for name, x in call.kwargs.items()
    }
    args = call.args[0].squeeze(1), call.args[1].squeeze(1), torch.randn(len(lengths))
    columns["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return Call(gae_packed, args, columns | kwargs)


ALL = ("truncated", "mask", "ratios")
CASES = {
    "columns": partial(rollout, 17, 33),
    "columns, all options": partial(rollout, 37, 5, *ALL, with_moments=True),
    "columns, one tile": partial(rollout, 100, 3, *ALL),
    "columns, chunks": partial(rollout, 130, 3, *ALL, with_moments=True),
    "columns, strided": partial(rollout, 20, 4, "strided", *ALL),
    "columns, bf16": partial(rollout, 16, 31, *ALL, dtype=torch.bfloat16),
    "rows": partial(rollout, 129, 3, "batch-major"),
    "rows, all options": partial(rollout, 200, 2, "batch-major", *ALL, with_moments=True),
    "one row": partial(rollout, 1, 5, "truncated"),
    "one column": partial(rollout, 15, 1, "mask"),
    "lambda per column": partial(
        lambda: rollout(20, 3, "mask", gae_lambda=torch.tensor([0.0, 0.5, 1.0]))
    ),
    "numbers on the device": partial(
        lambda: rollout(
            9,
            3,
            "ratios",
            gamma=torch.tensor(0.9),
            gae_lambda=torch.tensor(0.8),
            rho_clip=torch.tensor(0.7),
            c_clip=1.2,
        )
    ),
    "packed": partial(packed, [3, 0, 40, 1, 33, 0], "truncated", "mask", with_moments=True),
    "packed, lambda per sequence": partial(
        lambda: packed([5, 0, 31], gae_lambda=torch.tensor([0.1, 0.2, 0.9]))
    ),
}


def empty(T: int, N: int, *options: str, dtype=torch.float32, **kwargs) -> Call:
    """A rollout of this shape, of unwritten memory: for compilation only."""

    def make(dtype: torch.dtype) -> torch.Tensor:
        if "batch-major" in options:
            return torch.empty(N, T, dtype=dtype).t()
        return torch.empty(T, N, dtype=dtype)

    given = {"terminated": make(torch.bool)}
    if "truncated" in options:
        given |= {"truncated": make(torch.bool), "bootstrap_values": make(dtype)}
    if "mask" in options:
        given["mask"] = make(torch.bool)
    if "ratios" in options:
        given["ratios"] = make(dtype)
    return Call(gae, (make(dtype), make(dtype), torch.empty(N)), given | HYPER | kwargs)


def empty_far_apart(T: int, N: int) -> Call:
    """Rows 2^28 elements apart: a view of memory that nobody has."""
    call = empty(T, N, "mask")
    far = torch.empty_strided((T, N), (1 << 28, 1), device="meta")
    return call._replace(args=(far, *call.args[1:]))


def empty_packed(lengths: list[int], *options: str, **kwargs) -> Call:
    call = empty(sum(lengths), 1, *options, **kwargs)
    columns = {
        name: x.squeeze(1) if isinstance(x, torch.Tensor) else x for name, x in call.kwargs.items()
    }
    args = *(x.squeeze(1) for x in call.args[:2]), torch.empty(len(lengths))
    return Call(gae_packed, args, columns | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)})


MANY = ("truncated", "mask")
AOT_CASES = {
    "8 x 32768": partial(empty, 8, 32768),
    "32 x 4096": partial(empty, 32, 4096),
    "8192 x 32": partial(empty, 8192, 32),
    "32 x 32768": partial(empty, 32, 32768),
    "128 x 4096": partial(empty, 128, 4096),
    "128 x 4096, all options": partial(empty, 128, 4096, *ALL, with_moments=True),
    "1024 x 32768": partial(empty, 1024, 32768),
    "1024 x 16384": partial(empty, 1024, 16384),
    "1024 x 8192": partial(empty, 1024, 8192),
    "1024 x 4096": partial(empty, 1024, 4096),
    "1024 x 32768, truncated, mask": partial(empty, 1024, 32768, *MANY, with_moments=True),
    "1024 x 32768, all options": partial(empty, 1024, 32768, *ALL, with_moments=True),
    "1024 x 32768, bf16": partial(empty, 1024, 32768, dtype=torch.bfloat16),
    "2048 x 256": partial(empty, 2048, 256),
    "2048 x 256, all options": partial(empty, 2048, 256, *ALL, with_moments=True),
    "[8192, 1024].t()": partial(empty, 1024, 8192, "batch-major"),
    "[8192, 128].t()": partial(empty, 128, 8192, "batch-major"),
    "[8192, 128].t(), all options": partial(empty, 128, 8192, "batch-major", *ALL),
    "[8192, 1024].t(), all options": partial(empty, 1024, 8192, "batch-major", *ALL),
    "[512, 4096].t()": partial(empty, 4096, 512, "batch-major"),
    "[16, 131072].t()": partial(empty, 131072, 16, "batch-major"),
    "[16, 131072].t(), all options": partial(
        empty, 131072, 16, "batch-major", *ALL, with_moments=True
    ),
    "1024 x 8192, rows far apart": partial(empty_far_apart, 1024, 8192),
    "packed 512 x 2048": partial(empty_packed, [2048] * 512, "mask"),
    "packed 8 x 65536": partial(empty_packed, [65536] * 8, "mask", with_moments=True),
}
COLUMNS = {"quiet_loop": True, "elements": 16}
BUDGETS = [
    # 117 instructions an element go by while its 17 bytes do, on an H200.
    Budget("1024 x 32768", "gae_kernel", 208, **COLUMNS, instructions=40),
    Budget("1024 x 32768, bf16", "gae_kernel", 208, **COLUMNS, instructions=46),
    Budget(
        *("1024 x 32768, truncated, mask", "gae_kernel", 168),
        **COLUMNS | {"elements": 8},
        instructions=96,
    ),
    Budget("2048 x 256", "gae_kernel", 224, quiet_loop=True),
    Budget("[8192, 1024].t()", "gae_kernel", 160, elements=8, instructions=76),
]

MUTANTS = [
    Mutant(
        "gae.py",
        "decay_later * decay, delta + decay",
        "decay_later * decay, delta - decay",
        "columns",
    ),
    Mutant("gae.py", "discount * next_v - v", "discount * next_v + v", "columns"),
    Mutant("gae.py", "(step == 0) & (tile == 0)", "step < 0", "columns"),
    Mutant("gae.py", "tl.where(ended, 0.0, g)", "tl.where(ended, g, g)", "columns"),
    Mutant("gae.py", "decay = discount * lam", "decay = tl.where(ended, g, g) * lam", "columns"),
    Mutant(
        "gae.py", "cut = cut & (ended == 0)", "cut = cut | (ended != 0)", "columns, all options"
    ),
    Mutant("gae.py", "decay = tl.where(cut, 0.0, decay)", "decay = decay", "columns, all options"),
    Mutant(
        "gae.py",
        "decay = tl.where(keep, decay, 1.0)",
        "decay = tl.where(keep, decay, g)",
        "one column",
    ),
    Mutant("gae.py", "(later > chunk) &", "(later >= chunk) &", "columns, chunks"),
    Mutant(
        "gae.py",
        "minimum(ratio, number(rho_clip))",
        "minimum(ratio, number(c_clip))",
        "numbers on the device",
    ),
    Mutant("gae.py", "result = advantage + v", "result = advantage", "columns"),
    Mutant(
        "gae.py",
        "tl.where(passing > 0.0, tl.expand_dims(after, TIME_AXIS), next_v)",
        "next_v",
        "one column",
    ),
    Mutant(
        "_moments.py",
        "difference * difference * count * share",
        "difference * count * share",
        "packed",
    ),
    Mutant(
        "_moments.py", "return total, mean + difference * share", "return total, mean", "packed"
    ),
]
