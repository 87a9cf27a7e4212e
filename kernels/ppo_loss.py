"""The PPO loss, all its gradients and all its statistics in one launch.

The loss kernels write n d loss / d input beside the loss; the backward pass multiplies by the
upstream gradient over n, on the device. So no sum over the minibatch is waited for, and gradients
of a scaled fp16 loss do not vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels import _heads, _vocabulary
from ppo_fast.kernels._launch import check_grad_once, launch, number
from ppo_fast.kernels._library import opaque
from ppo_fast.kernels._surrogate import (
    Packed,
    advantage_whitening,
    finish,
    packed,
    prepared,
    store_sums,
    surrogate,
    ticket_for,
)
from ppo_fast.results import PPO_STATS, PPOLoss

Scalar = float | Tensor


@triton.jit(do_not_specialize=["parts", "programs"])
def ppo_loss_kernel(
    log_probs,
    entropy,
    rows,
    moments,
    parts,
    numbers,
    gradients,  # [1, 2 or 3, M]: of log_probs, then values, then entropy, as given
    partials,
    ticket,
    loss,
    stats,
    inv_n,
    M,
    programs,
    VF_CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M
    keep = inside
    if rows.mask is not None:
        keep = tl.load(rows.mask + at, mask=inside, other=False)
    shift, scale = advantage_whitening(rows, moments, parts, M, NORM, BLOCK)
    x = tl.load(log_probs + at, mask=inside, other=0.0).to(tl.float32)
    terms = surrogate(x, at, inside, keep, rows, numbers, shift, scale, VF_CLIPPED, KL)
    tl.store(gradients + at, terms[10], mask=inside)
    out = gradients + M
    if rows.new_values is not None:
        tl.store(out + at, terms[11], mask=inside)
        out += M
    h = None
    if entropy is not None:
        h = tl.load(entropy + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(keep, h, 0.0) * terms[12]
        pull = tl.zeros_like(x)
        if numbers.ent_coef is not None:
            pull = -number(numbers.ent_coef) * terms[12]
        tl.store(out + at, pull, mask=inside)
    store_sums(partials, program, terms, h, keep, rows, numbers)
    finish(partials, ticket, programs, numbers, loss, stats, inv_n)


def _outputs(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kinds = 1 + (rows[2] is not None) + (entropy is not None)
    gradients = log_probs.new_empty(kinds, log_probs.numel(), dtype=torch.float32)
    loss, inv_n = gradients.new_empty(()), gradients.new_empty(())
    return loss, gradients.new_empty(len(PPO_STATS)), inv_n, gradients


@opaque(_outputs)
def _ppo_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    kl: int,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = moments, numbers, tensors, vf_clipped, kl, norm_adv
    loss, stats, inv_n, gradients = _outputs(log_probs, entropy, rows, *options)
    M = log_probs.numel()
    p = prepared(rows, *options)
    BLOCK = 512 if M <= 1 << 17 else 1024
    num_warps = BLOCK // 128
    programs = max(1, triton.cdiv(M, BLOCK))
    partials = loss.new_empty(programs, 16)
    args = log_probs, entropy, p.rows, p.moments, p.parts, p.numbers, gradients
    totals = partials, ticket_for(loss), loss, stats, inv_n, M, programs
    launch(ppo_loss_kernel, (programs,), *args, *totals, BLOCK=BLOCK, num_warps=num_warps, **p.meta)
    return loss, stats, inv_n, gradients


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, values: Tensor | None, entropy: Tensor | None, terms: Packed
    ) -> tuple[Tensor, Tensor]:
        # reshape leaves a vector as it lies, which may be strided.
        flat = None if entropy is None else entropy.reshape(-1).contiguous()
        x = log_probs.reshape(-1).contiguous()
        loss, stats, inv_n, gradients = _ppo_loss(x, flat, *terms)
        ctx.save_for_backward(inv_n, gradients)
        ctx.inputs = [
            None if x is None else (x.shape, x.dtype) for x in (log_probs, values, entropy)
        ]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        check_grad_once("ppo_loss")
        inv_n, gradients = ctx.saved_tensors
        scaled = iter(gradients * (grad_loss * inv_n))
        results = []
        for given, wanted in zip(ctx.inputs, ctx.needs_input_grad, strict=False):
            gradient = None if given is None else next(scaled)
            if given is not None and wanted:
                results.append(gradient.to(given[1]).view(given[0]))
            else:
                results.append(None)
        return *results, None


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
    """See `ppo_fast.functional.ppo_loss.ppo_loss`."""
    terms = packed(
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
    return PPOLoss(*_PPOLoss.apply(log_probs, values, entropy, terms))


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
    """See `ppo_fast.functional.ppo_loss.ppo_loss_from_logits`."""
    terms = packed(
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
    sizes = (logits.shape[-1],) if head_sizes is None else tuple(head_sizes)
    if len(sizes) == 1 and sizes[0] > _heads.WIDEST_HEAD:
        return _vocabulary.loss_from_vocabulary(
            logits, actions, action_mask, temperature, values, terms
        )
    return _heads.loss_from_heads(logits, actions, sizes, action_mask, temperature, values, terms)


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
    """See `ppo_fast.functional.ppo_loss.ppo_loss_from_gaussian`."""
    terms = packed(
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
    return _heads.loss_from_gaussian(mean, log_std, actions, squash, values, terms)


def _float64(policy: Tensor) -> str | None:
    return "float64 tensors run on the reference" if policy.dtype == torch.float64 else None


def _unsupported(log_probs: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return _float64(log_probs)


def _unsupported_logits(logits: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return _float64(logits)


def _unsupported_gaussian(mean: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if not 1 <= mean.shape[-1] <= _heads.WIDEST_GAUSSIAN:
        return f"actions of {mean.shape[-1]} dimensions run on the reference"
    return _float64(mean)


ppo_loss.unsupported = _unsupported
ppo_loss_from_logits.unsupported = _unsupported_logits
ppo_loss_from_gaussian.unsupported = _unsupported_gaussian
