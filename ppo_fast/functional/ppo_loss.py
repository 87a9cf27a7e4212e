"""The PPO loss from log-probs, from categorical logits and from a Gaussian.

One equation (`ppo_loss`), three places to enter it. The gradient is computed together with the loss
and only scaled in the backward pass, so an update costs one sweep over the minibatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional import _categorical, _gaussian
from ppo_fast.functional._rows import compute_dtype
from ppo_fast.functional._surrogate import assemble, surrogate
from ppo_fast.functional._terms import (
    Scalar,
    Terms,
    check_rows,
    check_terms,
    flat,
    row_ent_coef,
    to_rows,
)
from ppo_fast.results import PPOLoss


def _validate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    **options: Any,
) -> None:
    op, t = "ppo_loss", Terms(old_log_probs, advantages, **options)
    _check_floating(log_probs)
    check_terms(op, t, entropy_given=entropy is not None)
    check_rows(op, t, log_probs.shape)
    if entropy is not None:
        flat(op, "entropy", entropy, log_probs.shape)


def _check_floating(log_probs: Tensor) -> None:
    if not log_probs.is_floating_point():
        raise ValueError(f"ppo_loss: log_probs is {log_probs.dtype}; expected a floating dtype")


def _validate_from_logits(
    logits: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    head_sizes: tuple[int, ...] | None = None,
    action_mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    **options: Any,
) -> None:
    op, t = "ppo_loss_from_logits", Terms(old_log_probs, advantages, **options)
    check_terms(op, t, entropy_given=True)
    _categorical.check(logits, actions, head_sizes, action_mask, temperature)
    check_rows(op, t, logits.shape[:-1])


def _validate_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    squash: bool = False,
    **options: Any,
) -> None:
    op, t = "ppo_loss_from_gaussian", Terms(old_log_probs, advantages, **options)
    check_terms(op, t, entropy_given=True)
    _gaussian.check(op, mean, log_std, actions)
    check_rows(op, t, mean.shape[:-1])


@accelerated(validate=_validate)
def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_coef: Scalar,
    clip_coef_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: Scalar = 0.5,
    vf_clip_coef: Scalar | None = None,
    vf_clip: str = "max",
    entropy: Tensor | None = None,
    ent_coef: Scalar = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: Scalar = 0.0,
    kl_estimator: str = "k3",
    old_kl_coef: Scalar = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    norm_adv: bool = False,
    advantage_moments: Tensor | None = None,
    normalizer: Scalar | None = None,
) -> PPOLoss:
    """PPO with clipped surrogate (Schulman et al. 2017, eq. 7 and 9, arXiv:1707.06347).

        r    = exp(clamp(log_probs - old_log_probs, -20, 20))
        loss = mean(w policy) + vf_coef mean(w value) - ent_coef mean(w entropy)
               + kl_coef mean(w kl) + old_kl_coef mean(w (r - 1 - log r))
        policy = max(-A r, -A clamp(r, 1 - clip_coef, 1 + clip_coef_high))
        value  = 0.5 (V - R)^2, clipped as below
        kl     = an estimate of KL(policy || reference) from d = ref_log_probs - log_probs, clamped
                 to +-20: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (Schulman 2020)

    Means run over the unmasked elements and divide by their number, or by `normalizer`. Where a
    clamp is active the gradient through it is 0; an element on the edge of a range is inside. Where
    two branches of a maximum tie, the gradient is that of the unclipped one.

    Coming from CleanRL, all coefficients keep their meaning. Stable-Baselines3 (and rsl_rl) have no
    factor 0.5 in the value loss: their `vf_coef` is half of ours, and their value clip is
    `vf_clip="clipped"` (rsl_rl: "max").

    Args:
        log_probs: any shape, floating; log-probs of the actions taken under the policy in training.
            Differentiable.
        old_log_probs: same shape; under the policy that acted.
        advantages: same shape; a constant.
        clip_coef: epsilon; the ratio is clipped to [1 - clip_coef, 1 + clip_coef].
        clip_coef_high: epsilon upwards, if other than `clip_coef` ("clip-higher", DAPO).
        dual_clip: c > 1; where A < 0 the policy term is at most -c A (Ye et al. 2020, eq. 5,
            arXiv:1912.09729).
        values: same shape, V of the critic in training; differentiable. None for no value loss.
        old_values: same shape, V of the critic that acted; needed by `vf_clip_coef`.
        returns: same shape, R; needed by `values`.
        vf_coef: weight of the value loss.
        vf_clip_coef: how far a value may move from the old one; None does not clip.
        vf_clip: "max" takes the larger of the unclipped and the clipped square (OpenAI baselines,
            CleanRL), "clipped" the clipped one alone (Stable-Baselines3).
        entropy: same shape, nats; differentiable. Needed by `ent_coef`.
        ent_coef: weight of the entropy bonus.
        ref_log_probs: same shape; under a reference policy. The KL is reported even at weight 0.
        kl_coef: weight of the KL to the reference.
        kl_estimator: "k1", "k2" or "k3". The gradient is that of the estimate itself, at fixed
            samples: k1's is, in expectation, no gradient of the KL at all; k2's is.
        old_kl_coef: weight of the k3 estimate of KL(old || policy) (PPO paper, section 4).
        mask: same shape, bool. False: the element is never read (it may be NaN) and counts nowhere.
        weights: same shape; multiplies an element's whole contribution to the loss, not the number
            the means divide by. Fractions and ratio statistics are not weighted.
        norm_adv: whiten the advantages over the unmasked elements of this call, (A - mean) / (std
            + 1e-8) with the unbiased std; fewer than two elements stay as they are.
        advantage_moments: [3], count, mean and sum of squared deviations to whiten the advantages by,
            as `gae(..., with_moments=True)` returns them: over the whole batch rather than this
            call, and without a pass over it. Takes the place of `norm_adv`.
        normalizer: what the means divide by instead of the count, for gradients over micro-batches
            that add up to those of the batch; 0 counts as 1.

    All coefficients are floats or 0-d tensors; tensors are not read back to the host.

    Returns:
        PPOLoss: `loss`, differentiable by `log_probs`, `values` and `entropy`, and `stats`. float32,
        or float64 where `log_probs` is. An empty or fully masked batch has loss 0 and gradients 0.

    Raises:
        ValueError: shapes differ, an argument that another one needs is missing, a coefficient is
            out of range, the mask is not bool, or advantages requires a gradient.
    """
    op, shape, dtype = "ppo_loss", log_probs.shape, compute_dtype(log_probs)
    _check_floating(log_probs)
    t = Terms(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        ref_log_probs=ref_log_probs,
        mask=mask,
        weights=weights,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        vf_coef=vf_coef,
        vf_clip_coef=vf_clip_coef,
        vf_clip=vf_clip,
        ent_coef=ent_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        old_kl_coef=old_kl_coef,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    check_terms(op, t, entropy_given=entropy is not None)
    with torch.no_grad():
        rows, count, inv_n = to_rows(op, t, shape, dtype)
        flat_entropy = None if entropy is None else flat(op, "entropy", entropy, shape).to(dtype)
        part = surrogate(log_probs.reshape(-1).to(dtype), flat_entropy, rows, t)
        grad_entropy = None
        if entropy is not None:
            grad_entropy = torch.ones_like(rows.neg_advantages) * -row_ent_coef(rows, t)
    gradients = [
        (log_probs, part.grad_log_probs),
        (values, part.grad_values),
        (entropy, grad_entropy),
    ]
    return assemble(part, count, inv_n, t, gradients)


@accelerated(validate=_validate_from_logits)
def ppo_loss_from_logits(
    logits: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_coef: Scalar,
    head_sizes: tuple[int, ...] | None = None,
    action_mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    clip_coef_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: Scalar = 0.5,
    vf_clip_coef: Scalar | None = None,
    vf_clip: str = "max",
    ent_coef: Scalar = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: Scalar = 0.0,
    kl_estimator: str = "k3",
    old_kl_coef: Scalar = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    norm_adv: bool = False,
    advantage_moments: Tensor | None = None,
    normalizer: Scalar | None = None,
) -> PPOLoss:
    """`ppo_loss` of a categorical policy, straight from its logits.

        log_probs = log_softmax(logits / temperature)[actions],  entropy = -sum p log p

    The gradient by the logits is d_j = g (1[j = action] - p_j) + c p_j (log p_j + entropy) with g
    the loss's derivative by the row's log-prob and c its entropy weight. Many or wide rows are
    processed in blocks that fit the cache: the one buffer as large as the logits is their gradient.

    Several heads ("multi-discrete") lie side by side in the logits; log-probs and entropies add up.

    A logit of -inf is an illegal action: probability 0, gradient 0. A row of nothing else has
    entropy 0 and gradient 0 and is counted. An action taken though illegal, a mistake in the data,
    has log-prob -1e9: its ratio is e^-20, with gradient 0, unless its old log-prob is as low.

    Args:
        logits: [..., A] floating, or [..., V]; any strides. Differentiable.
        actions: [...] integer, or [..., len(head_sizes)] where `head_sizes` is given.
        old_log_probs, advantages: [...].
        head_sizes: sizes of the heads, whose sum is A; None is one head.
        action_mask: bool, the shape of the logits; False is an illegal action, whose logit is
            never read.
        temperature: divides the logits; to be the one used in sampling.
        clip_coef: as in `ppo_loss`, with all further arguments; their shape is [...].

    Returns:
        PPOLoss: `loss`, differentiable by `logits` and `values`; `stats`, always with the entropy.

    Raises:
        ValueError: as `ppo_loss`; or actions is not integer, action_mask is not bool or misshapen,
            head_sizes do not add up to A, temperature is not positive.
    """
    op, shape, dtype = "ppo_loss_from_logits", logits.shape[:-1], compute_dtype(logits)
    t = Terms(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        ref_log_probs=ref_log_probs,
        mask=mask,
        weights=weights,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        vf_coef=vf_coef,
        vf_clip_coef=vf_clip_coef,
        vf_clip=vf_clip,
        ent_coef=ent_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        old_kl_coef=old_kl_coef,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    check_terms(op, t, entropy_given=True)
    policy = _categorical.check(logits, actions, head_sizes, action_mask, temperature)
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        rows, count, inv_n = to_rows(op, t, shape, dtype)
        part, grad_logits = _categorical.sweep(policy, rows, t, dtype, wants_gradient)
    gradients = [(logits, grad_logits), (values, part.grad_values)]
    return assemble(part, count, inv_n, t, gradients)


def categorical_gradients(
    logits: Tensor,
    actions: Tensor,
    head_sizes: tuple[int, ...] | None,
    action_mask: Tensor | None,
    t: Terms,
) -> tuple[PPOLoss, Tensor, Tensor]:
    """`ppo_loss_from_logits` for callers without autograd: (result, d / d logits, d / d values).

    Call it under `torch.no_grad()`, with arguments known to be right and with `t.values`.
    """
    policy = _categorical.check(logits, actions, head_sizes, action_mask, 1.0)
    rows, count, inv_n = to_rows("ppo_loss_from_logits", t, logits.shape[:-1], torch.float32)
    part, grad_logits = _categorical.sweep(policy, rows, t, torch.float32, True)
    result = assemble(part, count, inv_n, t, ())
    assert grad_logits is not None and part.grad_values is not None
    return result, grad_logits.mul_(inv_n), part.grad_values.mul_(inv_n)


@accelerated(validate=_validate_from_gaussian)
def ppo_loss_from_gaussian(
    mean: Tensor,
    log_std: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_coef: Scalar,
    squash: bool = False,
    clip_coef_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: Scalar = 0.5,
    vf_clip_coef: Scalar | None = None,
    vf_clip: str = "max",
    ent_coef: Scalar = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: Scalar = 0.0,
    kl_estimator: str = "k3",
    old_kl_coef: Scalar = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    norm_adv: bool = False,
    advantage_moments: Tensor | None = None,
    normalizer: Scalar | None = None,
) -> PPOLoss:
    """`ppo_loss` of a Gaussian policy with diagonal covariance.

        z = (actions - mean) / exp(log_std)
        log_probs = sum_A (-z^2 / 2 - log_std - log(2 pi) / 2)
        entropy   = sum_A (log_std + log(2 pi e) / 2)

    With `squash` the policy acts with tanh(u), u Gaussian, and `actions` holds u, not tanh(u), which
    cannot be inverted where it rounds to 1:

        log_probs = (the above) - sum_A 2 (log 2 - u - softplus(-2u))
        entropy   = -log_probs, the estimate from the one sample (as Stable-Baselines3)

    Args:
        mean: [..., A] floating; differentiable.
        log_std: [A], or [..., A] for a state-dependent one; differentiable.
        actions: [..., A]; before the tanh if `squash`.
        old_log_probs, advantages: [...].
        squash: whether the environment received tanh(actions).
        clip_coef: as in `ppo_loss`, with all further arguments; their shape is [...].

    Returns:
        PPOLoss: `loss`, differentiable by `mean`, `log_std` and `values`; `stats`.

    Raises:
        ValueError: as `ppo_loss`; or actions or log_std is misshapen.
    """
    op, shape, dtype = "ppo_loss_from_gaussian", mean.shape[:-1], compute_dtype(mean)
    t = Terms(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        ref_log_probs=ref_log_probs,
        mask=mask,
        weights=weights,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        vf_coef=vf_coef,
        vf_clip_coef=vf_clip_coef,
        vf_clip=vf_clip,
        ent_coef=ent_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        old_kl_coef=old_kl_coef,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    check_terms(op, t, entropy_given=True)
    _gaussian.check(op, mean, log_std, actions)
    with torch.no_grad():
        rows, count, inv_n = to_rows(op, t, shape, dtype)
        policy = _gaussian.evaluate(mean, log_std, actions, squash, rows.drop, dtype)
        part = surrogate(policy.log_probs, policy.entropy, rows, t)
        grad_mean, grad_log_std = _gaussian.gradient(
            policy, part.grad_log_probs, row_ent_coef(rows, t), squash
        )
    if grad_log_std.ndim > 1:
        grad_log_std = grad_log_std.t()
    gradients = [(mean, grad_mean.t()), (log_std, grad_log_std), (values, part.grad_values)]
    return assemble(part, count, inv_n, t, gradients)


def gaussian_gradients(
    mean: Tensor, log_std: Tensor, actions: Tensor, squash: bool, t: Terms
) -> tuple[PPOLoss, Tensor, Tensor, Tensor]:
    """`ppo_loss_from_gaussian` for callers without autograd, as `categorical_gradients`.

    Returns the result, d / d mean, d / d log_std and d / d values.
    """
    rows, count, inv_n = to_rows("ppo_loss_from_gaussian", t, mean.shape[:-1], torch.float32)
    policy = _gaussian.evaluate(mean, log_std, actions, squash, rows.drop, torch.float32)
    part = surrogate(policy.log_probs, policy.entropy, rows, t)
    grad_mean, grad_log_std = _gaussian.gradient(
        policy, part.grad_log_probs, row_ent_coef(rows, t), squash
    )
    result = assemble(part, count, inv_n, t, ())
    assert part.grad_values is not None
    return result, grad_mean * inv_n, grad_log_std * inv_n, part.grad_values.mul_(inv_n)
