"""The two shapes of experience: `Rollout`, indexed by time, and `Batch`, a set of samples."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.functional.gae import gae
from ppo_fast.functional.whiten import masked_whiten
from ppo_fast.tree import Tree, tree_leaves, tree_map


@dataclass
class Batch:
    """Samples for an update; every tensor has the samples as its leading dimension M."""

    inputs: Tree
    """[M, ...] what the policy saw"""
    actions: Tensor
    """[M, *action_shape]"""
    log_probs: Tensor
    """[M] float32, of the actions under the policy that took them"""
    values: Tensor
    """[M] float32, the critic's at that time"""
    advantages: Tensor
    """[M] float32"""
    returns: Tensor
    """[M] float32"""
    mask: Tensor | None = None
    """[M] bool, False where a row is no transition; None means all are"""
    weights: Tensor | None = None
    """[M] float32 importance weight of each row; None means 1"""
    action_mask: Tensor | None = None
    """[M, A] bool, legal actions; None means all are"""

    def __len__(self) -> int:
        return self.advantages.shape[0]

    def addresses(self) -> tuple[Any, ...]:
        """Where its tensors lie and what shape they have: equal for batches in the same memory."""
        found: list[Any] = []
        for field in fields(self):
            value = getattr(self, field.name)
            leaves = [] if value is None else [leaf for _, leaf in tree_leaves(value)]
            found += [(leaf.data_ptr(), tuple(leaf.shape)) for leaf in leaves] or [None]
        return tuple(found)

    def take(self, index: Tensor) -> Batch:
        """The samples at `index` [K] int64."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen[field.name] = (
                None if value is None else tree_map(lambda leaf: leaf.index_select(0, index), value)
            )
        return Batch(**chosen)

    def without_masked_rows(self) -> Batch:
        """The samples that are transitions; waits for a GPU, whose shapes had better stay as they are."""
        if self.mask is None or bool(self.mask.all()):
            return replace(self, mask=None)
        return replace(self.take(self.mask.nonzero().squeeze(1)), mask=None)


@dataclass
class Rollout:
    """T steps of N environments, preallocated, time first.

    Row t holds what was seen before step t and what that step returned.
    """

    inputs: Tree
    """[T + 1, N, ...]; row T is what the first step of the next rollout sees"""
    actions: Tensor
    """[T, N, *action_shape]"""
    rewards: Tensor
    """[T, N] float32"""
    terminated: Tensor
    """[T, N] bool"""
    truncated: Tensor
    """[T, N] bool"""
    mask: Tensor
    """[T, N] bool, False where a row is no transition"""
    values: Tensor
    """[T + 1, N] float32"""
    bootstrap_values: Tensor
    """[T, N] float32, the value of the true next observation where truncated, else unread"""
    log_probs: Tensor
    """[T, N] float32"""
    action_mask: Tensor | None = None
    """[T, N, A] bool"""
    all_valid: bool = True
    """whether no row is masked, so that the mask need not be read"""

    def __post_init__(self) -> None:
        """Allocate what `to_batch` fills, at addresses that a CUDA graph may hold on to."""
        self.advantages = torch.empty_like(self.rewards)
        self.returns = torch.empty_like(self.rewards)

    def to_batch(self, gamma: float, gae_lambda: float, norm_adv: bool) -> Batch:
        """Estimate advantages and returns, and drop the time dimension; the batch is overwritten by the next.

        Args:
            gamma, gae_lambda: see `gae`.
            norm_adv: whiten the advantages over the whole rollout.
        """
        mask = None if self.all_valid else self.mask
        advantages, returns = gae(
            self.rewards,
            self.values[:-1],
            self.values[-1],
            self.terminated,
            self.truncated,
            self.bootstrap_values,
            mask,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        if norm_adv:
            advantages = masked_whiten(advantages, mask)
        self.advantages.copy_(advantages)
        self.returns.copy_(returns)
        return Batch(
            inputs=tree_map(lambda leaf: leaf[:-1].flatten(0, 1), self.inputs),
            actions=self.actions.flatten(0, 1),
            log_probs=self.log_probs.flatten(),
            values=self.values[:-1].flatten(),
            advantages=self.advantages.flatten(),
            returns=self.returns.flatten(),
            mask=None if mask is None else mask.flatten(),
            action_mask=None if self.action_mask is None else self.action_mask.flatten(0, 1),
        )
