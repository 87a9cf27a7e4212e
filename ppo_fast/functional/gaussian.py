"""Log-probs and entropies of diagonal Gaussian policies, plain and squashed by tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._gaussian import HALF_LOG_2PI, check, log_det_tanh


@accelerated
def log_probs_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    *,
    squash: bool = False,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of actions under a Gaussian policy with diagonal covariance.

        z = (actions - mean) / exp(log_std)
        log_probs = sum_A (-z^2 / 2 - log_std - log(2 pi) / 2)
        entropy   = sum_A (log_std + log(2 pi e) / 2)

    With `squash` the policy acts with tanh(u), u Gaussian, and `actions` holds u (Haarnoja et al.
    2018, appendix C, arXiv:1801.01290):

        log_probs = (the above) - sum_A log(1 - tanh(u)^2) = ... - sum_A 2 (log 2 - u - softplus(-2u))
        entropy   = -log_probs, the estimate from the one sample

    Differentiable by autograd in all three tensors.

    Args:
        mean: [..., A] floating.
        log_std: [A], or [..., A] for a state-dependent one.
        actions: [..., A]; before the tanh if `squash`.
        squash: whether the environment received tanh(actions).
        with_entropy: also return the entropy.

    Returns:
        log_probs, or (log_probs, entropy): [...], nats; float32, or float64 where `mean` is.

    Raises:
        ValueError: actions or log_std is misshapen.
    """
    check("log_probs_from_gaussian", mean, log_std, actions)
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    mean, log_std, actions = mean.to(dtype), log_std.to(dtype), actions.to(dtype)
    size = mean.shape[-1]
    z = (actions - mean) * (-log_std).exp()
    sum_log_std = log_std.sum(-1)
    log_probs = -0.5 * z.square().sum(-1) - (sum_log_std + size * HALF_LOG_2PI)
    if squash:
        log_probs = log_probs - log_det_tanh(actions)
    if not with_entropy:
        return log_probs
    if squash:
        return log_probs, -log_probs
    return log_probs, (sum_log_std + size * (HALF_LOG_2PI + 0.5)).expand_as(log_probs)
