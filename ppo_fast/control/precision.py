"""A policy whose products run in bfloat16 where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.control.explicit import why_not_explicit
from ppo_fast.distributions import Parameters
from ppo_fast.models import actor_of, critic_of
from ppo_fast.tree import Tree


class Autocast:
    """A policy under `torch.autocast` in bfloat16; its outputs are float32.

    Rollout, old log-probabilities and update use the same, so the first minibatch's ratio is 1 up to
    what other batch sizes round differently.
    """

    def __init__(self, policy: nn.Module, device: torch.device) -> None:
        self.policy = policy
        self.device_type = device.type

    def _under(self) -> torch.autocast:
        return torch.autocast(self.device_type, torch.bfloat16)

    def __call__(self, obs: Tree) -> tuple[Parameters, Tensor]:
        """Distribution parameters and values."""
        with self._under():
            parameters, values = self.policy(obs)
        return _float(parameters), values.float()

    def actor(self, obs: Tree) -> Parameters:
        """Distribution parameters."""
        with self._under():
            parameters = actor_of(self.policy, obs)
        return _float(parameters)

    def critic(self, obs: Tree) -> Tensor:
        """Values [M]."""
        with self._under():
            values = critic_of(self.policy, obs)
        return values.float()


def _float(parameters: Parameters) -> Parameters:
    if isinstance(parameters, Tensor):
        return parameters.float()
    return parameters[0].float(), parameters[1].float()


def matmul_dtype_of(precision: str) -> torch.dtype | None:
    """What `actor_critic_loss_and_grads` takes for it."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def in_precision(policy: nn.Module, precision: str, device: torch.device) -> Any:
    """The policy as rollouts and losses call it: itself, or under autocast.

    Raises:
        ValueError: fp16 for a policy or a device that has no such kernel.
    """
    in_kernel = device.type == "cuda" and why_not_explicit(policy) is None
    if precision == "fp16" and not in_kernel:
        why = why_not_explicit(policy) or f"the policy is on {device}"
        raise ValueError(
            f"precision = 'fp16' is for the kernel of MLP policies on a GPU, but {why}; "
            "use precision = 'bf16' or 'fp32'"
        )
    if precision == "bf16" and not in_kernel:
        return Autocast(policy, device)
    return policy
