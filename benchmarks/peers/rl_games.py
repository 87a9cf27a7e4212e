"""rl_games' GAE: [T, N, 1], flags of the row an episode starts with, no returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, Named
from rl_games.triton_kernels import compute_gae

from peers import NotHere, Prepare


def arms(case: Case) -> dict[str, Prepare]:
    return {"rl_games": _gae} if case.label == "gae" else {}


def _gae(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    if "truncated" in inputs:
        raise NotHere("knows no truncation")
    rewards, values = (inputs[n].contiguous().unsqueeze(-1) for n in ("rewards", "values"))
    ended = inputs["terminated"].float()
    starts = torch.cat((torch.zeros_like(ended[:1]), ended[:-1]))
    last_value, last_done = inputs["next_value"].unsqueeze(-1), ended[-1].contiguous()
    gamma, tau = inputs["gamma"], inputs["gae_lambda"]

    def call() -> Named:
        advantages = compute_gae(rewards, values, starts, last_value, last_done, gamma, tau)
        return {"advantages": advantages.squeeze(-1)}

    return call
