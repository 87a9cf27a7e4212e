"""What acts during a rollout: the actor's outputs, turned into actions by noise drawn beforehand."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_fast.control.explicit import features_of, why_not_explicit
from ppo_fast.control.precision import Autocast
from ppo_fast.distributions import Categorical, DiagGaussian
from ppo_fast.functional.mlp import Hidden, Layer, hidden_forward
from ppo_fast.models import ActorCritic, actor_of
from ppo_fast.rollout import Rollout
from ppo_fast.tree import Tree


class Actor(Protocol):
    """Fills the rows of a rollout's actions."""

    also_scores: bool
    """whether it fills those of its values and log-probabilities, too"""

    def begin(self, noise: Tensor) -> None:
        """Take the noise [T, N, ...] of a rollout, which it may overwrite."""

    def act(self, t: int, obs: Tree, mask: Tensor | None) -> Tensor:
        """Write the actions [N, *action_shape] for the observations of step t, and return them."""


class ModuleActor:
    """The actor of any policy module.

    Args:
        policy: see `ppo_fast.models`.
        distribution: of its actions.
        rollout: its rows are written.
        also_scores: run the whole policy, and keep values and log-probabilities.
    """

    def __init__(
        self,
        policy: Any,
        distribution: Categorical | DiagGaussian,
        rollout: Rollout,
        also_scores: bool = False,
    ) -> None:
        self.policy, self.distribution, self.also_scores = policy, distribution, also_scores
        self.rows = rollout.actions.unbind(0)
        self.values, self.log_probs = rollout.values.unbind(0), rollout.log_probs.unbind(0)

    def begin(self, noise: Tensor) -> None:
        """See `Actor`."""
        self.noise = noise.unbind(0)

    def act(self, t: int, obs: Tree, mask: Tensor | None) -> Tensor:
        """See `Actor`."""
        if not self.also_scores:
            parameters = actor_of(self.policy, obs)
            return self.rows[t].copy_(self.distribution.sample(parameters, self.noise[t], mask))
        parameters, values = self.policy(obs)
        self.rows[t].copy_(self.distribution.sample(parameters, self.noise[t], mask))
        self.values[t].copy_(values.reshape(-1))
        self.log_probs[t].copy_(self.distribution.log_probs(parameters, self.rows[t], mask))
        return self.rows[t]


class MLPActor:
    """The actor of an `ActorCritic` of MLPs: two operations a layer, one or two to pick the action.

    The last bias goes into the noise beforehand, as does a Gaussian's standard deviation, so that the
    last product gives the actions themselves, or the scores whose largest is the action.
    Make it after the optimizer; it follows the parameters' values, not their replacement.
    """

    also_scores = False

    def __init__(
        self, policy: ActorCritic, distribution: Categorical | DiagGaussian, rollout: Rollout
    ) -> None:
        actions = rollout.actions
        self.features = features_of(policy)
        self.activation = policy.activation
        modules = [*policy.trunk, *policy.actor_net]
        linears = [module for module in modules if isinstance(module, nn.Linear)]
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
    policy: Any, distribution: Categorical | DiagGaussian, rollout: Rollout
) -> ModuleActor | MLPActor:
    """Choose the quickest actor a policy allows; arguments as of `ModuleActor`."""
    if isinstance(policy, ActorCritic) and why_not_explicit(policy) is None:
        return MLPActor(policy, distribution, rollout)
    module = policy.policy if isinstance(policy, Autocast) else policy
    # Where actor and critic share convolutions, both come at the price of one.
    shared = isinstance(module, ActorCritic) and any(True for _ in module.encoder.parameters())
    return ModuleActor(policy, distribution, rollout, also_scores=shared)
