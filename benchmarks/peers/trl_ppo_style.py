"""An eager PPO loop for language models with the algorithm of TRL 1.10's PPOTrainer, written by us.

TRL removed that trainer in September 2026. Like it, this loop pads prompts on the left and responses
on the right, keeps the scores `[B, T, V]` of the whole batch from `generate` until it has read the
log-probs out of them, runs every forward over all tokens with all hidden states returned, walks GAE
back one token at a time, and computes the entropy from a softmax over all logits though it only shows
it. It differs in what would count against it: no accelerate and no Trainer around the loop, one
optimizer step a minibatch whatever the micro-batches (TRL's count shrinks with gradient accumulation),
no gradient checkpointing, and the scores are let go once the log-probs are read.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peers import Stages

INVALID_LOG_PROB = 1.0
"""What log-probs are at padding, in the old, the new and the reference policy alike."""


class Sampled(NamedTuple):
    """A batch as `generate` returns it; P is the longest prompt."""

    tokens: Tensor
    """[B, P + T]: prompts padded on the left, then responses"""
    prompt_width: int
    """P"""
    scores: Tensor
    """[B, T, V] logits over the temperature"""


class Scored(NamedTuple):
    """What the update trains on, all [B, T] but `tokens`; masks are True at padding."""

    tokens: Tensor
    prompt_width: int
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    """[B] of the reward model"""
    padding: Tensor
    padding_after_end: Tensor
    """False at the position after the last token too: there lies the score"""


class Rollout(NamedTuple):
    """A scored batch and its targets, [B, T]."""

    scored: Scored
    advantages: Tensor
    returns: Tensor
    kl: Tensor
    rewards: Tensor


class PolicyAndValue(nn.Module):
    """The two trained models under one optimizer; a forward returns the logits of both."""

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.critic_trunk = getattr(value_model, value_model.base_model_prefix)

    def forward(self, **inputs: Any) -> tuple[Any, Tensor]:
        states = self.critic_trunk(**inputs).hidden_states[-1]
        return self.policy(**inputs), self.value_model.score(states)


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device)


def model_inputs(tokens: Tensor, pad: int) -> dict[str, Any]:
    """Mask, positions and tokens of padded rows; padding is told by its token."""
    mask = tokens != pad
    return {
        "input_ids": tokens.masked_fill(~mask, 0),
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - mask.long(),
        "return_dict": True,
        "output_hidden_states": True,
    }


def selected_log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """Log-softmax at `index`: row by row, and in the dtype of the logits where that is 16 bits."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, index[..., None]).squeeze(-1)
        return chosen - torch.stack([row.logsumexp(-1) for row in logits])
    return torch.stack(
        [
            row.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
            for row, chosen in zip(logits, index, strict=True)
        ]
    )


def first_true(flags: Tensor) -> Tensor:
    """Index of the first True in each row, the row's length where there is none."""
    width = flags.shape[-1]
    places = torch.arange(width, device=flags.device)
    return torch.where(flags, places, width).amin(-1)


