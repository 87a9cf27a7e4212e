"""Our `PPOTrainer` by stages, as `llm_arm.py` drives it."""

from __future__ import annotations

from itertools import count
from typing import Any

import llm_cases
import torch

from peers import Stages
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.prompts import Prompts
from ppo_fast.llm.reports import update_metrics
from ppo_fast.llm.rollout import TokenRollout
from ppo_fast.llm.sampler import Responses

Sampled = tuple[Prompts, Responses]


def build(case: Any, models: Any, *, micro_batch_size: int | None = None, **options: Any) -> Stages:
    """Make the trainer's stages.

    Args:
        case: an `llm_cases.Case`.
        models: an `llm_cases.Models`.
        micro_batch_size: cut forwards by the tokens that so many rows of full length have; None
            leaves the budget at its default.
        options: fields of `RLHFConfig` beyond the case's.
    """
    if micro_batch_size is not None:
        longest = case.prompt_lengths[1] + case.response_length
        options["token_budget"] = micro_batch_size * longest
    config = RLHFConfig(
        **{
            **case.config,
            "response_length": case.response_length,
            "rollout_batch_size": case.batch,
            "anneal_lr": False,
            # TRL 1.10 clips no gradients.
            "max_grad_norm": float("inf"),
            "device": case.device,
            **options,
        }
    )
    trainer = PPOTrainer(
        config,
        model=models.policy,
        ref_model=models.ref,
        reward_model=models.reward,
        value_model=models.value,
        train_dataset=llm_cases.make_prompts(case, 0),
    )
    turns = count(1)

    def wrapped(prompts: list[list[int]]) -> Prompts:
        return Prompts(prompts, [""] * len(prompts), {})

    def sample(prompts: list[list[int]]) -> Sampled:
        own = wrapped(prompts)
        return own, trainer.sample(own, seed=next(turns))

    def forced(prompts: list[list[int]], responses: list[list[int]]) -> Sampled:
        longest = max(map(len, responses))
        logits = llm_cases.teacher_forced(models.policy, prompts, responses, longest)
        padded = [row + [llm_cases.PAD] * (longest - len(row)) for row in responses]
        tokens = torch.tensor(padded, device=trainer.device)
        log_probs = torch.stack(
            [
                # A row at a time: the logits are to leave no mark on the memory that is watched.
                row.float().div(config.temperature).log_softmax(-1).gather(-1, own[:, None])[:, 0]
                for row, own in zip(logits, tokens, strict=True)
            ]
        )
        lengths = [len(row) for row in responses]
        for row, length in zip(log_probs, lengths, strict=True):
            row[length:] = 0
        ended = [row[-1] == llm_cases.EOS for row in responses]
        return wrapped(prompts), Responses(tokens, log_probs, lengths, ended)

    def update(rollout: TokenRollout) -> dict[str, float]:
        stats = trainer.update(rollout)
        variance = torch.zeros((), device=trainer.device)
        found = update_metrics(stats, trainer.optimizer.lr, variance)
        return {name: float(value) for name, value in found.items()}

    return Stages(
        sample=sample,
        count=lambda sampled: sum(sampled[1].lengths),
        forced=forced,
        score=lambda sampled: trainer.score(*sampled),
        update=update,
    )
