"""torchrl's two advantage estimates: [N, T, 1], the value of the next state given for each row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cases import Case, Inputs, Named
from torchrl.objectives.value import functional

from peers import NotHere, Prepare

LONGEST_LOOP = 1024
LONGEST_FILTER = 16384


def arms(case: Case) -> dict[str, Prepare]:
    if case.label != "gae":
        return {}
    loop = functional.generalized_advantage_estimate
    convolution = functional.vec_generalized_advantage_estimate
    return {
        "torchrl": partial(_gae, loop, LONGEST_LOOP),
        "torchrl vectorised": partial(_gae, convolution, LONGEST_FILTER),
    }


def _gae(estimate: Callable, longest: int, inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    if "truncated" in inputs:
        raise NotHere("wants the value of the next state for each row")
    if len(inputs["rewards"]) > longest:
        raise NotHere(f"takes too long beyond {longest} steps")
    values = inputs["values"]
    following = torch.cat((values[1:], inputs["next_value"][None]))
    ended = inputs["terminated"]
    rows = (values, following, inputs["rewards"], ended, ended)
    batch = [x.t().unsqueeze(-1).contiguous() for x in rows]

    def call() -> Named:
        found = estimate(inputs["gamma"], inputs["gae_lambda"], *batch)
        return {
            name: x.squeeze(-1).t()
            for name, x in zip(("advantages", "returns"), found, strict=True)
        }

    return call
