"""The PPO loss straight from small heads: categorical, multi-discrete and Gaussian."""

from __future__ import annotations

from torch import Tensor

from ppo_fast.kernels._surrogate import Packed, Scalar
from ppo_fast.results import PPOLoss

WIDEST_HEAD = 128
"""Logits of one head beyond which it is a vocabulary."""


def loss_from_heads(
    logits: Tensor,
    actions: Tensor,
    head_sizes: tuple[int, ...],
    action_mask: Tensor | None,
    temperature: Scalar,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    raise NotImplementedError


def loss_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    values: Tensor | None,
    terms: Packed,
) -> PPOLoss:
    raise NotImplementedError
