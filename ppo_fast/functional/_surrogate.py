"""What the three `ppo_loss` ops share: checked arguments, the per-row PPO mathematics, autograd.

Everything below the public ops works on [M] vectors, one entry a sample. Gradients are written out
rather than left to autograd: they cost a few vector operations here and a graph of small nodes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_fast.results import PPOLoss

Scalar = float | Tensor

LOG_RATIO_LIMIT = 20.0
"""|log ratio| is held below this: fp32 exp overflows at 88.7, and no update survives e^20."""

ADVANTAGE_EPS = 1e-8


class Terms(NamedTuple):
    """The arguments the `ppo_loss` ops have in common, under their public names."""

    old_log_probs: Tensor
    advantages: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    ref_log_probs: Tensor | None
    mask: Tensor | None
    weights: Tensor | None
    clip_coef: Scalar
    clip_coef_high: Scalar | None
    dual_clip: Scalar | None
    vf_coef: Scalar
    vf_clip_coef: Scalar | None
    vf_clip: str
    ent_coef: Scalar
    kl_coef: Scalar
    kl_estimator: str
    old_kl_coef: Scalar
    norm_adv: bool
    normalizer: Scalar | None


class Rows(NamedTuple):
    """The same, checked and laid out: [M] vectors in the arithmetic's dtype, masked entries 0."""

    old_log_probs: Tensor
    neg_advantages: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    ref_log_probs: Tensor | None
    drop: Tensor | None
    """True where masked."""
    keep: Tensor | None
    """1 where unmasked, 0 where masked."""
    weights: Tensor | None
    """Multiplies a row's terms of the loss; already 0 where masked."""

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(*(None if row is None else row[start:stop] for row in self))


class Surrogate(NamedTuple):
    """Sums over rows, and what each row's loss term changes by; both before the division by n."""

    sums: Tensor
    """[10], the first ten of `PPO_STATS`."""
    ratio_deviation: Tensor
    """[1]."""
    grad_log_probs: Tensor
    grad_values: Tensor | None


def is_on(coef: Scalar | None) -> bool:
    """Whether a term takes part: a coefficient in a tensor always does, reading it would sync."""
    return isinstance(coef, Tensor) or bool(coef)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_terms(op: str, t: Terms, *, entropy_given: bool) -> None:
    def missing(what: str, needs: str) -> ValueError:
        return ValueError(f"{op}: {what} is given but {needs} is None; pass {needs} or drop {what}")

    if t.advantages.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: advantages requires a gradient; expected a constant, use advantages.detach()"
        )
    if t.values is not None and t.returns is None:
        raise missing("values", "returns")
    if t.returns is not None and t.values is None:
        raise missing("returns", "values")
    if t.vf_clip_coef is not None and t.values is not None and t.old_values is None:
        raise missing("vf_clip_coef", "old_values")
    if is_on(t.kl_coef) and t.ref_log_probs is None:
        raise missing("kl_coef", "ref_log_probs")
    if is_on(t.ent_coef) and not entropy_given:
        raise missing("ent_coef", "entropy")
    if t.vf_clip not in ("max", "clipped"):
        raise ValueError(f"{op}: vf_clip is {t.vf_clip!r}; expected 'max' or 'clipped'")
    if t.kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"{op}: kl_estimator is {t.kl_estimator!r}; expected 'k1', 'k2' or 'k3'")
    for name in ("clip_coef", "clip_coef_high", "vf_clip_coef"):
        coef = getattr(t, name)
        if coef is not None and not isinstance(coef, Tensor) and not coef >= 0:
            raise ValueError(f"{op}: {name} is {coef}; expected a number >= 0")
    if t.dual_clip is not None and not isinstance(t.dual_clip, Tensor) and not t.dual_clip > 1:
        raise ValueError(f"{op}: dual_clip is {t.dual_clip}; expected a number > 1, or None")


def to_rows(op: str, t: Terms, shape: torch.Size, dtype: torch.dtype) -> tuple[Rows, Scalar, Any]:
    """Check and flatten: `(rows, number of unmasked rows, 1 / what means divide by)`."""
    drop = keep = None
    count: Scalar = shape.numel()
    if t.mask is not None:
        if t.mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {t.mask.dtype}; expected torch.bool, use mask.bool()")
        drop = ~flat(op, "mask", t.mask, shape)
        keep = (~drop).to(dtype)
        count = t.mask.sum().to(dtype)

    def row(name: str) -> Tensor | None:
        tensor = getattr(t, name)
        if tensor is None:
            return None
        vector = flat(op, name, tensor, shape)
        vector = vector if vector.dtype == dtype else vector.to(dtype)
        return vector if drop is None else vector.masked_fill(drop, 0.0)

    old_log_probs, advantages, weights = row("old_log_probs"), row("advantages"), row("weights")
    assert old_log_probs is not None
    assert advantages is not None
    if t.norm_adv:
        advantages, _ = standardize(advantages, keep, count, ADVANTAGE_EPS)
    rows = Rows(
        old_log_probs=old_log_probs,
        neg_advantages=-advantages,
        values=row("values"),
        old_values=row("old_values"),
        returns=row("returns"),
        ref_log_probs=row("ref_log_probs"),
        drop=drop,
        keep=keep,
        weights=keep if weights is None else weights,
    )
    return rows, count, _reciprocal(count if t.normalizer is None else t.normalizer)


