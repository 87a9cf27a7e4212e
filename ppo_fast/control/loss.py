"""The loss of a minibatch of a control policy, with its gradient by the quickest way there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.dispatch import current_backend
from ppo_fast.distributions import Categorical, DiagGaussian, Parameters
from ppo_fast.functional._terms import Terms
from ppo_fast.functional.mlp import ACTIVATIONS, Layer, mlp_backward, mlp_forward
from ppo_fast.models import ActorCritic, VectorEncoder, actor_of
from ppo_fast.results import PPOLoss
from ppo_fast.rollout import Batch
from ppo_fast.tree import Tree

Options = Callable[[], dict[str, Any]]
"""Gives the keyword arguments of `ppo_loss` in force: coefficients, clips, variants."""


class AutogradLoss:
    """The loss of any policy module; its gradient is autograd's."""

    def __init__(
        self, policy: nn.Module, distribution: Categorical | DiagGaussian, options: Options
    ) -> None:
        self.policy = policy
        self.distribution = distribution
        self.options = options

    def __call__(self, batch: Batch) -> PPOLoss:
        """See `ppo_fast.update.ppo_update`."""
        parameters, values = self.policy(batch.inputs)
        return _loss(self.distribution, self.options, batch, parameters, values.reshape(-1))


class ExplicitLoss:
    """The loss of an `ActorCritic` of two MLPs; its gradient is written out, layer by layer.

    Its oracle is `AutogradLoss` (tests/test_loss.py). Make it after the optimizer, which moves the
    parameters into its own buffers.
    """

    def __init__(
        self, policy: ActorCritic, distribution: Categorical | DiagGaussian, options: Options
    ) -> None:
        self.policy = policy
        self.distribution = distribution
        self.options = options
        self.features = _features(policy)
        self.actor, self.critic = _layers(policy.actor_net), _layers(policy.critic_net)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PPOLoss:
        """Return the loss, detached, and leave its gradient in the parameters' `grad`."""
        policy, activation = self.policy, self.policy.activation
        features = self.features(batch.inputs)
        actor = mlp_forward(features, self.actor, activation)
        critic = mlp_forward(features, self.critic, activation)
        outputs, values = actor[-1], critic[-1].view(-1)
        if outputs.is_cpu and current_backend() in ("auto", "reference"):
            result, gradients = self._reference(batch, outputs, values)
        else:
            result, gradients = self._dispatched(batch, outputs, values)
        mlp_backward(gradients[0], actor, self.actor, activation)
        mlp_backward(gradients[-1].unsqueeze(1), critic, self.critic, activation)
        if policy.log_std is not None:
            assert policy.log_std.grad is not None
            policy.log_std.grad.copy_(gradients[1])
        return result

    def _parameters(self, outputs: Tensor) -> Parameters:
        log_std = self.policy.log_std
        return outputs if log_std is None else (outputs, log_std)

    def _reference(
        self, batch: Batch, outputs: Tensor, values: Tensor
    ) -> tuple[PPOLoss, tuple[Tensor, ...]]:
        """The reference itself: on small batches the op's autograd node costs a sixth of it."""
        terms = Terms(
            old_log_probs=batch.log_probs,
            advantages=batch.advantages,
            values=values,
            old_values=batch.values,
            returns=batch.returns,
            mask=batch.mask,
            weights=batch.weights,
            **self.options(),
        )
        parameters = self._parameters(outputs)
        return self.distribution.gradients(parameters, batch.actions, batch.action_mask, terms)

    def _dispatched(
        self, batch: Batch, outputs: Tensor, values: Tensor
    ) -> tuple[PPOLoss, tuple[Tensor, ...]]:
        """The op by the backend in force, its kernel on a GPU."""
        inputs = [outputs.requires_grad_(), values.requires_grad_()]
        if self.policy.log_std is not None:
            inputs.insert(1, self.policy.log_std)
        with torch.enable_grad():
            parameters = self._parameters(outputs)
            result = _loss(self.distribution, self.options, batch, parameters, values)
            gradients = torch.autograd.grad(result.loss, inputs)
        return PPOLoss(result.loss.detach(), result.stats), gradients


def make_loss(
    policy: nn.Module, distribution: Categorical | DiagGaussian, options: Options
) -> AutogradLoss | ExplicitLoss:
    """Choose the explicit gradient where the policy allows it."""
    if why_not_explicit(policy) is None:
        assert isinstance(policy, ActorCritic)
        return ExplicitLoss(policy, distribution, options)
    return AutogradLoss(policy, distribution, options)


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


def make_actor(policy: nn.Module) -> Callable[[Tree], Parameters]:
    """Return what computes the actor's output during a rollout, when no gradient is needed.

    Make it after the optimizer; it follows the parameters' values, not their replacement.
    """
    if why_not_explicit(policy) is not None:
        return lambda obs: actor_of(policy, obs)
    assert isinstance(policy, ActorCritic)
    layers, activation, features = _layers(policy.actor_net), policy.activation, _features(policy)
    log_std = None if policy.log_std is None else policy.log_std.detach()

    def act(obs: Tree) -> Parameters:
        outputs = mlp_forward(features(obs), layers, activation)[-1]
        return outputs if log_std is None else (outputs, log_std)

    return act


def _features(policy: ActorCritic) -> Callable[[Tree], Tensor]:
    """The encoder, or nothing where observations are float vectors already."""
    encoders = list(policy.encoder.encoders)
    lone = encoders[0] if len(encoders) == 1 else None
    if isinstance(lone, VectorEncoder) and lone.is_plain and policy.encoder.paths == [""]:
        return _as_is
    return policy.encoder


def _as_is(obs: Tree) -> Tensor:
    assert isinstance(obs, Tensor)
    return obs


def _layers(net: nn.Sequential) -> list[Layer]:
    linears = [module for module in net if isinstance(module, nn.Linear)]
    layers = []
    for linear in linears:
        weight, bias = linear.weight.detach(), linear.bias.detach()
        grad_weight, grad_bias = linear.weight.grad, linear.bias.grad
        if grad_weight is None or grad_bias is None:
            raise ValueError("the parameters have no gradients yet; make the optimizer first")
        layers.append(Layer(weight, weight.t(), bias, grad_weight, grad_bias))
    return layers


def _loss(
    distribution: Categorical | DiagGaussian,
    options: Options,
    batch: Batch,
    parameters: Parameters,
    values: Tensor,
) -> PPOLoss:
    return distribution.loss(
        parameters,
        batch.actions,
        batch.log_probs,
        batch.advantages,
        batch.action_mask,
        values=values,
        old_values=batch.values,
        returns=batch.returns,
        mask=batch.mask,
        weights=batch.weights,
        **options(),
    )
