"""The PPO loss straight from the logits of a large vocabulary."""

from __future__ import annotations

from torch import Tensor

from ppo_fast.kernels._surrogate import Packed, Scalar
from ppo_fast.results import PPOLoss


def loss_from_vocabulary(
    logits: Tensor,
    actions: Tensor,
    action_mask: Tensor | None,
    temperature: Scalar,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    raise NotImplementedError
