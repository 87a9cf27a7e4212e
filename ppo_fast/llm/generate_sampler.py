"""Sampling by transformers' own `model.generate`, for models that `CachedSampler` cannot run.

Our draw takes the place of generate's: a logits processor, called with a step's logits, draws by the
rows' own random numbers, keeps token and log-probability, and leaves generate no other token to pick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.extras import require
from ppo_fast.functional.sample import sample_from_logits
from ppo_fast.llm.sampler import (
    Drawn,
    Responses,
    batches,
    check_limits,
    check_request,
    check_special_tokens,
    device_of,
    left_padded,
    sampled,
    sampling_mode,
    uniforms,
    unwrapped,
)

_NAME = "GenerateSampler"


class GenerateSampler:
    """Sample from any decoder that has transformers' `generate`, or one wrapped by peft.

    What the model's generation config asks for (top-p, repetition penalty and the like) is left
    aside: the responses follow softmax(logits / temperature), whose log-probs are returned.

    Args:
        model: the policy itself: rollouts follow its weights.
        eos_token_ids: tokens that end a response; may be empty: all have full length then.
        pad_token_id: fills up rows; may be an EOS id, padding is told by lengths.
        batch_size: rows sampled at once; None: all.
        max_batch_tokens: rows times (longest prompt + max_new_tokens) at once; None: no limit.

    Raises:
        TypeError: the model has no `generate`, or a token id is not an int.
        ValueError: token ids are outside the model's vocabulary, it has an encoder, or a limit is
            below 1.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.model = unwrapped(_NAME, model)
        if not hasattr(self.model, "generate"):
            raise TypeError(
                f"{_NAME}: model is a {type(model).__name__} without generate; expected a causal LM "
                "of transformers, such as AutoModelForCausalLM.from_pretrained(...)"
            )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{_NAME}: {type(model).__name__} has an encoder; expected a decoder-only causal LM"
            )
        check_limits(_NAME, batch_size, max_batch_tokens)
        self.eos_token_ids = check_special_tokens(_NAME, self.model, eos_token_ids, pad_token_id)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens

    def load_policy(self, model: nn.Module) -> None:
        """Nothing to do: the sampler holds the policy itself."""

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
    ) -> Responses:
        """Sample a response to each prompt; see `CachedSampler`."""
        check_request(_NAME, self.model, prompts, max_new_tokens, temperature, seeds)
        lengths = [len(prompt) for prompt in prompts]
        parts = batches(_NAME, lengths, max_new_tokens, self.batch_size, self.max_batch_tokens)

        def sample_batch(prompts: list[list[int]], uniform: Tensor) -> Drawn:
            return self._sample(prompts, uniform, temperature)

        uniform = uniforms(seeds, max_new_tokens)
        with sampling_mode(self.model), self._bare_config():
            return sampled(_NAME, sample_batch, parts, prompts, uniform, self.pad_token_id)

    @contextmanager
    def _bare_config(self) -> Iterator[None]:
        """Hide the model's generation config, with which generate fills up what a call leaves open."""
        before = self.model.generation_config
        self.model.generation_config = _transformers().GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = before

    def _sample(self, prompts: list[list[int]], uniform: Tensor, temperature: float) -> Drawn:
        device = device_of(self.model)
        tokens, mask = left_padded(prompts, self.pad_token_id, device)
        draw = _Draw(uniform.to(device), temperature, self.eos_token_ids)
        transformers = _transformers()
        self.model.generate(
            input_ids=tokens,
            attention_mask=mask.long(),
            logits_processor=transformers.LogitsProcessorList([draw]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=uniform.shape[1],
                do_sample=False,
                eos_token_id=list(self.eos_token_ids) or None,
                pad_token_id=self.pad_token_id,
            ),
        )
        return Drawn(draw.tokens, draw.log_probs, draw.lengths, draw.ended)


def _transformers() -> Any:
    return require("transformers", "llm", "sampling with GenerateSampler")


class _Draw:
    """A logits processor that draws: generate's greedy choice is then the token drawn."""

    def __init__(self, uniform: Tensor, temperature: float, eos_token_ids: Sequence[int]) -> None:
        rows, steps, _ = uniform.shape
        device = uniform.device
        self.uniform = uniform
        self.temperature = temperature
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(rows, steps, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = self.step
        drawn = sample_from_logits(
            scores, temperature=self.temperature, uniform=self.uniform[:, step]
        )
        self.tokens[:, step] = drawn.actions
        self.log_probs[:, step] = drawn.log_probs
        self.lengths += ~self.ended
        token = drawn.actions.unsqueeze(1)
        self.ended |= (token == self.eos).any(1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
