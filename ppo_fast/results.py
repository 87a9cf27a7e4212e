"""The named tuples ops return. The ground floor: kernels and references both import it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PPO_STATS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "kl",
    "approx_kl",
    "old_approx_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "value_clip_fraction",
    "ratio_mean",
    "ratio_deviation",
    "count",
)
"""Meaning of each entry of `PPOLoss.stats`, in order; the properties of `PPOLoss` document them."""


class PPOLoss(NamedTuple):
    """What the `ppo_loss` family returns.

    Means run over the unmasked elements of this call and divide by `normalizer` where one is given,
    so the entries of micro-batches add up to those of the batch. All are tensors on the inputs'
    device; reading one as a Python number is the caller's (synchronising) choice.
    """

    loss: Tensor
    """0-d float32, differentiable: policy_loss + vf_coef value_loss - ent_coef entropy
    + kl_coef kl + old_kl_coef approx_kl."""

    stats: Tensor
    """[len(PPO_STATS)] float32, detached, in the order of `PPO_STATS`."""

    @property
    def policy_loss(self) -> Tensor:
        """Mean of the clipped surrogate, negated."""
        return self.stats[0]

    @property
    def value_loss(self) -> Tensor:
        """Mean of half the squared error (clipped as asked), before `vf_coef`; 0 without values."""
        return self.stats[1]

    @property
    def entropy(self) -> Tensor:
        """Mean entropy in nats; 0 where none was given or computed."""
        return self.stats[2]

    @property
    def kl(self) -> Tensor:
        """Mean estimate of KL(policy || reference), before `kl_coef`; 0 without a reference."""
        return self.stats[3]

    @property
    def approx_kl(self) -> Tensor:
        """Mean k3 estimate of KL(old || new): (ratio - 1) - log ratio, never negative."""
        return self.stats[4]

    @property
    def old_approx_kl(self) -> Tensor:
        """Mean k1 estimate of KL(old || new): -log ratio (CleanRL's name)."""
        return self.stats[5]

    @property
    def clip_fraction(self) -> Tensor:
        """Share of elements whose ratio lies outside the clip range."""
        return self.stats[6]

    @property
    def dual_clip_fraction(self) -> Tensor:
        """Share of elements held by the dual clip."""
        return self.stats[7]

    @property
    def value_clip_fraction(self) -> Tensor:
        """Share of elements whose value moved beyond `vf_clip_coef` from the old value."""
        return self.stats[8]

    @property
    def ratio_mean(self) -> Tensor:
        """Mean ratio."""
        return self.stats[9]

    @property
    def ratio_deviation(self) -> Tensor:
        """Largest |ratio - 1| over unmasked elements: 0 up to rounding before the first step."""
        return self.stats[10]

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """Number of unmasked elements."""
        return self.stats[11]


class Sample(NamedTuple):
    """What `sample_from_logits` returns: [M] each, on the logits' device, detached."""

    actions: Tensor
    """int64: the index drawn."""

    log_probs: Tensor
    """float32 (float64 for float64 logits): log-probability of the index drawn."""

    entropy: Tensor
    """float32 (float64 for float64 logits): entropy of the row's distribution, in nats."""
