"""The update's minibatches for language models: micro-batches whose gradients add up exactly.

Every mean divides by a count over the whole minibatch and all processes, so a gradient does not
depend on how the minibatch is cut, packed or spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppo_fast.distributed import all_max_, all_moments, all_sum_
from ppo_fast.functional.whiten import moments
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.head import RATIO_DEVIATION, added, loss_and_grads
from ppo_fast.llm.models import Critic, Policy
from ppo_fast.llm.packing import micro_batches
from ppo_fast.llm.rollout import TokenRollout, whitening_scale
from ppo_fast.results import PPO_STATS, PPOLoss
from ppo_fast.update import APPROX_KL, FlatAdam

COUNT = PPO_STATS.index("count")
FIRST_PART_OF_LOSS, WEIGHTED, PER_TOKEN = 2, 5, 10
"""stats up to these: parts of the loss as they are; means by weight; means by number of tokens"""


class TokenLoss:
    """The loss that `ppo_update` is given; its `minibatches` do the work.

    Args:
        policy, critic: in training.
        optimizer: over both.
        reference: for a KL over the whole vocabulary in the loss, else None.
        config: fields that stay.
        options: coefficients of `ppo_loss_from_logits` that hold in this update.
        kl_coef: the weight of a KL over the whole vocabulary in this update.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic,
        optimizer: FlatAdam,
        reference: Policy | None,
        config: RLHFConfig,
        options: Callable[[], dict[str, Any]],
        kl_coef: Callable[[], float],
    ) -> None:
        self.policy, self.critic, self.optimizer = policy, critic, optimizer
        self.reference, self.config = reference, config
        self.options, self.kl_coef = options, kl_coef

    def __call__(self, batch: TokenRollout) -> PPOLoss:
        """The loss of a rollout as one minibatch; gradients are added to the parameters'."""
        minibatches = self.minibatches(batch, replace(self.config, num_minibatches=1))
        minibatches.begin(0, torch.arange(len(batch)))
        loss = minibatches.run(0)
        return PPOLoss(loss, minibatches.stats()[-1])

    def minibatches(self, batch: TokenRollout, config: RLHFConfig) -> TokenMinibatches:
        """See `ppo_fast.update.Minibatches`."""
        return TokenMinibatches(self, batch, config)