def flat(op: str, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} is {list(tensor.shape)}; expected {list(shape)}, one entry per log-prob "
            "(broadcasting here would silently average over pairs); reshape it"
        )
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def _reciprocal(n: Scalar) -> Scalar:
    """1/n, and 1 for n = 0: an empty batch has loss 0."""
    if isinstance(n, Tensor):
        return torch.where(n == 0, 1.0, n.detach()).reciprocal()
    return 1.0 / n if n else 1.0


def standardize(
    x: Tensor, keep: Tensor | None, count: Scalar, eps: float
) -> tuple[Tensor, Tensor | float]:
    """Return `((x - mean) / (std + eps), mean)` of an [M] vector; fewer than two entries stay.

    `keep` is 1 or 0 per entry and x is 0 where it is 0; `count` is its sum.
    """
    if not isinstance(count, Tensor):
        if count < 2:
            return x, 0.0
        mean = x.sum() / count
        deviation = x - mean
        # The second pass removes the mean's own rounding: a constant vector becomes exactly 0
        # rather than (one ulp) / eps.
        deviation -= deviation.sum() / count
        std = (deviation.square().sum() / (count - 1)).sqrt()
        return deviation / (std + eps), mean
    assert keep is not None
    at_least_one = count.clamp(min=1)
    mean = x.sum() / at_least_one
    deviation = (x - mean) * keep
    deviation = (deviation - deviation.sum() / at_least_one) * keep
    std = (deviation.square().sum() / (count - 1).clamp(min=1)).sqrt()
    alone = count < 2
    return torch.where(alone, x, deviation / (std + eps)), torch.where(alone, 0.0, mean)


def surrogate(log_probs: Tensor, entropy: Tensor | None, rows: Rows, t: Terms) -> Surrogate:
    """The PPO terms of each row, summed, and their gradients. `log_probs`, `entropy`: [M].

    Comparisons are done in place where that saves a conversion: flags come out as 0.0 and 1.0.
    """
    if rows.drop is not None:
        log_probs = log_probs.masked_fill(rows.drop, 0.0)
        entropy = None if entropy is None else entropy.masked_fill(rows.drop, 0.0)
    absent = torch.zeros_like(log_probs)  # a term that takes no part

    unlimited = log_probs - rows.old_log_probs
    log_ratio = unlimited.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    within_limit = unlimited.eq_(log_ratio)
    ratio = log_ratio.exp()
    # Not ratio - 1, which in fp32 leaves 5 % of error in the KL at a log ratio of 1e-3.
    ratio_minus_one = log_ratio.expm1()
    old_kl = ratio_minus_one - log_ratio

    high = t.clip_coef if t.clip_coef_high is None else t.clip_coef_high
    clipped_ratio = _clamp(ratio, 1.0 - t.clip_coef, 1.0 + high)
    unclipped_loss = rows.neg_advantages * ratio
    clipped_loss = rows.neg_advantages * clipped_ratio
    policy_loss = torch.maximum(unclipped_loss, clipped_loss)
    # Inside the range both branches are the same number, so ties belong to the unclipped one.
    active = clipped_loss.le_(unclipped_loss)
    held = absent
    if t.dual_clip is not None:
        ceiling = rows.neg_advantages * t.dual_clip
        is_held = (rows.neg_advantages > 0) & (policy_loss > ceiling)
        policy_loss = torch.where(is_held, ceiling, policy_loss)
        held = is_held.to(ratio.dtype)
        active = active.mul_(~is_held)
    # Products rather than selections, so that a NaN shows in the gradient.
    grad_log_probs = unclipped_loss.mul_(active)
    if is_on(t.old_kl_coef):
        grad_log_probs = plus(grad_log_probs, ratio_minus_one, t.old_kl_coef)
    grad_log_probs.mul_(within_limit)

    kl = absent
    if rows.ref_log_probs is not None:
        kl, grad_kl = _kl_to_reference(log_probs, rows.ref_log_probs, t.kl_estimator)
        if is_on(t.kl_coef):
            grad_log_probs = plus(grad_log_probs, grad_kl, t.kl_coef)

    value_loss, value_clipped, grad_values = absent, absent, None
    if rows.values is not None:
        value_loss, value_clipped, grad_values = _value_terms(rows, t, absent)

    summands = torch.stack(
        (
            policy_loss,
            value_loss,
            absent if entropy is None else entropy,
            kl,
            old_kl,
            -log_ratio,
            clipped_ratio.ne_(ratio),
            held,
            value_clipped,
            ratio,
        )
    )
    if rows.weights is not None:
        summands[:5].mul_(rows.weights)
        grad_log_probs.mul_(rows.weights)
        grad_values = None if grad_values is None else grad_values.mul_(rows.weights)
    if rows.keep is not None:
        summands[5:].mul_(rows.keep)
    deviation = ratio_minus_one.abs_()
    return Surrogate(
        sums=summands.sum(1),
        ratio_deviation=deviation.amax(0, keepdim=True) if deviation.numel() else absent.sum(0, True),
        grad_log_probs=grad_log_probs,
        grad_values=grad_values,
    )