def truncated(responses: Tensor, eos: int, pad: int) -> Tensor:
    """Replace what follows the first EOS by padding."""
    end = first_true(responses == eos)[:, None]
    places = torch.arange(responses.shape[1], device=responses.device)
    return responses.masked_fill(places > end, pad)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whitened(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    mean = masked_mean(x, mask)
    count = mask.sum()
    # Unbiased.
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def score_tokens(model: nn.Module, tokens: Tensor, pad: int, prompt_width: int) -> tuple[Any, Any]:
    """The head's output at every token [B, P + T], and at the last token of each row [B]."""
    trunk = getattr(model, model.base_model_prefix)
    states = trunk(**model_inputs(tokens, pad), use_cache=False).hidden_states[-1]
    outputs = model.score(states).squeeze(-1)
    last = first_true(tokens[:, prompt_width:] == pad) - 1 + prompt_width
    return outputs, outputs[torch.arange(len(tokens), device=tokens.device), last]


class TRLStylePPO:
    """The loop, by stages: `sample`, `score`, `advantages`, `update`, `collect_garbage`.

    Args:
        config: `PPOConfig`'s fields by our names, and `response_length`, `temperature`,
            `whiten_rewards`, `missing_eos_penalty`, `kl_estimator`; other fields are not looked at.
        policy, ref_policy: causal language models.
        value_model, reward_model: sequence classifiers with one label.
        pad, eos: token ids; they must differ.
        micro_batch_size: rows of a forward and backward in the update; None for a minibatch at once.
        rollout_batch_size: rows of a forward in sampling and scoring.
    """

    def __init__(
        self,
        config: Any,
        policy: nn.Module,
        ref_policy: nn.Module,
        value_model: nn.Module,
        reward_model: nn.Module,
        *,
        pad: int,
        eos: int,
        micro_batch_size: int | None = None,
        rollout_batch_size: int = 64,
    ) -> None:
        if pad == eos:
            raise ValueError(f"TRLStylePPO: pad = eos = {pad}; padding is told by its token")
        self.config = config
        self.model = PolicyAndValue(policy, value_model)
        self.ref_policy = ref_policy
        self.reward_model = reward_model
        self.pad, self.eos = pad, eos
        self.micro_batch_size = micro_batch_size
        self.rollout_batch_size = rollout_batch_size
        self.device = next(policy.parameters()).device
        self.shuffle = np.random.default_rng(config.seed)
        for model in (self.model, ref_policy, reward_model):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            eps=config.adam_eps,
            weight_decay=0.0,
        )

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def collect_garbage(self) -> None:
        """What TRL does twice an update: after scoring, and after its metrics."""
        self.empty_cache()
        gc.collect()

    def _chunks(self, rows: int) -> list[slice]:
        size = self.rollout_batch_size
        return [slice(start, start + size) for start in range(0, rows, size)]

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]]) -> Sampled:
        """Generate until every row of a chunk has ended."""
        from transformers import GenerationConfig

        c = self.config
        queries = left_padded(prompts, self.pad, self.device)
        generation = GenerationConfig(
            max_new_tokens=c.response_length,
            temperature=c.temperature + 1e-7,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
            output_scores=True,
        )
        width = queries.shape[1]
        found = []
        for chunk in self._chunks(len(queries)):
            mask = queries[chunk] != self.pad
            out = self.model.policy.generate(
                input_ids=queries[chunk].masked_fill(~mask, 0),
                attention_mask=mask,
                generation_config=generation,
            )
            tokens = torch.cat([queries[chunk], out.sequences[:, width:]], 1)
            found.append((tokens, torch.stack(out.scores, 1)))
        longest = max(tokens.shape[1] for tokens, _ in found)
        rows, vocabulary = len(queries), found[0][1].shape[-1]
        # Padded to one length in new memory, the one chunk there may be included.
        tokens = queries.new_full((rows, longest), self.pad)
        scores = found[0][1].new_zeros(rows, longest - width, vocabulary)
        for chunk, (part, logits) in zip(self._chunks(rows), found, strict=True):
            tokens[chunk, : part.shape[1]] = part
            scores[chunk, : logits.shape[1]] = logits
        return Sampled(tokens, width, scores)

    @torch.no_grad()
    def score(self, sampled: Sampled) -> Scored:
        """Log-probs of policy and reference, values, and the reward model's scores."""
        c, width = self.config, sampled.prompt_width
        parts = []
        for chunk in self._chunks(len(sampled.tokens)):
            tokens = sampled.tokens[chunk]
            responses = tokens[:, width:]
            log_probs = selected_log_probs(sampled.scores[chunk], responses)
            self.empty_cache()
            ref_logits = self.ref_policy(**model_inputs(tokens, self.pad)).logits[:, width - 1 : -1]
            ref_logits /= c.temperature + 1e-7
            ref_log_probs = selected_log_probs(ref_logits, responses)
            del ref_logits
            self.empty_cache()
            responses = truncated(responses, self.eos, self.pad)
            ended = torch.cat([tokens[:, :width], responses], 1)
            last = first_true(responses == self.pad) - 1
            values, _ = score_tokens(self.model.value_model, tokens, self.pad, width)
            _, scores = score_tokens(self.reward_model, ended, self.pad, width)
            has_end = (responses == self.eos).any(-1)
            parts.append(
                (log_probs, ref_log_probs, values[:, width - 1 : -1], scores, last, has_end)
            )
        log_probs, ref_log_probs, values, scores, last, has_end = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        if c.missing_eos_penalty is not None:
            scores = torch.where(has_end, scores, scores - c.missing_eos_penalty)
        places = torch.arange(log_probs.shape[1], device=self.device)
        padding = places > last[:, None]
        padding_after_end = places > last[:, None] + 1
        return Scored(
            sampled.tokens,
            width,
            log_probs.masked_fill(padding, INVALID_LOG_PROB),
            ref_log_probs.masked_fill(padding, INVALID_LOG_PROB),
            values.masked_fill(padding_after_end, 0),
            scores,
            padding,
            padding_after_end,
        )

    @torch.no_grad()
    def advantages(self, scored: Scored) -> Rollout:
        """KL penalty a token, the score after the last token, GAE, whitening."""
        c = self.config
        log_ratio = scored.ref_log_probs - scored.log_probs
        kl = -log_ratio if c.kl_estimator == "k1" else log_ratio.exp() - 1 - log_ratio
        rewards = -c.kl_coef * kl
        width = rewards.shape[1]
        after = (~scored.padding).sum(1)
        # Where the response fills the row there is no place after it.
        end = torch.where(after < width, after, after - 1)
        rewards[torch.arange(len(rewards), device=rewards.device), end] += scored.scores
        if c.whiten_rewards:
            rewards = whitened(rewards, ~scored.padding_after_end, shift_mean=False)
            rewards = rewards.masked_fill(scored.padding_after_end, 0)
        values = scored.values
        running: Any = 0.0
        backwards = []
        for t in range(width - 1, -1, -1):
            following = values[:, t + 1] if t + 1 < width else 0.0
            delta = rewards[:, t] + c.gamma * following - values[:, t]
            running = delta + c.gamma * c.gae_lambda * running
            backwards.append(running)
        advantages = torch.stack(backwards[::-1], 1)
        returns = advantages + values
        advantages = whitened(advantages, ~scored.padding).masked_fill(scored.padding, 0)
        self.empty_cache()
        return Rollout(scored, advantages, returns, kl, rewards)

    def losses(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a micro-batch, its statistics, and its logits, which the entropy is taken of."""
        c, scored = self.config, rollout.scored
        tokens = scored.tokens[rows]
        kept, kept_values = ~scored.padding[rows], ~scored.padding_after_end[rows]
        of_tokens = slice(scored.prompt_width - 1, -1)
        output, values = self.model(**model_inputs(tokens, self.pad))
        logits = output.logits[:, of_tokens]
        logits /= c.temperature + 1e-7
        log_probs = selected_log_probs(logits, tokens[:, scored.prompt_width :])
        log_probs = log_probs.masked_fill(~kept, INVALID_LOG_PROB)
        values = values[:, of_tokens].squeeze(-1).masked_fill(~kept_values, 0)

        old_values, returns = scored.values[rows], rollout.returns[rows]
        near = values.clamp(old_values - c.vf_clip_coef, old_values + c.vf_clip_coef)
        error, error_clipped = (values - returns) ** 2, (near - returns) ** 2
        value_loss = 0.5 * masked_mean(torch.max(error, error_clipped), kept_values)

        log_ratio = log_probs - scored.log_probs[rows]
        ratio = log_ratio.exp()
        gain = -rollout.advantages[rows] * ratio
        limited = ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef)
        gain_clipped = -rollout.advantages[rows] * limited
        policy_loss = masked_mean(torch.max(gain, gain_clipped), kept)
        with torch.no_grad():
            stats = {
                "policy/approxkl_avg": 0.5 * (log_ratio**2).mean(),
                "policy/clipfrac_avg": masked_mean((gain_clipped > gain).float(), kept),
                "loss/policy_avg": policy_loss.detach(),
                "loss/value_avg": value_loss.detach(),
                "val/clipfrac_avg": masked_mean((error_clipped > error).float(), kept_values),
                "val/ratio": ratio.mean(),
            }
        return policy_loss + c.vf_coef * value_loss, stats, logits

    def update(self, rollout: Rollout) -> dict[str, float]:
        """All epochs, minibatches and micro-batches; return the means of their statistics."""
        c, scored = self.config, rollout.scored
        batch = len(scored.tokens)
        minibatch = batch // c.num_minibatches
        micro = self.micro_batch_size or minibatch
        seen: dict[str, list[Tensor]] = {}
        for _ in range(c.update_epochs):
            order = self.shuffle.permutation(batch)
            for first in range(0, batch, minibatch):
                chosen = order[first : first + minibatch]
                parts = -(-len(chosen) // micro)
                for start in range(0, len(chosen), micro):
                    rows = torch.from_numpy(chosen[start : start + micro]).to(self.device)
                    loss, stats, logits = self.losses(rollout, rows)
                    (loss / parts).backward()
                    if start + micro >= len(chosen):
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    with torch.no_grad():
                        probs = logits.softmax(-1)
                        entropy = logits.logsumexp(-1) - (probs * logits).sum(-1)
                        stats["policy/entropy_avg"] = entropy.mean()
                    for name, value in stats.items():
                        seen.setdefault(name, []).append(value)
                    del loss, logits, probs, entropy
                self.empty_cache()
        metrics = {name: torch.stack(values) for name, values in seen.items()}
        ratio = metrics["val/ratio"]
        found = {name: values.mean().item() for name, values in metrics.items()}
        found["val/ratio_var"] = ratio.var(correction=0).item()
        found["val/num_eos_tokens"] = (scored.tokens[:, scored.prompt_width :] == self.eos).sum()
        shaping = -c.kl_coef * rollout.kl.sum(1).mean()
        found |= {
            "objective/kl": rollout.kl.sum(1).mean().item(),
            "objective/entropy": (-scored.log_probs).sum(1).mean().item(),
            "objective/non_score_reward": shaping.item(),
            "objective/rlhf_reward": (shaping + scored.scores.mean()).item(),
            "objective/scores": scored.scores.mean().item(),
        }
        found["val/num_eos_tokens"] = int(found["val/num_eos_tokens"])
        return found


def build(case: Any, models: Any, *, micro_batch_size: int | None = None) -> Stages:
    """Make the loop's stages for `llm_arm.py`.

    Args:
        case: an `llm_cases.Case`.
        models: an `llm_cases.Models`.
        micro_batch_size: see `TRLStylePPO`.
    """
    import llm_cases

    config = SimpleNamespace(**case.config, response_length=case.response_length, seed=1)
    loop = TRLStylePPO(
        config,
        models.policy,
        models.ref,
        models.value,
        models.reward,
        pad=llm_cases.PAD,
        eos=llm_cases.EOS,
        micro_batch_size=micro_batch_size,
    )

    def forced(prompts: list[list[int]], responses: list[list[int]]) -> Sampled:
        queries = left_padded(prompts, loop.pad, loop.device)
        longest = max(map(len, responses))
        rows = [row + [loop.pad] * (longest - len(row)) for row in responses]
        tokens = torch.cat([queries, torch.tensor(rows, device=loop.device)], 1)
        logits = llm_cases.teacher_forced(models.policy, prompts, responses, longest)
        return Sampled(tokens, queries.shape[1], logits.div_(config.temperature))

    def count(sampled: Sampled) -> int:
        return int((sampled.tokens[:, sampled.prompt_width :] != loop.pad).sum())

    return Stages(
        sample=loop.sample,
        count=count,
        forced=forced,
        score=lambda sampled: loop.advantages(loop.score(sampled)),
        update=loop.update,
        garbage=loop.collect_garbage,
    )
