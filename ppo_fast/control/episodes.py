"""Returns and lengths of finished episodes, from the rollout's own arrays."""

from __future__ import annotations

from collections import deque

import numpy as np


class EpisodeStats:
    """Sums rewards per environment and keeps the last `window` finished episodes.

    Attributes:
        returns, lengths: the last finished episodes, oldest first.
        running_returns, running_lengths: [N] float64, of the episodes under way.
        finished: episodes finished since the start.
    """

    def __init__(self, num_envs: int, window: int) -> None:
        self.returns: deque[float] = deque(maxlen=window)
        self.lengths: deque[int] = deque(maxlen=window)
        self.running_returns = np.zeros(num_envs)
        self.running_lengths = np.zeros(num_envs)
        self.finished = 0

    def update(self, rewards: np.ndarray, done: np.ndarray, mask: np.ndarray | None) -> None:
        """Take a rollout's raw rewards, ends and mask, each [T, N]; masked rows count nowhere."""
        if mask is not None:
            rewards = np.where(mask, rewards, 0.0)
        valid = np.ones(rewards.shape, bool) if mask is None else mask
        # Only rows in which an episode ends need a look; between them whole blocks are summed.
        start: int = 0
        for t in np.flatnonzero(done.any(1)):
            self._add(rewards[start : t + 1], valid[start : t + 1])
            for env in np.flatnonzero(done[t]):
                self.returns.append(float(self.running_returns[env]))
                self.lengths.append(int(self.running_lengths[env]))
                self.finished += 1
            self.running_returns[done[t]] = 0.0
            self.running_lengths[done[t]] = 0.0
            start = int(t) + 1
        self._add(rewards[start:], valid[start:])

    def _add(self, rewards: np.ndarray, valid: np.ndarray) -> None:
        self.running_returns += rewards.sum(0, dtype=np.float64)
        self.running_lengths += valid.sum(0)

    def metrics(self) -> dict[str, float]:
        """Means over the window, under SB3's names; empty before the first episode ends."""
        if not self.returns:
            return {}
        return {
            "rollout/ep_rew_mean": float(np.mean(self.returns)),
            "rollout/ep_len_mean": float(np.mean(self.lengths)),
            "rollout/episodes": float(self.finished),
        }
