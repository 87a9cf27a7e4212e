"""Metrics of rollouts and updates, under TRL's names where it has them, and over real tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional.kl import approx_kl
from ppo_fast.llm.rewards import Scores
from ppo_fast.llm.sampler import Responses
from ppo_fast.llm.scoring import Evaluation
from ppo_fast.results import PPO_STATS
from ppo_fast.update import UpdateStats

PER_RESPONSE = "responses"
PER_TOKEN = "tokens"


class Sums(NamedTuple):
    """Sums over this process's rollout, to be added over processes and divided at the end."""

    items: dict[str, Tensor]
    """0-d; `responses` and `tokens` count"""
    divisors: dict[str, str]
    """which of the two divides an item"""

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """The metrics, from the sums over all processes."""
        found = {name: totals[name] / max(totals[by], 1) for name, by in self.divisors.items()}
        squares = found.pop("score_squares")
        found["objective/scores_std"] = max(squares - found["objective/scores"] ** 2, 0) ** 0.5
        found["val/response_tokens"] = totals[PER_TOKEN]
        return found


def rollout_metrics(
    evaluation: Evaluation,
    scores: Scores,
    shaped: Tensor,
    responses: Responses,
    sampler_log_probs: Tensor,
    kl_coef: float,
) -> Sums:
    """Sums of everything reported of a rollout; nothing is read from the device.

    Args:
        evaluation: of the response tokens.
        scores, shaped: as they came, and as they went into the rewards.
        responses: sampled.
        sampler_log_probs: [M], what the sampler says of its tokens.
        kl_coef: weight of the KL in the reward.
    """
    log_probs = evaluation.log_probs
    device = log_probs.device
    ended = torch.tensor(float(sum(responses.ended)))
    mismatch = approx_kl(sampler_log_probs, log_probs, estimator="k3")
    per_response = {
        "objective/entropy": -log_probs.sum(),  # of whole responses, estimated by their log-prob
        "objective/scores": scores.total.double().sum(),
        "objective/rlhf_reward": shaped.sum(),
        "score_squares": scores.total.double().square().sum(),
        "val/num_eos_tokens": ended,
        "val/response_length": torch.tensor(float(len(log_probs))),
    }
    per_token = {
        "sampler/mismatch_kl": mismatch.sum(),
        "sampler/mismatch_abs": (log_probs - sampler_log_probs).abs().sum(),
    }
    for name, part in scores.parts.items():
        per_response[f"objective/scores/{name}"] = part.sum()
    if evaluation.kl is not None:
        kl = evaluation.kl.sum()
        per_response["objective/kl"] = per_response["objective/kl_per_seq"] = kl
        per_response["objective/non_score_reward"] = -kl_coef * kl
        per_response["objective/rlhf_reward"] = shaped.sum().to(device) - kl_coef * kl
        per_token["objective/kl_per_token"] = kl
    items = {
        **per_response,
        **per_token,
        PER_RESPONSE: torch.tensor(float(len(responses.lengths))),
        PER_TOKEN: torch.tensor(float(len(log_probs))),
    }
    return Sums(
        {name: item.to(device) for name, item in items.items()},
        dict.fromkeys(per_response, PER_RESPONSE) | dict.fromkeys(per_token, PER_TOKEN),
    )


def update_metrics(stats: UpdateStats, lr: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """What an update reports, 0-d tensors by name."""
    means = dict(zip(PPO_STATS, stats.means.float().unbind(), strict=True))
    return {
        "policy/approxkl_avg": means["approx_kl"],
        "policy/clipfrac_avg": means["clip_fraction"],
        "policy/dual_clipfrac_avg": means["dual_clip_fraction"],
        "policy/entropy_avg": means["entropy"],
        "policy/kl_to_ref_avg": means["kl"],
        "loss/policy_avg": means["policy_loss"],
        "loss/value_avg": means["value_loss"],
        "val/clipfrac_avg": means["value_clip_fraction"],
        "val/ratio": means["ratio_mean"],
        "val/explained_variance": variance.float(),
        "val/grad_norm": stats.grad_norm.float(),
        "val/optimizer_steps": stats.steps,
        "val/skipped_steps": stats.skipped.float(),
        "val/stopped_by_target_kl": stats.stopped,
        "diag/ratio_dev_first": stats.first[PPO_STATS.index("ratio_deviation")].float(),
        "lr": lr,
    }
