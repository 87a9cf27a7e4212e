"""rl-triton's GAE (github.com/simonsays1980/rl-triton): [N, T], float32 flags, no returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cases import Case, Inputs, Named
from rl_triton import compute_gae

from peers import NotHere, Prepare, need_cuda


def arms(case: Case) -> dict[str, Prepare]:
    return {"rl-triton": _gae} if case.label == "gae" else {}


def _gae(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    need_cuda(inputs["rewards"])
    if "truncated" in inputs:
        raise NotHere("wants bootstrap values that are 0 elsewhere")
    rewards, values = (inputs[name].t().contiguous() for name in ("rewards", "values"))
    terminated = inputs["terminated"].t().float().contiguous()
    compute = partial(
        compute_gae,
        rewards,
        values,
        terminated,
        gamma=inputs["gamma"],
        lambda_=inputs["gae_lambda"],
        last_value=inputs["next_value"],
    )
    return lambda: {"advantages": compute().t()}
