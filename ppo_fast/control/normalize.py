"""Running normalisation of observations and rewards, in float64 and on the data's device.

The rules are SB3's VecNormalize: statistics are updated with a batch before it is normalised,
observations are shifted and scaled, rewards only scaled (by the standard deviation of the discounted
return), both clipped. What the policy saw is what the rollout stores, so statistics cannot change
under an update and the first minibatch's ratio stays 1. Rows that are no transitions never count.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8


class RunningMoments:
    """Mean and variance of everything seen, merged batch by batch (Chan et al. 1979).

    Starts as SB3's and CleanRL's: mean 0, variance 1, weight 1e-4, so the first batch decides.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.var = torch.ones(shape, dtype=torch.float64, device=device)
        self.count = torch.full((), 1e-4, dtype=torch.float64, device=device)

    def update(self, batch: Tensor, valid: Tensor | None = None) -> None:
        """Merge rows [M, *shape]; `valid` [M] bool leaves rows out without reading them."""
        batch = batch.double()
        if valid is None:
            count = torch.full_like(self.count, batch.shape[0])
            mean = batch.mean(0)
            squares = (batch - mean).square().sum(0)
        else:
            rows = valid.reshape(-1, *[1] * (batch.dim() - 1))
            count = valid.sum().double()
            mean = torch.where(rows, batch, 0).sum(0) / count.clamp(min=1)
            squares = torch.where(rows, batch - mean, 0).square().sum(0)
        delta = mean - self.mean
        total = self.count + count
        self.mean += delta * (count / total)
        self.var.copy_(
            (self.var * self.count + squares + delta.square() * (self.count * count / total))
            / total
        )
        self.count.copy_(total)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The live statistics, by checkpoint name."""
        return {f"{prefix}.{name}": getattr(self, name) for name in ("mean", "var", "count")}


class ObservationNormalizer:
    """(obs - mean) / sqrt(var + 1e-8), clipped; one set of statistics for all environments."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, clip: float) -> None:
        self.moments = RunningMoments(shape, device)
        self.clip = clip

    def update(self, obs: Tensor, valid: Tensor | None = None) -> None:
        """Take observations [N, *shape] into the statistics."""
        self.moments.update(obs, valid)

    def __call__(self, obs: Tensor) -> Tensor:
        """Normalise [M, *shape] by the statistics so far; float32."""
        scaled = (obs.double() - self.moments.mean) / (self.moments.var + EPSILON).sqrt()
        return scaled.clamp_(-self.clip, self.clip).float()


class RewardNormalizer:
    """reward / sqrt(var + 1e-8), clipped, where var is that of the running discounted return."""

    def __init__(self, num_envs: int, device: torch.device, gamma: float, clip: float) -> None:
        self.moments = RunningMoments((), device)
        self.returns = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self.gamma = gamma
        self.clip = clip

    def normalize(self, rewards: Tensor, done: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise a rollout's rewards [T, N] step by step; float32.

        Args:
            rewards: [T, N].
            done: [T, N] bool, the end of an episode, where the discounted return starts anew.
            mask: [T, N] bool or None; False rows are skipped and come out as 0.
        """
        normalized = torch.zeros_like(rewards, dtype=torch.float32)
        for t in range(rewards.shape[0]):
            row = rewards[t].double()
            valid = None if mask is None else mask[t]
            summed = self.returns * self.gamma + row
            self.returns.copy_(
                summed if valid is None else torch.where(valid, summed, self.returns)
            )
            self.moments.update(self.returns, valid)
            scaled = row / (self.moments.var + EPSILON).sqrt()
            scaled = scaled.clamp_(-self.clip, self.clip).float()
            normalized[t] = scaled if valid is None else torch.where(valid, scaled, 0)
            self.returns.masked_fill_(done[t], 0)
        return normalized
