"""Gaussian policies for `ppo_loss_from_gaussian`: log-probs, entropies and their derivatives."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppo_fast.functional._terms import Scalar

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_2 = math.log(2)


class Policy(NamedTuple):
    """What the gradient needs of the forward pass; [M, A] unless said."""

    z: Tensor
    inv_std: Tensor
    """[A] or [M, A]."""
    log_probs: Tensor
    """[M]."""
    entropy: Tensor
    """[M]."""


def check(op: str, mean: Tensor, log_std: Tensor, actions: Tensor) -> None:
    if mean.ndim == 0:
        raise ValueError(f"{op}: mean is 0-d; expected [..., A]")
    if actions.shape != mean.shape:
        raise ValueError(
            f"{op}: actions is {list(actions.shape)}; expected the shape of mean, {list(mean.shape)}"
        )
    if log_std.shape not in (mean.shape, mean.shape[-1:]):
        raise ValueError(
            f"{op}: log_std is {list(log_std.shape)}; expected {list(mean.shape[-1:])} or the "
            f"shape of mean, {list(mean.shape)}"
        )


def log_det_tanh(u: Tensor) -> Tensor:
    """log |d tanh(u) / du| = log(1 - tanh(u)^2), summed over the last dimension, at any u."""
    return 2 * (LOG_2 - u - softplus(-2 * u)).sum(-1)


def evaluate(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    drop: Tensor | None,
    dtype: torch.dtype,
) -> Policy:
    """Evaluate `actions` row by row; masked rows are finite where the gradient reads them."""
    size = mean.shape[-1]
    state_dependent = log_std.ndim > 1
    mean, actions = mean.reshape(-1, size).to(dtype), actions.reshape(-1, size).to(dtype)
    log_std = log_std.reshape(-1, size).to(dtype) if state_dependent else log_std.to(dtype)
    if drop is not None and state_dependent:
        log_std = log_std.masked_fill(drop.unsqueeze(1), 0.0)
    inv_std = (-log_std).exp()
    z = (actions - mean).mul_(inv_std)
    if drop is not None:
        z = z.masked_fill(drop.unsqueeze(1), 0.0)
    sum_log_std = log_std.sum(-1)
    log_probs = z.square().sum(-1).mul_(-0.5) - (sum_log_std + size * HALF_LOG_2PI)
    if squash:
        log_probs = log_probs - log_det_tanh(actions)
        return Policy(z, inv_std, log_probs, -log_probs)
    entropy = (sum_log_std + size * (HALF_LOG_2PI + 0.5)).expand_as(log_probs)
    return Policy(z, inv_std, log_probs, entropy)


def gradient(
    policy: Policy, grad_log_probs: Tensor, ent_coef: Scalar, squash: bool
) -> tuple[Tensor, Tensor]:
    """Derivatives of `sum(grad_log_probs log p(action) - ent_coef H)` by mean and log_std.

    `ent_coef` is a number, 0-d or [M].
    """
    if squash:
        grad_log_probs = grad_log_probs + ent_coef
        ent_coef = 0.0
    if isinstance(ent_coef, Tensor) and ent_coef.ndim:
        ent_coef = ent_coef.unsqueeze(1)
    row = grad_log_probs.unsqueeze(1)
    grad_mean = (row * policy.z).mul_(policy.inv_std)
    grad_log_std = (policy.z.square() - 1).mul_(row) - ent_coef
    return grad_mean, grad_log_std.sum(0) if policy.inv_std.ndim == 1 else grad_log_std
