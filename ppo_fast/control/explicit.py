"""Which policies have their gradients written out, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ppo_fast.distributions import Categorical, DiagGaussian
from ppo_fast.functional.mlp import ACTIVATIONS
from ppo_fast.models import ActorCritic, VectorEncoder
from ppo_fast.results import ActorCriticSpec
from ppo_fast.tree import Tree


def why_not_explicit(policy: nn.Module) -> str | None:
    """Say why a policy takes the autograd path; None if it does not."""
    if type(policy) is not ActorCritic:
        return f"{type(policy).__name__} is a module of the user's own"
    if any(True for _ in policy.encoder.parameters()):
        return "its encoder has parameters"
    if policy.activation not in ACTIVATIONS:
        return f"the derivative of {policy.activation} does not follow from its output"
    if not all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters()):
        return "parameters are frozen or not float32"
    for module in policy.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return "it has hooks"
    return None


def spec_of(policy: ActorCritic, distribution: Categorical | DiagGaussian) -> ActorCriticSpec:
    """The architecture of a policy whose encoder has no parameters."""
    head_sizes, squash = None, False
    if isinstance(distribution, DiagGaussian):
        squash = distribution.squash
    else:
        head_sizes = distribution.head_sizes
    return ActorCriticSpec(
        obs_size=policy.encoder.num_features,
        shared_sizes=_widths(policy.trunk),
        actor_sizes=_widths(policy.actor_net)[:-1],
        critic_sizes=_widths(policy.critic_net)[:-1],
        num_outputs=distribution.num_outputs,
        activation=policy.activation,
        head_sizes=head_sizes,
        squash=squash,
    )


def _widths(net: nn.Sequential) -> tuple[int, ...]:
    return tuple(module.out_features for module in net if isinstance(module, nn.Linear))


def features_of(policy: ActorCritic) -> Callable[[Tree], Tensor]:
    """The encoder, or nothing where observations are float vectors already."""
    encoders = list(policy.encoder.encoders)
    lone = encoders[0] if len(encoders) == 1 else None
    if isinstance(lone, VectorEncoder) and lone.is_plain and policy.encoder.paths == [""]:
        return _as_is
    return policy.encoder


def _as_is(obs: Tree) -> Tensor:
    assert isinstance(obs, Tensor)
    return obs
