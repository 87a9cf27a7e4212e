"""Action distributions: what a network's output means in an action space.

A distribution turns the actor's output ("parameters") into actions, log-probabilities and the PPO
loss. It holds no tensors of its own and no `torch.distributions` objects, whose construction and
validation cost more than the arithmetic on small batches (pytorch #11747).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ppo_fast.functional._terms import Terms
from ppo_fast.functional.gaussian import log_probs_from_gaussian
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.ppo_loss import (
    categorical_gradients,
    gaussian_gradients,
    ppo_loss_from_gaussian,
    ppo_loss_from_logits,
)
from ppo_fast.results import PPOLoss

Parameters = Tensor | tuple[Tensor, Tensor]
"""Logits [M, A], or (mean [M, A], log_std [A] or [M, A])."""


class ActionDistribution(Protocol):
    """The part of a policy that depends on the action space only."""

    num_outputs: int
    """width of the actor's output"""
    action_shape: tuple[int, ...]
    """shape of one stored action"""
    action_dtype: torch.dtype
    """dtype of stored actions"""

    def noise(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Draw the random numbers for actions of leading `shape`."""

    def sample(self, parameters: Parameters, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Pick actions [M, *action_shape] with noise drawn beforehand."""

    def mode(self, parameters: Parameters, mask: Tensor | None) -> Tensor:
        """The most likely actions [M, *action_shape]."""

    def log_probs(self, parameters: Parameters, actions: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities [M], float32."""

    def loss(
        self,
        parameters: Parameters,
        actions: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None,
        **options: Any,
    ) -> PPOLoss:
        """`ppo_loss` of these actions; `options` are its keyword arguments."""

    def to_env(self, actions: Tensor) -> Tensor:
        """Turn stored actions into what the environment takes, [M, *space.shape]."""


def _log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    log_probs = log_probs_from_logits(logits, actions)
    assert isinstance(log_probs, Tensor)  # a pair only with entropy
    return log_probs


class Categorical:
    """One or several categorical choices: Discrete, MultiDiscrete and MultiBinary spaces.

    The parameters are the concatenated logits of all heads; a boolean action mask has their shape
    and marks legal choices with True. A MultiBinary space is heads of two.
    """

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        start: Any = 0
        if isinstance(space, spaces.Discrete):
            self.head_sizes: tuple[int, ...] = (int(space.n),)
            start = int(space.start)
            self.action_shape: tuple[int, ...] = ()
        else:
            if isinstance(space, spaces.MultiDiscrete):
                self.head_sizes = tuple(int(n) for n in space.nvec.reshape(-1))
                start = space.start.reshape(-1).tolist()
            else:
                self.head_sizes = (2,) * math.prod(space.shape)
            self.action_shape = (len(self.head_sizes),)
        self.num_outputs = sum(self.head_sizes)
        self.action_dtype = torch.int64
        self._start = torch.tensor(start) if torch.tensor(start).any() else None
        self._env_shape = tuple(space.shape or ())
        self._env_dtype = torch.from_numpy(np.zeros(0, space.dtype)).dtype

    def noise(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Draw Gumbel noise [*shape, num_outputs]: argmax(logits + noise) is a sample."""
        exponential = torch.empty(*shape, self.num_outputs, device=device)
        return exponential.exponential_(generator=generator).log_().neg_()

    def _choose(self, scores: Tensor) -> Tensor:
        if not self.action_shape:
            return scores.argmax(-1)
        return torch.stack([head.argmax(-1) for head in scores.split(self.head_sizes, -1)], -1)

    def sample(self, parameters: Parameters, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Pick actions by the Gumbel-max rule."""
        assert isinstance(parameters, Tensor)
        scores = parameters + noise
        return self._choose(scores if mask is None else scores.masked_fill(~mask, -math.inf))

    def mode(self, parameters: Parameters, mask: Tensor | None) -> Tensor:
        """The action with the largest logit; the first among equals."""
        assert isinstance(parameters, Tensor)
        return self._choose(
            parameters if mask is None else parameters.masked_fill(~mask, -math.inf)
        )

    def log_probs(self, parameters: Parameters, actions: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities [M], summed over the heads."""
        assert isinstance(parameters, Tensor)
        logits = parameters if mask is None else parameters.masked_fill(~mask, -math.inf)
        if not self.action_shape:
            return _log_probs(logits, actions)
        heads = zip(logits.split(self.head_sizes, -1), actions.unbind(-1), strict=True)
        return torch.stack([_log_probs(head, action) for head, action in heads]).sum(0)

    def loss(
        self,
        parameters: Parameters,
        actions: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None,
        **options: Any,
    ) -> PPOLoss:
        """`ppo_loss_from_logits` of these actions."""
        assert isinstance(parameters, Tensor)
        return ppo_loss_from_logits(
            parameters,
            actions,
            old_log_probs,
            advantages,
            head_sizes=self.head_sizes if self.action_shape else None,
            action_mask=action_mask,
            **options,
        )

    def checked_mask(self, mask: Tensor, rows: int) -> Tensor:
        """Return a mask [rows, num_outputs] that leaves every head a choice.

        Raises:
            ValueError: another shape, or a head without a legal choice.
        """
        if mask.shape != (rows, self.num_outputs):
            raise ValueError(
                f"action mask has shape {tuple(mask.shape)}; expected [rows, sum of choices] = "
                f"{(rows, self.num_outputs)}"
            )
        for head in mask.split(self.head_sizes, -1):
            if not head.any(-1).all():
                raise ValueError("action mask forbids every choice of an action")
        return mask

    def gradients(
        self, parameters: Parameters, actions: Tensor, action_mask: Tensor | None, terms: Terms
    ) -> tuple[PPOLoss, tuple[Tensor, ...]]:
        """The loss without autograd: (result, its gradients by the logits and the values)."""
        assert isinstance(parameters, Tensor)
        head_sizes = self.head_sizes if self.action_shape else None
        result, *gradients = categorical_gradients(
            parameters, actions, head_sizes, action_mask, terms
        )
        return result, tuple(gradients)

    def to_env(self, actions: Tensor) -> Tensor:
        """Add the space's start and restore its shape and dtype."""
        if self._start is not None:
            if self._start.device != actions.device:
                self._start = self._start.to(actions.device)
            actions = actions + self._start
        if self._env_shape and (len(self._env_shape) > 1 or actions.dtype != self._env_dtype):
            actions = actions.reshape(actions.shape[0], *self._env_shape).to(self._env_dtype)
        return actions


class DiagGaussian:
    """Independent normals for Box spaces: clipped into the bounds, or squashed by tanh.

    Stored actions are the raw draws u [M, A] float32; `to_env` clips them, or maps tanh(u) onto the
    bounds. With `squash`, log-probabilities are those of tanh(u).
    """

    def __init__(self, space: spaces.Box, squash: bool = False) -> None:
        self.num_outputs = math.prod(space.shape)
        self.action_shape = (self.num_outputs,)
        self.action_dtype = torch.float32
        self.squash = squash
        self._env_shape = tuple(space.shape)
        # In the space's own dtype: 0.1 in float32 lies above 0.1 in float64.
        self._low = torch.as_tensor(space.low).reshape(-1)
        self._high = torch.as_tensor(space.high).reshape(-1)
        bounded = bool(torch.isfinite(self._low).all() and torch.isfinite(self._high).all())
        if squash and not bounded:
            raise ValueError(
                f"squash = True needs finite bounds, the action space is {space}; use squash = False"
            )

    def noise(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Draw standard normals [*shape, A]."""
        return torch.empty(*shape, self.num_outputs, device=device).normal_(generator=generator)

    def sample(self, parameters: Parameters, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Mean plus noise times the standard deviation."""
        mean, log_std = parameters
        return torch.addcmul(mean, log_std.exp(), noise)

    def mode(self, parameters: Parameters, mask: Tensor | None) -> Tensor:
        """The mean."""
        return parameters[0]

    def log_probs(self, parameters: Parameters, actions: Tensor, mask: Tensor | None) -> Tensor:
        """Log-densities [M], summed over the dimensions."""
        mean, log_std = parameters
        log_probs = log_probs_from_gaussian(mean, log_std, actions, squash=self.squash)
        assert isinstance(log_probs, Tensor)
        return log_probs

    def loss(
        self,
        parameters: Parameters,
        actions: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None,
        **options: Any,
    ) -> PPOLoss:
        """`ppo_loss_from_gaussian` of these actions."""
        mean, log_std = parameters
        return ppo_loss_from_gaussian(
            mean, log_std, actions, old_log_probs, advantages, squash=self.squash, **options
        )

    def gradients(
        self, parameters: Parameters, actions: Tensor, action_mask: Tensor | None, terms: Terms
    ) -> tuple[PPOLoss, tuple[Tensor, ...]]:
        """The loss without autograd: (result, its gradients by mean, log_std and the values)."""
        mean, log_std = parameters
        result, *gradients = gaussian_gradients(mean, log_std, actions, self.squash, terms)
        return result, tuple(gradients)

    def to_env(self, actions: Tensor) -> Tensor:
        """Clip or squash into the bounds and restore the space's shape and dtype."""
        if actions.device != self._low.device:
            self._low, self._high = self._low.to(actions.device), self._high.to(actions.device)
        low, high = self._low, self._high
        if actions.dtype != low.dtype:
            actions = actions.to(low.dtype)
        if self.squash:
            actions = low + (actions.tanh() + 1) * 0.5 * (high - low)
        # Rounding may take a squashed action past its bound, too.
        actions = torch.clamp(actions, low, high)
        if len(self._env_shape) == 1:
            return actions
        return actions.reshape(actions.shape[0], *self._env_shape)

    def checked_mask(self, mask: Tensor, rows: int) -> Tensor:
        """Refuse a mask: there is no choice to forbid.

        Raises:
            ValueError: always.
        """
        raise ValueError("an action mask is given, but the actions are continuous")


def distribution_for(space: spaces.Space, squash: bool = False) -> Categorical | DiagGaussian:
    """Choose the distribution of an action space.

    Raises:
        ValueError: a space PPO has no distribution for here.
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return Categorical(space)
    if isinstance(space, spaces.Box):
        return DiagGaussian(space, squash)
    raise ValueError(
        f"action space {space} is not supported; expected Discrete, MultiDiscrete, MultiBinary or Box"
    )
