"""The arguments the `ppo_loss` ops share: checked, and laid out as [M] vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional.whiten import standardize, standardize_by

Scalar = float | Tensor

ADVANTAGE_EPS = 1e-8


ROW_NAMES = (
    *("old_log_probs", "advantages", "values", "old_values", "returns", "ref_log_probs"),
    *("mask", "weights"),
)


SCALAR_NAMES = (
    *("clip_coef", "clip_coef_high", "dual_clip", "vf_coef", "vf_clip_coef"),
    *("ent_coef", "kl_coef", "old_kl_coef", "normalizer"),
)


class Terms(NamedTuple):
    """The arguments the `ppo_loss` ops have in common, under their public names."""

    old_log_probs: Tensor
    advantages: Tensor
    clip_coef: Scalar
    clip_coef_high: Scalar | None = None
    dual_clip: Scalar | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    vf_coef: Scalar = 0.5
    vf_clip_coef: Scalar | None = None
    vf_clip: str = "max"
    ent_coef: Scalar = 0.0
    ref_log_probs: Tensor | None = None
    kl_coef: Scalar = 0.0
    kl_estimator: str = "k3"
    old_kl_coef: Scalar = 0.0
    mask: Tensor | None = None
    weights: Tensor | None = None
    norm_adv: bool = False
    advantage_moments: Tensor | None = None
    normalizer: Scalar | None = None


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

    def slice(self, own: slice) -> Rows:
        """Some of the rows, as views."""
        return Rows._make(None if row is None else row[own] for row in self)


def is_on(coef: Scalar | None) -> bool:
    """Whether a term takes part: a coefficient in a tensor always does, reading it would sync."""
    return isinstance(coef, Tensor) or bool(coef)


def check_terms(op: str, t: Terms, *, entropy_given: bool) -> None:
    def missing(what: str, needs: str) -> ValueError:
        return ValueError(f"{op}: {what} is given but {needs} is None; pass {needs} or drop {what}")

    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, jvp) are not supported; the op takes any "
            "number of leading dimensions, so call it on the whole batch"
        )
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
    if t.advantage_moments is not None and t.advantage_moments.shape != (3,):
        raise ValueError(
            f"{op}: advantage_moments is {list(t.advantage_moments.shape)}; expected [3], count, mean "
            "and sum of squared deviations as gae(..., with_moments=True) returns them"
        )
    for name in SCALAR_NAMES:
        coef = getattr(t, name)
        if isinstance(coef, Tensor) and coef.dim() != 0:
            raise ValueError(
                f"{op}: {name} is a tensor of shape {list(coef.shape)}; expected a number or a 0-d "
                "tensor (per-row weights are `weights`)"
            )
    if t.vf_clip not in ("max", "clipped"):
        raise ValueError(f"{op}: vf_clip is {t.vf_clip!r}; expected 'max' or 'clipped'")
    if t.kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"{op}: kl_estimator is {t.kl_estimator!r}; expected 'k1', 'k2' or 'k3'")
    for name, coef in (
        ("clip_coef", t.clip_coef),
        ("clip_coef_high", t.clip_coef_high),
        ("vf_clip_coef", t.vf_clip_coef),
    ):
        if coef is not None and not isinstance(coef, Tensor) and not coef >= 0:
            raise ValueError(f"{op}: {name} is {coef}; expected a number >= 0")
    if t.dual_clip is not None and not isinstance(t.dual_clip, Tensor) and not t.dual_clip > 1:
        raise ValueError(f"{op}: dual_clip is {t.dual_clip}; expected a number > 1, or None")


def check_rows(op: str, t: Terms, shape: torch.Size) -> None:
    """Raise where a tensor of the terms is not of `shape`, or the mask not bool."""
    if t.mask is not None and t.mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {t.mask.dtype}; expected torch.bool, use mask.bool()")
    for name in ROW_NAMES:
        tensor = getattr(t, name)
        if tensor is not None and tensor.shape != shape:
            raise _misshapen(op, name, tensor, shape)


def to_rows(
    op: str, t: Terms, shape: torch.Size, dtype: torch.dtype
) -> tuple[Rows, Scalar, Scalar]:
    """Check and flatten: `(rows, number of unmasked rows, 1 / what means divide by)`."""
    drop = keep = None
    count: Scalar = shape.numel()
    if t.mask is not None:
        if t.mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {t.mask.dtype}; expected torch.bool, use mask.bool()")
        drop = ~flat(op, "mask", t.mask, shape)
        keep = (~drop).to(dtype)
        count = t.mask.sum().to(dtype)

    def row(name: str, tensor: Tensor) -> Tensor:
        vector = flat(op, name, tensor, shape)
        if vector.dtype is not dtype:
            vector = vector.to(dtype)
        return vector if drop is None else vector.masked_fill(drop, 0.0)

    advantages = row("advantages", t.advantages)
    if t.advantage_moments is not None:
        moments = t.advantage_moments.to(dtype)
        advantages, _ = standardize_by(moments, advantages, keep, ADVANTAGE_EPS)
    elif t.norm_adv:
        advantages, _ = standardize(advantages, keep, count, ADVANTAGE_EPS)
    rows = Rows(
        row("old_log_probs", t.old_log_probs),
        -advantages,
        None if t.values is None else row("values", t.values),
        None if t.old_values is None else row("old_values", t.old_values),
        None if t.returns is None else row("returns", t.returns),
        None if t.ref_log_probs is None else row("ref_log_probs", t.ref_log_probs),
        drop,
        keep,
        keep if t.weights is None else row("weights", t.weights),
    )
    return rows, count, _reciprocal(count if t.normalizer is None else t.normalizer, dtype)


def flat(op: str, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise _misshapen(op, name, tensor, shape)
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def _misshapen(op: str, name: str, tensor: Tensor, shape: torch.Size) -> ValueError:
    return ValueError(
        f"{op}: {name} is {list(tensor.shape)}; expected {list(shape)}, one entry per log-prob "
        "(broadcasting here would silently average over pairs); reshape it"
    )


def _reciprocal(n: Scalar, dtype: torch.dtype) -> Scalar:
    """1/n, and 1 for n = 0: an empty batch has loss 0."""
    if isinstance(n, Tensor):
        return torch.where(n == 0, 1, n).to(dtype).reciprocal()
    return 1.0 / n if n else 1.0


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