def _clamp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # One call cannot mix a number and a tensor.
        return x.clamp(min=low).clamp(max=high)
    return x.clamp(low, high)


def _kl_to_reference(log_probs: Tensor, ref: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Estimates of KL(policy || reference) per row and their derivative by the log-prob."""
    unlimited = ref - log_probs
    difference = unlimited.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    within_limit = unlimited.eq_(difference)
    if estimator == "k1":
        return -difference, within_limit
    if estimator == "k2":
        return difference.square() / 2, -difference * within_limit
    excess = difference.expm1()
    return excess - difference, -excess * within_limit


def _value_terms(rows: Rows, t: Terms, absent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the squared error (clipped as asked), where the value is clipped, the gradient."""
    assert rows.values is not None
    assert rows.returns is not None
    error = rows.values - rows.returns
    if t.vf_clip_coef is None:
        return torch.addcmul(absent, error, error, value=0.5), absent, error * t.vf_coef
    assert rows.old_values is not None
    moved = rows.values - rows.old_values
    # The excess over the clip range is exactly 0 inside it, so there both errors are one number.
    # (old_values + clamp(moved)) - returns rounds differently from `error` and would let noise
    # choose the branch, and with it a zero gradient.
    excess = moved.sub_(_clamp(moved, -t.vf_clip_coef, t.vf_clip_coef))
    clipped_error = error - excess
    clipped = excess.ne_(0)
    if t.vf_clip == "clipped":
        loss = torch.addcmul(absent, clipped_error, clipped_error, value=0.5)
        return loss, clipped, torch.addcmul(error, error, clipped, value=-1).mul_(t.vf_coef)
    size, clipped_size = error.abs(), clipped_error.abs_()
    largest = torch.maximum(size, clipped_size)
    active = size.ge_(clipped_size)
    loss = torch.addcmul(absent, largest, largest, value=0.5)
    return loss, clipped, active.mul_(error).mul_(t.vf_coef)


def plus(x: Tensor, y: Tensor, coef: Scalar) -> Tensor:
    """Return x + coef y in the fewest operations."""
    if isinstance(coef, Tensor):
        return torch.addcmul(x, y, coef)
    return torch.add(x, y, alpha=coef) if coef else x


def row_ent_coef(rows: Rows, t: Terms) -> Scalar:
    """The weight of each row's entropy: a number, 0-d or [M]."""
    if not is_on(t.ent_coef):
        return 0.0
    return t.ent_coef if rows.weights is None else rows.weights * t.ent_coef


def assemble(
    part: Surrogate,
    count: Scalar,
    inv_n: Scalar,
    t: Terms,
    gradients: Sequence[tuple[Tensor | None, Tensor | None]],
) -> PPOLoss:
    """The result, with `gradients` = (input, n d loss / d input) attached to its loss."""
    sums = part.sums
    with torch.no_grad():
        count = sums.new_full((1,), count) if not isinstance(count, Tensor) else count.reshape(1)
        stats = torch.cat((sums * inv_n, part.ratio_deviation, count))
        loss = stats[0].clone()
        for coef, index in ((t.vf_coef, 1), (t.ent_coef, 2), (t.kl_coef, 3), (t.old_kl_coef, 4)):
            if is_on(coef):
                loss = plus(loss, stats[index], -coef if index == 2 else coef)
    if torch.is_grad_enabled():
        inputs, known = [], []
        for x, gradient in gradients:
            if x is not None and gradient is not None and x.requires_grad:
                inputs.append(x)
                known.append(gradient if gradient.shape == x.shape else gradient.view(x.shape))
        if inputs:
            loss = _WithGradients.apply(loss, inv_n, *inputs, *known)
    return PPOLoss(loss, stats)


class _WithGradients(torch.autograd.Function):
    """`loss` as is, with known gradients: forward(loss, inv_n, *inputs, *(n d loss / d input)).

    The division by n waits for the upstream gradient, which under a loss scaler keeps fp16
    gradients from vanishing.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, inv_n: Scalar, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.dtypes = [tensor.dtype for tensor in tensors[:half]]
        ctx.inv_n = inv_n
        ctx.save_for_backward(*tensors[half:])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_loss * ctx.inv_n
        gradients = [
            (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *gradients, *(None for _ in gradients)
