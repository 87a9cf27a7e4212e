"""From responses to what an update learns from: log-probs, values, token rewards, advantages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.distributed import all_moments
from ppo_fast.functional.gae import gae_packed
from ppo_fast.functional.whiten import masked_whiten, moments
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.head import token_log_probs
from ppo_fast.llm.models import Critic, Policy
from ppo_fast.llm.packing import micro_batches
from ppo_fast.llm.rewards import kl_per_token, token_rewards, whiten_rewards
from ppo_fast.llm.rollout import Sequences, TokenRollout, whitening_scale


class Evaluation(NamedTuple):
    """What policy, critic and reference say of the response tokens; [M] float32 each."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    ref_log_probs: Tensor | None
    kl: Tensor | None
    """KL(policy || reference) by the configured estimator, nats"""


@torch.no_grad()
def evaluate_tokens(
    policy: Policy,
    critic: Critic | None,
    reference: Policy | None,
    sequences: Sequences,
    config: RLHFConfig,
) -> Evaluation:
    """Log-probs, entropies, values and KL of all response tokens, micro-batch by micro-batch.

    They do not depend on which sequences share a micro-batch.
    """
    columns: list[list[Tensor]] = []
    places: list[Tensor] = []
    full = config.kl_estimator == "full"
    device = policy.device.type
    for group in micro_batches(sequences.lengths, config.token_budget):
        packed, rows = sequences.take(group)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            hidden = policy.hidden(packed)
            values = critic(packed, hidden) if critic is not None else None
            ref_hidden = None
            if reference is not None:
                with reference.active():
                    ref_hidden = reference.hidden(packed)
            found = token_log_probs(
                policy,
                hidden,
                packed.targets,
                config.temperature,
                config.logits_mb,
                reference,
                ref_hidden,
                full,
            )
        if values is None:
            values = torch.zeros_like(found.log_probs)
        parts = (found.log_probs, found.entropy, values, found.ref_log_probs, found.kl)
        columns.append([part for part in parts if part is not None])
        places.append(rows)
    order = torch.cat(places).argsort()
    log_probs, entropy, values, *of_reference = (
        torch.cat(column)[order] for column in zip(*columns, strict=True)
    )
    ref_log_probs = of_reference[0] if of_reference else None
    kl = of_reference[1] if len(of_reference) > 1 else None
    if kl is None and ref_log_probs is not None:
        kl = kl_per_token(log_probs, ref_log_probs, config.kl_estimator)
    return Evaluation(log_probs, entropy, values, ref_log_probs, kl)


def make_rollout(
    sequences: Sequences,
    evaluation: Evaluation,
    scores: Tensor,
    kl_coef: float,
    sampler_log_probs: Tensor,
    config: RLHFConfig,
) -> TokenRollout:
    """Token rewards, advantages and returns of a rollout.

    Args:
        sequences: B.
        evaluation: of their tokens.
        scores: [B] float32, shaped as configured.
        kl_coef: weight of the KL in the reward; 0 where it is in the loss.
        sampler_log_probs: [M], for importance weights.
        config: gamma, lambda, whitening, importance sampling.
    """
    values = evaluation.values
    kl = evaluation.kl if kl_coef else None
    rewards = token_rewards(
        scores.to(values.device), kl, sequences.response_lengths, kl_coef=kl_coef
    ).to(values.dtype)
    if config.whiten_rewards:
        rewards = whiten_rewards(rewards, moments=all_moments(moments(rewards)))
    # A response that was cut off ends as well: its score is all that ever comes of it.
    terminated = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    terminated[sequences.last_tokens()] = True
    advantages, returns = gae_packed(
        rewards,
        values,
        values.new_zeros(len(sequences)),
        terminated,
        sequences.cu_seqlens(),
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    scale = advantages.new_ones(())
    if config.norm_adv == "batch":
        found = all_moments(moments(advantages))
        advantages = masked_whiten(advantages, moments=found)
        scale = whitening_scale(found)
    if config.importance_sampling != "none":
        # The policy's loss is homogeneous in the advantage, so a weight on one is one on the other;
        # the value loss stays as it is.
        weights = importance_weights(evaluation.log_probs, sampler_log_probs, sequences, config)
        advantages = advantages * weights
    in_loss = config.kl_in == "loss" and config.kl_coef > 0
    return TokenRollout(
        sequences,
        evaluation.log_probs,
        values,
        advantages,
        returns,
        scale,
        evaluation.ref_log_probs if in_loss else None,
    )


def importance_weights(
    log_probs: Tensor, sampler_log_probs: Tensor, sequences: Sequences, config: RLHFConfig
) -> Tensor:
    """[M] weights policy / sampler, at most `importance_cap`, per token or per response.

    Truncated importance sampling (Ionides 2008; for samplers that differ from training,
    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    difference = log_probs - sampler_log_probs
    if config.importance_sampling == "seq":
        lengths = torch.tensor(sequences.response_lengths, device=difference.device)
        owner = torch.arange(len(sequences), device=difference.device).repeat_interleave(
            lengths, output_size=sequences.num_tokens
        )
        total = difference.new_zeros(len(sequences)).index_add_(0, owner, difference)
        difference = total[owner]
    return difference.clamp(-20, 20).exp().clamp(max=config.importance_cap)
