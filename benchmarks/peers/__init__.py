"""Other people's code under one handle, so that benchmarks can run it in turns with ours.

Trainers (`sb3`, `cleanrl_style`) have `build(env_id, config)`: it takes our `ControlConfig`,
translates it into the trainer's constants, and returns a function that trains for a number of
environment steps.

Kernels (`KERNEL_PEERS`) have `arms(case)`: the functions of that package which compute what the case
asks for, or a part of it, by name. Each takes our inputs, lays them out as its package wants them,
and returns what is then timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ppo_fast.config import ControlConfig


class Trained(NamedTuple):
    """What a call of training did."""

    steps: int
    """environment steps, summed over environments"""
    returns: list[float]
    """of the last finished training episodes, 100 at most"""
    phases: dict[str, float]
    """seconds by phase, where the trainer tells"""


Trainer = Callable[[int], Trained]
Build = Callable[[str, ControlConfig], Trainer]

Prepare = Callable[[dict[str, Any], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]
"""(inputs, gradients of the outputs) -> a function that returns outputs by our names, in our layout,
and gradients as "d <input>" where gradients of outputs were given."""

KERNEL_PEERS = {
    "rl_triton": "rl_triton",
    "rl_games": "rl_games",
    "torchrl": "torchrl",
    "trl": "trl",
    "liger": "liger_kernel",
    "flash_attn": "flash_attn",
    "verl": "verl",
    "cut_cross_entropy": "cut_cross_entropy",
}
"""Adapter file by the package it imports."""


class NotHere(Exception):
    """Why an arm does not apply here, for instance that it needs a GPU."""


def need_cuda(x: Tensor) -> None:
    """Raise where a kernel refuses CPU tensors, which Triton's interpreter would take."""
    if not x.is_cuda:
        raise NotHere("takes CUDA tensors only")
