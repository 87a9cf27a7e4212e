"""Other PPO trainers under one handle, so that benchmarks can run them in turns with ours.

Each module has `build(env_id, config)`: it takes our `ControlConfig`, translates it into its
trainer's constants, and returns a function that trains for a number of environment steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