class TokenMinibatches:
    """See `ppo_fast.update.Minibatches`."""

    def __init__(self, loss: TokenLoss, rollout: TokenRollout, config: RLHFConfig) -> None:
        self._loss, self._rollout, self._config = loss, rollout, config
        self._cut: list[list[int]] = []
        self._stats: list[Tensor] = []
        lengths = rollout.sequences.response_lengths
        self._full_kl_coef: Tensor | float = 0.0
        self._weights = None
        if config.loss_aggregation == "seq-mean-token-mean":
            per_sequence = torch.tensor([1 / length for length in lengths])
            self._weights = per_sequence.repeat_interleave(torch.tensor(lengths))
            self._weights = self._weights.to(rollout.log_probs.device)

    def begin(self, epoch: int, order: Tensor) -> None:
        """See `Minibatches`; reads the order, once an epoch."""
        numbers = order.tolist()
        ends = [
            len(numbers) * k // self._config.num_minibatches
            for k in range(self._config.num_minibatches + 1)
        ]
        self._cut = [numbers[a:b] for a, b in pairwise(ends)]
        lengths = self._rollout.sequences.response_lengths
        # [2, minibatches]: tokens and responses, over all processes.
        counts = torch.tensor(
            [[sum(lengths[i] for i in part) for part in self._cut], list(map(len, self._cut))],
            dtype=torch.float32,
        ).to(self._rollout.log_probs.device)
        all_sum_([counts])
        self._tokens, responses = counts.unbind()
        self._normalizers = {
            "token": self._tokens,
            "seq-mean-token-mean": responses,
            "seq-mean-token-sum": responses,
            "constant": responses * self._config.response_length,
        }[self._config.loss_aggregation]

    def run(self, number: int) -> Tensor:
        """See `Minibatches`."""
        own = number % self._config.num_minibatches
        loss = self._loss
        sequences = self._rollout.sequences
        loss.optimizer.zero_grad()
        options = {**loss.options(), "normalizer": self._normalizers[own]}
        chosen = self._cut[own]
        scale = self._rollout.advantage_scale
        if self._config.norm_adv == "minibatch":
            _, rows = sequences.take(chosen)
            found = all_moments(moments(self._rollout.advantages[rows]))
            options["advantage_moments"] = found
            scale = whitening_scale(found)
        # The exact KL of a state is no matter of the action taken in it: as a reward it only tells of
        # states to come, and its own gradient is added here, in the advantages' unit.
        self._full_kl_coef = loss.kl_coef() * (scale if self._config.kl_in == "reward" else 1.0)
        groups = micro_batches([sequences.lengths[i] for i in chosen], self._config.token_budget)
        parts = [self._micro_batch([chosen[j] for j in group], options) for group in groups]
        total = added(torch.stack(parts))
        all_sum_(loss.optimizer.gradients())
        deviation = total[1 + RATIO_DEVIATION].clone()
        all_sum_([total])
        all_max_(deviation)
        total[1 + RATIO_DEVIATION] = deviation
        self._stats.append(self._per_token(total[1:], own))
        return total[0]

    def _micro_batch(self, indices: list[int], options: dict[str, Any]) -> Tensor:
        loss, rollout, config = self._loss, self._rollout, self._config
        packed, rows = rollout.sequences.take(indices)
        in_loss = config.kl_in == "loss" and config.kl_coef > 0
        full = config.kl_coef > 0 and config.kl_estimator == "full"
        ref = rollout.ref_log_probs if in_loss and not full else None
        of_rows = {
            "old_log_probs": rollout.log_probs[rows],
            "advantages": rollout.advantages[rows],
            "old_values": rollout.values[rows],
            "returns": rollout.returns[rows],
            "ref_log_probs": None if ref is None else ref[rows],
            "weights": None if self._weights is None else self._weights[rows],
        }
        device = packed.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            hidden = loss.policy.hidden(packed)
            values = loss.critic(packed, hidden)
            ref_hidden = None
            if full:
                assert loss.reference is not None
                with torch.no_grad(), loss.reference.active():
                    ref_hidden = loss.reference.hidden(packed)
            leaf, leaf_values = hidden.detach(), values.detach()
            result = loss_and_grads(
                loss.policy,
                leaf,
                packed.targets,
                of_rows,
                leaf_values,
                options,
                config.logits_mb,
                loss.reference if full else None,
                ref_hidden,
                self._full_kl_coef if full else 0.0,
            )
        roots = [(hidden, leaf.grad), (values, leaf_values.grad)]
        with_graph = [(root, grad) for root, grad in roots if root.requires_grad]
        torch.autograd.backward([root for root, _ in with_graph], [grad for _, grad in with_graph])
        return result

    def _per_token(self, stats: Tensor, own: int) -> Tensor:
        """Stats that are no part of the loss, as means over tokens whatever the aggregation.

        But for entropy and KLs of "seq-mean-token-mean": means over responses of their means.
        """
        if self._config.loss_aggregation == "token":
            return stats
        stats = stats.clone()
        normalizer = self._normalizers[own]
        if self._weights is None:
            stats[FIRST_PART_OF_LOSS:WEIGHTED] *= normalizer / self._tokens[own]
        stats[WEIGHTED:PER_TOKEN] *= normalizer / self._tokens[own]
        return stats

    def approx_kl(self) -> Tensor:
        """See `Minibatches`."""
        return self._stats[-1][APPROX_KL]

    def square_sums(self) -> None:
        """See `Minibatches`."""

    def stats(self) -> Tensor:
        """See `Minibatches`."""
        return torch.stack(self._stats)
