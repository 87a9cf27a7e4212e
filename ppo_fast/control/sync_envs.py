"""Environments of this process one after another, without what a rollout does not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

ROLLOUT_INFO = ("action_mask",)
"""Entries of a step's info that a rollout reads, beside those of an episode's end."""


class SyncEnvs(SyncVectorEnv):
    """Gymnasium's `SyncVectorEnv` in SAME_STEP mode, in half its time per step.

    It returns its own buffers, which the next step overwrites, and of the environments' infos only
    `ROLLOUT_INFO`, `final_obs` and `final_info`: stacking all others takes as long as a small
    environment's step.

    Args:
        env_fns: make the environments, which observe a Box.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
        assert isinstance(self.single_observation_space, spaces.Box)
        self._shape = self.single_observation_space.shape

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """Step every environment, and reset those whose episode ends.

        Raises:
            ValueError: an observation of another shape than the space's.
        """
        rows = self._observations
        infos: dict[str, Any] = {}
        for i, env in enumerate(self.envs):
            obs, self._rewards[i], terminated, truncated, info = env.step(actions[i])
            if terminated or truncated:
                infos = self._add_info(infos, {"final_obs": obs, "final_info": info}, i)
                obs, info = env.reset()
            self._terminations[i], self._truncations[i] = terminated, truncated
            # Assignment would spread a smaller observation over the row.
            if np.shape(obs) != self._shape:
                raise ValueError(
                    f"environment {i} returned an observation of shape {np.shape(obs)}; its space "
                    f"has {self._shape}"
                )
            self._env_obs[i] = rows[i] = obs
            told = {key: info[key] for key in ROLLOUT_INFO if key in info}
            if told:
                infos = self._add_info(infos, told, i)
        self._autoreset_envs = self._terminations | self._truncations
        return rows, self._rewards, self._terminations, self._truncations, infos
