"""KL divergence of categorical policies: exact from logits, estimated from samples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._rows import (
    LOWEST,
    Blocks,
    check_logits,
    check_mask,
    compute_dtype,
    converted,
    may_ask,
    refuse_double_backward,
    row_maximum,
    shifted,
)

LOG_RATIO_LIMIT = 20.0
"""|log ratio| is held below this, as in `ppo_loss`: fp32 exp overflows at 88.7."""

SERIES_BELOW = 0.5
"""|d| from which exp(d) - 1 - d loses no more than two bits to cancellation."""

SERIES_TERMS = {torch.float32: 8, torch.float64: 14}
"""Terms of 1/2! + d/3! + d²/4! + ... that reach rounding at |d| = SERIES_BELOW."""


def _validate(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "forward",
    mask: Tensor | None = None,
) -> None:
    name = "kl_from_logits"
    check_logits(name, logits)
    if ref_logits.shape != logits.shape or not ref_logits.is_floating_point():
        raise ValueError(
            f"{name}: ref_logits are {list(ref_logits.shape)} {ref_logits.dtype}, logits "
            f"{list(logits.shape)}; expected the same shape and a floating-point dtype"
        )
    if direction not in ("forward", "reverse"):
        raise ValueError(f"{name}: direction is {direction!r}; expected 'forward' or 'reverse'")
    check_mask(name, mask, logits.shape[:-1])
    if ref_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: ref_logits requires grad, but only logits is differentiated; pass "
            "ref_logits.detach(), or swap the arguments and the direction"
        )


@accelerated(validate=_validate)
def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "forward",
    mask: Tensor | None = None,
) -> Tensor:
    """Exact KL divergence per row between p = softmax(logits) and q = softmax(ref_logits).

        forward:  KL(p || q) = Σ_j p_j (log p_j - log q_j),  gradient p_j (log p_j - log q_j - KL)
        reverse:  KL(q || p) = Σ_j q_j (log q_j - log p_j),  gradient p_j - q_j

    Where the distribution left of the bars has probability 0 (its logit is -inf, or so low that exp
    underflows) the term is 0, whatever the other holds. Where it is positive and the other logit is
    -inf, the KL is +inf and the row gets gradient 0. If its logits are all -inf there is no term:
    KL and gradient are 0. NaN or +inf in either makes its own row NaN. Never negative.

    Only `logits` is differentiated (once); the reference is a constant. The gradient is the only
    vocabulary-sized allocation. `torch.func` transforms are refused.

    Args:
        logits: [..., V] floating point. Leading strides are free; if the last dimension is not
            contiguous the logits are copied once.
        ref_logits: the same shape, any floating dtype, strides as above.
        direction: "forward" is KL(p || q), what an RLHF penalty estimates from samples of the
            policy; "reverse" is KL(q || p), as in distillation.
        mask: [...] bool. Where False the result and the gradient are 0, and what the logits hold
            does not matter.

    Returns:
        [...] in nats: float32, or float64 if either input is.

    Raises:
        NotImplementedError: called under a `torch.func` transform.
        ValueError: shapes or dtypes do not fit, V is 0, direction is another word, or ref_logits
            requires grad in grad mode.
    """
    _validate(logits, ref_logits, direction=direction, mask=mask)
    if logits.shape[-1] > 1:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        ref_logits = ref_logits if ref_logits.stride(-1) == 1 else ref_logits.contiguous()
    forward = direction == "forward"
    if logits.requires_grad and torch.is_grad_enabled():
        return _KL.apply(logits, ref_logits, forward, mask)
    return _kl(logits, ref_logits, forward, mask)[0]


class _Rows(NamedTuple):
    """Kept for the backward; [M, 1] each, see `ppo_fast.functional.log_probs.Stats`."""

    maximum: Tensor
    total: Tensor
    ref_maximum: Tensor
    ref_total: Tensor
    mean: Tensor
    """Sum over the first argument of p (t - w); finite or NaN."""
    dead: Tensor
    """Rows without gradient: the divergence is infinite or has no terms."""


def _kl(
    logits: Tensor, ref_logits: Tensor, forward: bool, mask: Tensor | None
) -> tuple[Tensor, _Rows]:
    dtype = compute_dtype(logits, ref_logits)
    first, second = (logits, ref_logits) if forward else (ref_logits, logits)
    blocks = Blocks(3, dtype, first, second)
    keep = None
    if mask is not None and not blocks.single and may_ask(logits):
        keep = mask.reshape(-1)
    parts: list[tuple[Tensor, ...]] = []
    for own, (p, q), (t, w, e) in blocks:
        if keep is not None and not keep[own].any():
            parts.append((torch.zeros(p.shape[0], 1, dtype=dtype),) * 5)
            continue
        p, q = converted(p, dtype, t), converted(q, dtype, w)
        p_maximum, q_maximum = row_maximum(p), row_maximum(q)
        t, w = shifted(p, p_maximum, None, t), shifted(q, q_maximum, None, w)
        e = torch.exp(t, out=e)
        # A term of probability 0 comes to 0 * inf; a NaN logit still shows in the totals.
        weighted = t.sub_(w).mul_(e).nansum(-1, keepdim=True)
        p_total, q_total = e.sum(-1, keepdim=True), w.exp_().sum(-1, keepdim=True)
        parts.append((p_maximum, p_total, q_maximum, q_total, weighted))
    columns = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
    p_maximum, p_total, q_maximum, q_total, weighted = columns

    # Only a row all -inf is below 1.
    no_terms = p_total < 1.0
    p_total, q_total = p_total.clamp(min=1.0), q_total.clamp(min=1.0)
    mean = weighted / p_total
    value = mean - (p_total.log() - q_total.log())
    infinite = value == math.inf
    shape = logits.shape[:-1]
    # Reshaped before the last operation: a view could not be edited in place by the caller.
    kl = value.view(shape).clamp(min=0.0)
    kl.masked_fill_(no_terms.view(shape), 0.0)
    if mask is not None:
        kl.masked_fill_(~mask, 0.0)
    mean = mean.masked_fill(infinite, 0.0).masked_fill_(value.isnan(), math.nan)
    dead = infinite | no_terms
    if forward:
        return kl, _Rows(p_maximum, p_total, q_maximum, q_total, mean, dead)
    return kl, _Rows(q_maximum, q_total, p_maximum, p_total, mean, dead)


def _gradient(logits: Tensor, ref_logits: Tensor, forward: bool, saved: _Rows, g: Tensor) -> Tensor:
    """Gradient of the divergence times g, [M], written once, block by block."""
    maximum, total, ref_maximum, ref_total, mean, dead = saved
    dtype = total.dtype
    g = g.unsqueeze(1).masked_fill(dead, 0.0)
    active = g != 0
    scale, ref_scale = g / total, g / ref_total
    asking = may_ask(logits)
    # A row without upstream gradient comes out 0 by itself, unless it is NaN.
    overwrite = not asking or bool((total.isnan() | ref_total.isnan()).any())
    # Finite, so that it can meet a probability of 0.
    lowest = torch.finfo(dtype).min / 4

    def fill(
        own: slice, p: Tensor, q: Tensor, t: Tensor | None, w: Tensor | None, e: Tensor | None
    ) -> Tensor:
        t = shifted(converted(p, dtype, t), maximum[own], None, t)
        w = shifted(converted(q, dtype, w), ref_maximum[own], None, w)
        if forward:
            e = torch.exp(t.clamp_(min=LOWEST), out=e)
            t.sub_(w.clamp_(min=lowest)).sub_(mean[own]).mul_(scale[own])
            e.mul_(t)
        else:
            e = torch.exp(t, out=e).mul_(scale[own]).sub_(w.exp_().mul_(ref_scale[own]))
        return e.masked_fill_(~active[own], 0.0) if overwrite else e

    in_place = logits.dtype is dtype
    # The reverse gradient uses t up by exp, in the same buffer.
    blocks = Blocks(1 + forward + (not in_place), dtype, logits, ref_logits)
    if blocks.single:
        ((own, (p, q), _),) = blocks
        return fill(own, p, q, None, None, None).to(logits.dtype).view(logits.shape)

    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    gradient_rows = gradient.view(-1, logits.shape[-1])
    for own, (p, q), (w, *scratch) in blocks:
        out = gradient_rows[own]
        if asking and not active[own].any():
            out.zero_()
        elif in_place:
            fill(own, p, q, (*scratch, out)[0], w, out)
        else:
            out.copy_(fill(own, p, q, scratch[0], w, scratch[-1]))
    return gradient


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, forward: bool, mask: Tensor | None
    ) -> Tensor:
        kl, saved = _kl(logits, ref_logits, forward, mask)
        ctx.forward_direction = forward
        ctx.save_for_backward(logits, ref_logits, mask, *saved)
        return kl

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_double_backward("kl_from_logits")
        logits, ref_logits, mask, *saved = ctx.saved_tensors
        g = (g if mask is None else g.masked_fill(~mask, 0.0)).reshape(-1)
        gradient = _gradient(logits, ref_logits, ctx.forward_direction, _Rows(*saved), g)
        return gradient, None, None, None


@accelerated
def approx_kl(log_probs: Tensor, other: Tensor, *, estimator: str = "k3") -> Tensor:
    """Estimate KL(p || other) at samples of p, element by element.

    With d = other - log_probs, clamped to [-20, 20]:

        k1 = -d               unbiased, signed, noisy
        k2 = d² / 2           biased, non-negative; its gradient is that of KL(p || other)
        k3 = exp(d) - 1 - d   unbiased, non-negative, the least variance near p = other

    (Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.) Near
    d = 0 both exp(d) - 1 - d and expm1(d) - d cancel (fp32: 5 % wrong at 1e-3, nothing left at
    1e-4), so there k3 is summed as d² (1/2! + d/3! + d²/4! + ...). Its gradient is expm1(d).

    Differentiable in both arguments, with the samples held fixed; 0 outside the clamp.

    Args:
        log_probs: log p of the samples, any shape, floating point.
        other: log-probability of the same samples under the other policy, same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        The estimates, shaped like log_probs, in nats: float32, or float64 if either input is.

    Raises:
        ValueError: shapes or dtypes do not fit, or estimator is another word.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"approx_kl: estimator is {estimator!r}; expected 'k1', 'k2' or 'k3'")
    if log_probs.shape != other.shape:
        raise ValueError(
            f"approx_kl: log_probs is {list(log_probs.shape)}, other {list(other.shape)}; "
            "expected one shape"
        )
    if not (log_probs.is_floating_point() and other.is_floating_point()):
        raise ValueError(
            f"approx_kl: log_probs is {log_probs.dtype}, other {other.dtype}; "
            "expected floating-point dtypes"
        )
    dtype = compute_dtype(log_probs, other)
    d = (other.to(dtype) - log_probs.to(dtype)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return _K3.apply(d)


class _K3(torch.autograd.Function):
    """exp(d) - 1 - d."""

    @staticmethod
    def forward(ctx: Any, d: Tensor) -> Tensor:
        ctx.save_for_backward(d)
        near = d.clamp(-SERIES_BELOW, SERIES_BELOW)
        last = SERIES_TERMS[d.dtype] + 1
        series = near / math.factorial(last)
        for n in range(last - 1, 2, -1):
            series.add_(1 / math.factorial(n)).mul_(near)
        series.add_(0.5).mul_(near).mul_(near)
        return torch.where(d.abs() < SERIES_BELOW, series, torch.expm1(d) - d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        return grad * torch.expm1(d)
