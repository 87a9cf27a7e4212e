"""Gaussian policies for `ppo_loss_from_gaussian`: log-probs, entropies and their derivatives."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppo_fast.functional._surrogate import Summands, Surrogate, surrogate
from ppo_fast.functional._terms import Rows, Scalar, Terms, is_on, row_ent_coef

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_2 = math.log(2)


class Policy(NamedTuple):
    """What the gradient needs of the forward pass; [A, M] unless said."""

    z: Tensor
    inv_std: Tensor
    """[A, 1] or [A, M]."""
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


def log_det_tanh(u: Tensor, dim: int = -1) -> Tensor:
    """log |d tanh(u) / du| = log(1 - tanh(u)^2), summed over the dimension `dim`, at any u."""
    return 2 * (LOG_2 - u - softplus(-2 * u)).sum(dim)


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
    log_std = log_std.reshape(-1, size).t() if state_dependent else log_std.unsqueeze(1)
    return evaluate_columns(mean.t(), log_std.to(dtype), actions.t(), squash, drop)


def evaluate_columns(
    mean: Tensor, log_std: Tensor, actions: Tensor, squash: bool, drop: Tensor | None
) -> Policy:
    """`evaluate` of tensors [A, M], `log_std` [A, M] or [A, 1]."""
    size = mean.shape[0]
    if drop is not None and log_std.shape == mean.shape:
        log_std = log_std.masked_fill(drop, 0.0)
    inv_std = (-log_std).exp()
    z = (actions - mean).mul_(inv_std)
    if drop is not None:
        z = z.masked_fill(drop, 0.0)
    sum_log_std = log_std.sum(0)
    constant = sum_log_std + size * HALF_LOG_2PI
    log_probs = torch.add(constant, z.square().sum(0), alpha=0.5).neg_()
    if squash:
        log_probs = log_probs - log_det_tanh(actions, 0)
        return Policy(z, inv_std, log_probs, -log_probs)
    entropy = (sum_log_std + size * (HALF_LOG_2PI + 0.5)).expand_as(log_probs)
    return Policy(z, inv_std, log_probs, entropy)


def gradient(
    policy: Policy, grad_log_probs: Tensor, ent_coef: Scalar, squash: bool
) -> tuple[Tensor, Tensor]:
    """Derivatives of `sum(grad_log_probs log p(action) - ent_coef H)` by mean and log_std.

    `ent_coef` is a number, 0-d or [M]. Returns [A, M], and [A] or, state-dependent, [A, M].
    """
    if squash:
        grad_log_probs = grad_log_probs + ent_coef
        ent_coef = 0.0
    grad_mean = (policy.z * grad_log_probs).mul_(policy.inv_std)
    grad_log_std = (policy.z.square() - 1).mul_(grad_log_probs)
    if is_on(ent_coef):
        grad_log_std -= ent_coef
    return grad_mean, grad_log_std.sum(1) if policy.inv_std.shape[1] == 1 else grad_log_std


def columns(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    squash: bool,
    rows: Rows,
    t: Terms,
    summands: Summands | None = None,
) -> tuple[Surrogate, Tensor, Tensor]:
    """The loss's terms and n d loss / d mean, log_std; [A, M], `log_std` [A, M] or [A, 1].

    `summands`: see `surrogate`.
    """
    policy = evaluate_columns(mean, log_std, actions, squash, rows.drop)
    part = surrogate(policy.log_probs, policy.entropy, rows, t, summands)
    return part, *gradient(policy, part.grad_log_probs, row_ent_coef(rows, t), squash)
