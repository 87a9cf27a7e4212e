"""The loss of a minibatch of a control policy, with its gradient by the quickest way there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.capture import may_read
from ppo_fast.config import PPOConfig
from ppo_fast.control.cpu_minibatches import CPUMinibatches, why_not_here
from ppo_fast.control.explicit import features_of, spec_of, why_not_explicit
from ppo_fast.control.precision import in_precision, matmul_dtype_of
from ppo_fast.dispatch import current_backend
from ppo_fast.distributions import Categorical, DiagGaussian
from ppo_fast.functional.actor_critic import ActorCriticWorkspace, actor_critic_loss_and_grads
from ppo_fast.models import ActorCritic
from ppo_fast.results import PPOLoss
from ppo_fast.rollout import Batch
from ppo_fast.update import APPROX_KL, FlatAdam, Minibatches

Options = Callable[[], dict[str, Any]]
"""Gives the keyword arguments of `ppo_loss` in force: coefficients, clips, variants."""


class AutogradLoss:
    """The loss of any policy module; its gradient is autograd's."""

    def __init__(
        self,
        policy: Any,
        distribution: Categorical | DiagGaussian,
        options: Options,
    ) -> None:
        self.policy = policy
        self.distribution = distribution
        self.options = options

    def __call__(self, batch: Batch) -> PPOLoss:
        """See `ppo_fast.update.ppo_update`."""
        parameters, values = self.policy(batch.inputs)
        return self.distribution.loss(
            parameters,
            batch.actions,
            batch.log_probs,
            batch.advantages,
            batch.action_mask,
            values=values.reshape(-1),
            old_values=batch.values,
            returns=batch.returns,
            mask=batch.mask,
            weights=batch.weights,
            **self.options(),
        )


class ExplicitLoss:
    """The loss of an `ActorCritic` of MLPs, by `actor_critic_loss_and_grads`.

    Its oracle is `AutogradLoss` (tests/test_loss.py).
    """

    def __init__(
        self,
        policy: ActorCritic,
        distribution: Categorical | DiagGaussian,
        options: Options,
        optimizer: FlatAdam,
        matmul_dtype: torch.dtype | None = None,
    ) -> None:
        self.options = options
        self.matmul_dtype = matmul_dtype
        self.features = features_of(policy)
        self.spec = spec_of(policy, distribution)
        self.parameters, self.gradients = optimizer.flat(policy.parameters())
        self.workspace = ActorCriticWorkspace(self.parameters, self.gradients, self.spec)
        self._on_cpu: CPUMinibatches | None = None

    def minibatches(self, batch: Batch, config: PPOConfig) -> Minibatches:
        """See `ppo_fast.update.ppo_update`."""
        options, epochs, k = self.options(), config.update_epochs, config.num_minibatches
        if may_read(self.parameters.device) and current_backend() in ("auto", "reference"):
            why_not = why_not_here(self.spec, batch, len(batch) // k, options)
            if not why_not:
                if self._on_cpu is None:
                    self._on_cpu = CPUMinibatches(self.parameters, self.gradients, self.spec)
                self._on_cpu.prepare(batch, self.features(batch.inputs), options, epochs, k)
                return self._on_cpu
        return Indexed(self, batch, k)

    def __call__(self, batch: Batch, index: Tensor | None = None) -> PPOLoss:
        """See `ppo_fast.update.ppo_update`."""
        self.workspace.square_sums = None
        return actor_critic_loss_and_grads(
            self.parameters,
            self.gradients,
            self.spec,
            self.features(batch.inputs),
            batch.actions,
            batch.log_probs,
            batch.advantages,
            batch.values,
            batch.returns,
            index,
            action_mask=batch.action_mask,
            mask=batch.mask,
            weights=batch.weights,
            matmul_dtype=self.matmul_dtype,
            workspace=self.workspace,
            **self.options(),
        )


class Indexed:
    """Minibatches that the op reads from the batch where they lie; see `Minibatches`."""

    def __init__(self, loss: ExplicitLoss, batch: Batch, number: int) -> None:
        self._loss, self._batch, self._number = loss, batch, number
        self._order: tuple[Tensor, ...] = ()
        self._stats: list[Tensor] = []

    def begin(self, epoch: int, order: Tensor) -> None:
        """See `Minibatches`."""
        self._order = order.tensor_split(self._number)

    def run(self, number: int) -> Tensor:
        """See `Minibatches`."""
        result = self._loss(self._batch, self._order[number % self._number])
        self._stats.append(result.stats)
        return result.loss

    def approx_kl(self) -> Tensor:
        """See `Minibatches`."""
        return self._stats[-1][APPROX_KL]

    def square_sums(self) -> Tensor | None:
        """See `Minibatches`."""
        return self._loss.workspace.square_sums

    def stats(self) -> Tensor:
        """See `Minibatches`."""
        return torch.stack(self._stats)


def make_loss(
    policy: nn.Module,
    distribution: Categorical | DiagGaussian,
    options: Options,
    optimizer: FlatAdam,
    precision: str = "fp32",
) -> AutogradLoss | ExplicitLoss:
    """Choose the explicit gradient where the policy allows it."""
    evaluator = in_precision(policy, precision, optimizer.device)
    if isinstance(evaluator, ActorCritic) and why_not_explicit(evaluator) is None:
        dtype = matmul_dtype_of(precision)
        return ExplicitLoss(evaluator, distribution, options, optimizer, dtype)
    return AutogradLoss(evaluator, distribution, options)
