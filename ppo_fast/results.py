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


class ActorCriticSpec(NamedTuple):
    """An actor-critic of MLPs whose parameters lie in one flat vector.

    In order: log_std [A] of a Gaussian policy, then weight [out, in] and bias [out] of every layer
    of the shared trunk, of the actor (its last layer gives the logits or means) and of the critic.
    """

    obs_size: int
    """D"""
    shared_sizes: tuple[int, ...]
    """widths of the hidden layers that actor and critic have in common; may be empty"""
    actor_sizes: tuple[int, ...]
    """widths of the actor's own hidden layers"""
    critic_sizes: tuple[int, ...]
    """widths of the critic's own hidden layers"""
    num_outputs: int
    """A, the actor's outputs"""
    activation: str
    """after every hidden layer: "tanh", "relu", "elu" or "silu" """
    head_sizes: tuple[int, ...] | None
    """choices of each categorical head, adding up to A; None for a Gaussian policy"""
    squash: bool = False
    """whether the environment receives tanh of a Gaussian policy's actions"""

    @property
    def layers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(out, in) of every layer of the trunk, the actor and the critic."""
        trunk = tuple(zip(self.shared_sizes, (self.obs_size, *self.shared_sizes), strict=False))
        features = self.shared_sizes[-1] if self.shared_sizes else self.obs_size
        actor, critic = (*self.actor_sizes, self.num_outputs), (*self.critic_sizes, 1)
        return (
            trunk,
            tuple(zip(actor, (features, *actor), strict=False)),
            tuple(zip(critic, (features, *critic), strict=False)),
        )

    @property
    def num_parameters(self) -> int:
        """Length of the flat vector."""
        log_std = self.num_outputs if self.head_sizes is None else 0
        return log_std + sum(out * (size + 1) for net in self.layers for out, size in net)
