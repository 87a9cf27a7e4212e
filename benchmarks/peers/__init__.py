"""Other people's code under one handle, so that benchmarks can run it in turns with ours.

Trainers have `build(env_id, config, **options)`: it takes our `ControlConfig` (or anything with its
fields), translates it into the trainer's constants, and returns a function that trains for a number
of environment steps. Importing this module imports nothing heavy: what a trainer's own imports take
is part of what is measured.

Trainers of language models have `build(case, models, **options)` and return `Stages`.

Kernels (`KERNEL_PEERS`) have `arms(case)`: the functions of that package which compute what the case
asks for, or a part of it, by name. Each takes our inputs, lays them out as its package wants them,
and returns what is then timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class Trained(NamedTuple):
    """What a call of training did."""

    steps: int
    """environment steps, summed over environments"""
    returns: list[float]
    """of the last finished training episodes, 100 at most"""
    phases: dict[str, float]
    """seconds by phase, where the trainer tells"""
    compile_seconds: float = 0.0
    """spent compiling while building, where the trainer compiles ahead of time"""


Watch = Callable[[int, Sequence[float]], bool]
"""Called after every iteration with the environment steps so far and the returns of the last
finished episodes, 100 at most; True ends the training."""
Trainer = Callable[[int, Watch], Trained]
Build = Callable[..., Trainer]


class Stages(NamedTuple):
    """A trainer of language models, taken apart; `build(case, models, **options)` returns it."""

    sample: Callable[[list[list[int]]], Any]
    """generate responses to prompts"""
    count: Callable[[Any], int]
    """response tokens in what `sample` returned"""
    forced: Callable[[list[list[int]], list[list[int]]], Any]
    """what `sample` would return had the policy given these responses to these prompts"""
    score: Callable[[Any], Any]
    """from there to what `update` trains on: log-probs, values, rewards, advantages"""
    update: Callable[[Any], dict[str, float]]
    """all epochs; returns metrics"""
    garbage: Callable[[], None] | None = None
    """what the trainer does after scoring and after an update to free memory"""


Prepare: TypeAlias = (
    "Callable[[dict[str, Any], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]"
)
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
