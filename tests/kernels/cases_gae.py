"""Calls of `gae` and `gae_packed`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Call

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
