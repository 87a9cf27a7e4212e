"""Settings of PPO for language models."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from ppo_fast.config import PPOConfig, _require

CHOICES = {
    "kl_estimator": ("k1", "k2", "k3", "full"),
    "kl_in": ("reward", "loss"),
    "loss_aggregation": ("token", "seq-mean-token-mean", "seq-mean-token-sum", "constant"),
    "importance_sampling": ("none", "token", "seq"),
    "precision": ("fp32", "bf16"),
    "layout": ("auto", "packed", "padded"),
    "head": ("auto", "logits", "fused", "liger"),
    "sampler": ("auto", "cached", "generate"),
}


@dataclass(frozen=True, kw_only=True)
class RLHFConfig(PPOConfig):
    """PPO on responses of a language model. One update: `rollout_batch_size` responses."""

    learning_rate: float = 3e-6
    """Adam's step size for the policy"""
    critic_learning_rate: float | None = None
    """Adam's step size for what only the critic has; None means `learning_rate`"""
    gamma: float = 1.0
    """discount factor per token"""
    num_minibatches: int = 1
    """minibatches per pass, each one optimizer step whatever the micro-batches"""
    norm_adv: Literal["minibatch", "batch", "none"] | bool = "batch"
    """whiten advantages over each minibatch, over all tokens of the rollout, or not at all"""
    vf_coef: float = 0.1
    """weight of the value loss 0.5 * (value - return)^2"""
    ent_coef: float = 0.0
    """weight of the entropy bonus; the entropy is reported in any case"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm; inf for no clipping"""
    kl_coef: float = 0.05
    """weight of KL(policy || reference); 0 needs no reference"""
    kl_unit: Literal["token", "seq"] = "seq"
    """`kl_target` is a mean per token, or a mean of sums per response"""
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """of the KL per token: from the sampled token (Schulman 2020), or exact over the vocabulary, which
    takes a forward of the reference in the update too. In the reward k1 and full are unbiased"""
    kl_in: Literal["reward", "loss"] = "reward"
    """subtract the KL from the reward of every token, or add it to the loss (then beside whitened
    advantages, and without regard to later tokens)"""
    loss_aggregation: Literal["token", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = (
        "token"
    )
    """mean over all tokens of a minibatch; mean over responses of their mean or sum; or sum over
    tokens divided by responses * response_length (Dr. GRPO). Always over the whole minibatch"""
    rollout_batch_size: int = 64
    """prompts per update, over all processes"""
    response_length: int = 53
    """most tokens of a response, the end-of-sequence token included"""
    temperature: float = 1.0
    """divides the logits in sampling, old, new and reference log-probs alike"""
    stop_token_ids: tuple[int, ...] | None = None
    """ids that end a response; None means the tokenizer's or the model's eos"""
    missing_eos_penalty: float | None = None
    """subtracted from the score of a response that did not end (TRL)"""
    missing_eos_score: float | None = None
    """replaces that score (Stiennon et al. 2020)"""
    clip_scores: float | None = None
    """scores are clipped to +- this"""
    whiten_scores: bool = False
    """give the scores of a rollout mean 0 and standard deviation 1"""
    whiten_rewards: bool = False
    """divide token rewards by their standard deviation (TRL)"""
    importance_sampling: Literal["none", "token", "seq"] = "none"
    """weight the policy's loss by old / sampler probability, per token or response, truncated: for
    samplers whose arithmetic differs from training's"""
    importance_cap: float = 2.0
    """largest such weight"""
    token_budget: int = 8192
    """most tokens of a forward; more are done one after another, with the same gradient"""
    head: Literal["auto", "logits", "fused", "liger"] = "auto"
    """how log-probs and loss come of hidden states: through logits, or by ops that hold none
    (`ppo_loss_from_hidden`); auto takes these where the head is one linear layer and the vocabulary
    large; liger has liger-kernel's Hopper kernel score rollouts. kl_estimator="full" makes logits"""
    logits_mb: int | None = None
    """most megabytes of logits at a time, or of the fused head's workspace; None means 512, and for
    logits on a CPU 32, which fit its caches better"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast: parameters, optimizer, log-probs and losses stay float32"""
    head_fp32: bool = False
    """compute the head's product in float32 also with precision bf16"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward: less memory, a third more time"""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """sequences end to end, or in padded rows; auto packs where the model can"""
    sampler: Literal["auto", "cached", "generate"] = "auto"
    """our decoding loop or transformers' generate"""
    sample_batch_size: int | None = None
    """responses generated at a time; None means all of a process's"""
    total_episodes: int | None = None
    """responses to train on; None means `num_epochs`"""
    num_epochs: float = 1.0
    """passes over the prompts, where total_episodes does not say how many"""
    device: str = "auto"
    """"auto" is where the model is; "cpu", "cuda" or "cuda:1" moves all models there"""
    run_dir: str | None = None
    """folder for config, checkpoint, metrics, samples and plots; None writes nothing"""
    save_every: int = 10
    """updates between checkpoints in run_dir"""
    eval_every: int = 10
    """updates between evaluations on the eval prompts, if there are any"""
    torch_threads: int | None = None
    """CPU threads during training; None leaves them as they are"""
    progress_bar: bool = False
    """show a progress bar"""

    def __post_init__(self) -> None:
        """Check every field; see `PPOConfig.__post_init__`."""
        if isinstance(self.run_dir, os.PathLike):
            object.__setattr__(self, "run_dir", os.fspath(self.run_dir))
        super().__post_init__()
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for field, allowed in CHOICES.items():
            value = getattr(self, field)
            _require(value in allowed, field, value, f"one of {', '.join(allowed)}")
        for field in (
            *("rollout_batch_size", "response_length", "token_budget"),
            *("save_every", "eval_every"),
        ):
            value = getattr(self, field)
            _require(value >= 1, field, value, "an integer >= 1")
        for field in ("logits_mb", "sample_batch_size", "total_episodes", "torch_threads"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, value, "an integer >= 1, or None")
        for field in ("critic_learning_rate", "clip_scores"):
            value = getattr(self, field)
            _require(value is None or value > 0, field, value, "a number above 0, or None")
        for field in ("temperature", "importance_cap", "num_epochs"):
            value = getattr(self, field)
            _require(value > 0 and math.isfinite(value), field, value, "a number above 0")
        score, penalty = self.missing_eos_score, self.missing_eos_penalty
        _require(
            score is None or math.isfinite(score),
            *("missing_eos_score", score, "a finite number, or None"),
        )
        _require(
            penalty is None or 0 <= penalty < math.inf,
            *("missing_eos_penalty", penalty, "a finite number >= 0, or None: it is subtracted"),
        )
        stops = self.stop_token_ids
        _require(
            stops is None
            or (isinstance(stops, tuple) and all(isinstance(i, int) and i >= 0 for i in stops)),
            *("stop_token_ids", stops, "a tuple of token ids, or None"),
        )
        _require(
            self.kl_controller != "proportional" or self.rollout_batch_size < 5 * self.kl_horizon,
            *("kl_horizon", self.kl_horizon, "more than a fifth of rollout_batch_size"),
        )
        _require(
            penalty is None or score is None,
            "missing_eos_score",
            score,
            "None where missing_eos_penalty is given: one subtracts, the other replaces",
        )
        _require(
            self.kl_in == "reward" or self.kl_estimator != "k1" or self.kl_coef == 0,
            "kl_estimator",
            self.kl_estimator,
            "k2, k3 or full for kl_in='loss', where the gradient of k1 is 0 in expectation",
        )
        _require(
            self.kl_target is None or self.kl_controller != "fixed",
            "kl_target",
            self.kl_target,
            "None for kl_controller='fixed'; 'proportional' and 'paper' aim at it",
        )
        _require(
            self.adaptive_lr_kl is None, "adaptive_lr_kl", self.adaptive_lr_kl, "None for RLHF"
        )
        _require(
            self.rollout_batch_size >= self.num_minibatches,
            "num_minibatches",
            self.num_minibatches,
            f"at most rollout_batch_size = {self.rollout_batch_size}",
        )
