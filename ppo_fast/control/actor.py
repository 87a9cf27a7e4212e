"""What acts during a rollout: the actor's outputs, turned into actions by noise drawn beforehand."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ppo_fast.control.explicit import features_of, why_not_explicit
from ppo_fast.distributions import Categorical, DiagGaussian
from ppo_fast.functional.mlp import Hidden, Layer, hidden_forward
from ppo_fast.models import ActorCritic, actor_of
from ppo_fast.tree import Tree


class Actor(Protocol):
    """Fills the rows of a rollout's actions."""

    def begin(self, noise: Tensor) -> None:
        """Take the noise [T, N, ...] of a rollout, which it may overwrite."""

    def act(self, t: int, obs: Tree, mask: Tensor | None) -> Tensor:
        """Write the actions [N, *action_shape] for the observations of step t, and return them."""


class ModuleActor:
    """The actor of any policy module.

    Args:
        policy: see `ppo_fast.models`.
        distribution: of its actions.
        actions: [T, N, *action_shape], written row by row.
    """

    def __init__(
        self, policy: nn.Module, distribution: Categorical | DiagGaussian, actions: Tensor
    ) -> None:
        self.policy, self.distribution = policy, distribution
        self.rows = actions.unbind(0)

    def begin(self, noise: Tensor) -> None:
        """See `Actor`."""
        self.noise = noise.unbind(0)

    def act(self, t: int, obs: Tree, mask: Tensor | None) -> Tensor:
        """See `Actor`."""
        parameters = actor_of(self.policy, obs)
        return self.rows[t].copy_(self.distribution.sample(parameters, self.noise[t], mask))


class MLPActor:
    """The actor of an `ActorCritic` of MLPs: two operations a layer, one or two to pick the action.

    The last bias goes into the noise beforehand, as does a Gaussian's standard deviation, so that the
    last product gives the actions themselves, or the scores whose largest is the action.
    Make it after the optimizer; it follows the parameters' values, not their replacement.
    """

    def __init__(
        self, policy: ActorCritic, distribution: Categorical | DiagGaussian, actions: Tensor
    ) -> None:
        self.features = features_of(policy)
        self.activation = policy.activation
        linears = [module for module in policy.actor_net if isinstance(module, nn.Linear)]
        weights = [(module.weight.detach(), module.bias.detach()) for module in linears]
        self.layers = [Layer.of(*pair, *pair) for pair in weights[:-1]]
        self.last, self.last_bias = weights[-1][0].t(), weights[-1][1]
        self.log_std = None if policy.log_std is None else policy.log_std.detach()
        rows = actions.shape[1]
        self.hidden = [
            Hidden.empty(rows, layer.bias.numel(), self.activation, layer.bias)
            for layer in self.layers
        ]
        self.rows = actions.unbind(0)
        self.scores = self.last_bias.new_empty(rows, distribution.num_outputs)
        self.heads: list[tuple[Tensor, list[Tensor]]] = []
        if isinstance(distribution, Categorical):
            parts = self.scores.split(distribution.head_sizes, 1)
            columns = actions.unsqueeze(-1) if actions.ndim == 2 else actions
            picks = [columns[..., head].unbind(0) for head in range(len(parts))]
            self.heads = [(part, list(pick)) for part, pick in zip(parts, picks, strict=True)]

    def begin(self, noise: Tensor) -> None:
        """See `Actor`."""
        if self.log_std is not None:
            noise.mul_(self.log_std.exp())
        self.noise = noise.add_(self.last_bias).unbind(0)

    def act(self, t: int, obs: Tree, mask: Tensor | None) -> Tensor:
        """See `Actor`."""
        inputs = self.features(obs)
        hidden_forward(inputs, self.layers, self.hidden, self.activation)
        last = self.hidden[-1].outputs if self.hidden else inputs
        if not self.heads:
            return torch.addmm(self.noise[t], last, self.last, out=self.rows[t])
        torch.addmm(self.noise[t], last, self.last, out=self.scores)
        if mask is not None:
            self.scores.masked_fill_(~mask, -torch.inf)
        for scores, picks in self.heads:
            torch.argmax(scores, 1, out=picks[t])
        return self.rows[t]


def make_actor(
    policy: nn.Module, distribution: Categorical | DiagGaussian, actions: Tensor
) -> ModuleActor | MLPActor:
    """Choose the quickest actor a policy allows; arguments as of `ModuleActor`."""
    if why_not_explicit(policy) is not None:
        return ModuleActor(policy, distribution, actions)
    assert isinstance(policy, ActorCritic)
    return MLPActor(policy, distribution, actions)
