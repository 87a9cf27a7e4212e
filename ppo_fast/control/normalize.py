"""Running normalisation of observations and rewards, in float64 and on the data's device.

The rules are SB3's VecNormalize: statistics are updated with a batch before it is normalised,
observations are shifted and scaled, rewards only scaled (by the standard deviation of the discounted
return), both clipped. What the policy saw is what the rollout stores, so statistics cannot change
under an update and the first minibatch's ratio stays 1. Rows that are no transitions never count.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ppo_fast.functional._scan import reverse_linear_scan_

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
            count: Tensor | int = batch.shape[0]
            var, mean = torch.var_mean(batch, 0, correction=0)
        else:
            rows = valid.reshape(-1, *[1] * (batch.dim() - 1))
            count = valid.sum().double()
            at_least_one = count.clamp(min=1)
            mean = torch.where(rows, batch, 0).sum(0) / at_least_one
            var = torch.where(rows, batch - mean, 0).square_().sum(0) / at_least_one
        delta = mean - self.mean
        self.count += count
        share = count / self.count
        self.mean.lerp_(mean, share)
        self.var.lerp_(var, share).addcmul_(delta.square_(), share * (1 - share))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The live statistics, by checkpoint name."""
        return {f"{prefix}.{name}": getattr(self, name) for name in ("mean", "var", "count")}


class HostMoments:
    """The same statistics, in the same memory, taken in by numpy: a fifth of the time on a few rows."""

    def __init__(self, moments: RunningMoments) -> None:
        self.mean, self.var = moments.mean.numpy(), moments.var.numpy()
        self.count = moments.count.numpy()
        self._delta, self._square = np.empty_like(self.mean), np.empty_like(self.mean)

    def update(self, batch: np.ndarray) -> None:
        """Merge rows [M, *shape] float64."""
        rows, delta, square = batch.shape[0], self._delta, self._square
        count = float(self.count) + rows
        share = rows / count
        if rows == 1:
            np.subtract(batch[0], self.mean, out=delta)
            self.var *= 1.0 - share
        else:
            mean = np.add.reduce(batch, 0) / rows
            np.subtract(mean, self.mean, out=delta)
            deviation = batch - mean
            np.multiply(deviation, deviation, out=deviation)
            np.subtract(np.add.reduce(deviation, 0) / rows, self.var, out=square)
            square *= share
            self.var += square
        np.multiply(delta, delta, out=square)
        square *= share * (1.0 - share)
        self.var += square
        delta *= share
        self.mean += delta
        self.count[...] = count


class ObservationNormalizer:
    """(obs - mean) / sqrt(var + 1e-8), clipped; one set of statistics for all environments."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, clip: float) -> None:
        self.moments = RunningMoments(shape, device)
        self.clip = clip
        self._host = HostMoments(self.moments) if device.type == "cpu" else None

    def step_on_host(self, obs: np.ndarray, out: np.ndarray) -> bool:
        """Take observations [N, *shape] in and write them to `out`, normalised, by numpy.

        Returns False, having done nothing, where an observation is not finite.
        """
        assert self._host is not None
        rows = obs.astype(np.float64)
        if not math.isfinite(np.add.reduce(rows, None)):
            return False
        self._host.update(rows)
        rows -= self._host.mean
        rows /= np.sqrt(self._host.var + EPSILON)
        np.minimum(rows, self.clip, out=rows)
        np.maximum(rows, -self.clip, out=out, casting="same_kind")
        return True

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
        """Normalise a rollout's rewards [T, N] by the statistics after each step; float32.

        Args:
            rewards: [T, N].
            done: [T, N] bool, the end of an episode, where the discounted return starts anew.
            mask: [T, N] bool or None; False rows are skipped and come out as 0.
        """
        rewards = rewards.double()
        decays = torch.full_like(rewards, self.gamma)
        if mask is not None:
            rewards = torch.where(mask, rewards, 0)
            decays.masked_fill_(~mask, 1)
        decays[1:].masked_fill_(done[:-1], 0)
        returns = rewards.clone()
        returns[0].addcmul_(decays[0], self.returns)
        # The scan runs from the last row to the first: time is turned round.
        returns, decays = returns.flip(0), decays.flip(0)
        reverse_linear_scan_(returns, decays)
        returns = returns.flip(0)
        self.returns.copy_(returns[-1].masked_fill(done[-1], 0))
        scaled = rewards / (self._running_var(returns, mask) + EPSILON).sqrt().unsqueeze(1)
        return scaled.clamp_(-self.clip, self.clip).float()

    def _running_var(self, returns: Tensor, mask: Tensor | None) -> Tensor:
        """Merge the rows one after another; return the variance [T] after each."""
        moments = self.moments
        # Sums are taken around the mean so far, which keeps their difference from cancelling.
        shifted = returns - moments.mean
        if mask is None:
            counts = torch.full_like(shifted[:, 0], shifted.shape[1])
        else:
            shifted = torch.where(mask, shifted, 0)
            counts = mask.sum(1).double()
        counts = counts.cumsum(0).add_(moments.count)
        means = shifted.sum(1).cumsum(0).div_(counts)
        squares = shifted.square().sum(1).cumsum(0).add_(moments.var * moments.count).div_(counts)
        variances = squares.sub_(means.square()).clamp_(min=0)
        moments.count.copy_(counts[-1])
        moments.mean.add_(means[-1])
        moments.var.copy_(variances[-1])
        return variances
