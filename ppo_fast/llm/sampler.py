"""Sampling responses to prompts: the protocol, and what the shipped samplers share.

`CachedSampler` (cached_sampler.py) is a key-value-cache loop of our own, `GenerateSampler`
(generate_sampler.py) drives `model.generate`; `make_sampler` picks. Both draw by the same random
numbers, two a token from a Philox stream of the row's own seed, so a response depends on its prompt
and its seed: not on the batch it is in, nor on which of the two drew it (up to a random number that
falls within float32 rounding of a boundary between two tokens).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ppo_fast.llm.prompts import check_tokenizer

if TYPE_CHECKING:
    from ppo_fast.llm.cached_sampler import CachedSampler
    from ppo_fast.llm.generate_sampler import GenerateSampler

log = logging.getLogger("ppo_fast")


class Responses(NamedTuple):
    """Sampled responses, in the order of their prompts."""

    tokens: Tensor
    """[B, T] int64, T = max_new_tokens; the pad id from a row's length on."""
    log_probs: Tensor
    """[B, T] float32, of the tokens under softmax(logits / temperature); 0 at padding."""
    lengths: list[int]
    """Tokens of each response, at least 1; an EOS token counts."""
    ended: list[bool]
    """Whether the last token is an EOS token. False: cut off at max_new_tokens."""


class Sampler(Protocol):
    """What a trainer asks for responses; an external engine can stand in."""

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
    ) -> Responses:
        """Sample a response to each prompt, row i by seeds[i]."""

    def load_policy(self, model: nn.Module) -> None:
        """Take over the policy's weights; called before every rollout.

        Samplers that hold the policy itself have nothing to do.
        """


def make_sampler(
    model: Any,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    kind: str = "auto",
    **options: Any,
) -> CachedSampler | GenerateSampler:
    """The faster sampler that can run a model.

    Args:
        model: a causal LM of transformers, or one wrapped by peft.
        eos_token_ids: tokens that end a response; may be empty.
        pad_token_id: fills up rows; may be an EOS id.
        kind: "cached", "generate", or "auto": "cached" if it can run the model, which is the faster.
        options: passed on, such as `batch_size` and `max_batch_tokens`.

    Raises:
        ValueError: kind is another word, or "cached" with a model it cannot run.
    """
    from ppo_fast.llm.cached_sampler import CachedSampler, unsupported
    from ppo_fast.llm.generate_sampler import GenerateSampler

    if kind not in ("auto", "cached", "generate"):
        raise ValueError(f"make_sampler: kind is {kind!r}; expected 'auto', 'cached' or 'generate'")
    why_not = unsupported(model)
    if kind == "cached" or (kind == "auto" and why_not is None):
        why = "asked for" if kind == "cached" else "the faster one, and it can run this model"
        log.info("sampling with CachedSampler: %s", why)
        return CachedSampler(model, eos_token_ids, pad_token_id, **options)
    why = "asked for" if kind == "generate" else f"CachedSampler cannot run this model, {why_not}"
    log.info("sampling with GenerateSampler (model.generate): %s", why)
    return GenerateSampler(model, eos_token_ids, pad_token_id, **options)


def unwrapped(name: str, model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapters in place; others as they are.

    Raises:
        ValueError: an adapter learns a prompt of its own, which only the wrapper puts in.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "get_base_model"):
        return model
    for adapter, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{name}: adapter {adapter!r} is a learned prompt ({config.peft_type}); expected one "
                "that changes weights in place, such as LoRA"
            )
    return model.get_base_model()


def vocabulary_of(model: Any) -> int:
    """How many token ids the model's embedding takes."""
    return int(model.get_input_embeddings().weight.shape[0])


def device_of(model: Any) -> torch.device:
    """Where the model wants its token ids."""
    return model.get_input_embeddings().weight.device


def context_of(model: Any) -> int | None:
    """The longest sequence the model's config allows; None if it names no limit."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def check_special_tokens(
    name: str, model: Any, eos_token_ids: Sequence[int], pad_token_id: int
) -> tuple[int, ...]:
    """Return the EOS ids as a tuple; raise unless they and the pad id are in the vocabulary.

    Raises:
        TypeError: an id is not an int, or the EOS ids are not a sequence.
        ValueError: an id is outside the vocabulary.
    """
    if isinstance(eos_token_ids, int) or eos_token_ids is None:
        raise TypeError(
            f"{name}: eos_token_ids is {eos_token_ids!r}; expected a sequence of ids, such as "
            "[tokenizer.eos_token_id], or () for responses without an end"
        )
    eos_token_ids = tuple(eos_token_ids)
    V = vocabulary_of(model)
    for what, token in [("eos_token_ids", e) for e in eos_token_ids] + [
        ("pad_token_id", pad_token_id)
    ]:
        if not _is_int(token):
            remedy = (
                "; set tokenizer.pad_token, which may be the EOS token" if token is None else ""
            )
            raise TypeError(f"{name}: {what} holds {token!r}; expected a token id{remedy}")
        if not 0 <= token < V:
            raise ValueError(
                f"{name}: {what} holds {token}; expected ids in 0..{V - 1}, which the model's "
                "embedding takes; call model.resize_token_embeddings if the tokenizer has more"
            )
    return eos_token_ids


def check_limits(name: str, batch_size: int | None, max_batch_tokens: int | None) -> None:
    """Raise unless the limits of a batch are None or positive ints."""
    for what, limit in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
        if limit is not None and not (_is_int(limit) and limit >= 1):
            raise ValueError(
                f"{name}: {what} is {limit!r}; expected an int >= 1, or None for no limit"
            )


def check_request(
    name: str,
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: list[int],
) -> None:
    """Raise unless a call's arguments fit each other and the model.

    Raises:
        TypeError: prompts are texts, or a seed or length is not an int.
        ValueError: no prompts, an empty one, one that does not fit into the context with its
            response, token ids outside the vocabulary, or a temperature, length, number of seeds or
            seed out of range.
    """
    if len(prompts) == 0:
        raise ValueError(f"{name}: prompts is empty; expected at least one prompt")
    if not _is_int(max_new_tokens):
        raise TypeError(f"{name}: max_new_tokens is {max_new_tokens!r}; expected an int")
    if max_new_tokens < 1:
        raise ValueError(f"{name}: max_new_tokens is {max_new_tokens}; expected at least 1")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{name}: temperature is {temperature}; expected a positive finite number (a small one, "
            "such as 0.01, is nearly greedy)"
        )
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{name}: there are {len(seeds)} seeds for {len(prompts)} prompts; expected one a prompt"
        )
    for seed in seeds:
        if not _is_int(seed):
            raise TypeError(f"{name}: seeds hold {seed!r}; expected ints")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"{name}: seeds hold {seed}; expected 0 <= seed < 2**64")
    V, context = vocabulary_of(model), context_of(model)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            raise TypeError(
                f"{name}: prompts[{row}] is a {type(prompt).__name__}; expected a list of token ids "
                "(tokenizer.encode(text))"
            )
        if len(prompt) == 0:
            raise ValueError(
                f"{name}: prompts[{row}] is empty; expected at least one token, such as the BOS token"
            )
        if min(prompt) < 0 or max(prompt) >= V:
            token = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(
                f"{name}: prompts[{row}] holds token {token}; expected ids in 0..{V - 1}. Prompt and "
                "model are of different tokenizers, or the embedding was not resized"
            )
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"{name}: prompts[{row}] has {len(prompt)} tokens, with max_new_tokens "
                f"{max_new_tokens} that is {len(prompt) + max_new_tokens}; expected at most the "
                f"model's context of {context}; shorten the prompt or lower max_new_tokens"
            )


def _is_int(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def batches(
    name: str,
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_size: int | None,
    max_batch_tokens: int | None,
) -> list[list[int]]:
    """Split rows into batches of at most so many rows, and tokens with padding and responses.

    Where there is more than one batch, rows of like length go together, the longest first, so that
    what does not fit into memory shows at once.

    Raises:
        ValueError: a row alone is over `max_batch_tokens`.
    """
    longest = max(lengths) + max_new_tokens
    if max_batch_tokens is not None and longest > max_batch_tokens:
        raise ValueError(
            f"{name}: max_batch_tokens is {max_batch_tokens}, but the longest prompt and its "
            f"response may have {longest}; expected at least that"
        )

    def limit(length: int) -> int:
        rows = len(lengths) if batch_size is None else batch_size
        if max_batch_tokens is not None:
            rows = min(rows, max_batch_tokens // (length + max_new_tokens))
        return rows

    if len(lengths) <= limit(max(lengths)):
        return [list(range(len(lengths)))]
    parts: list[list[int]] = []
    rows_left = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows_left == 0:
            parts.append([])
            rows_left = limit(lengths[row])
        parts[-1].append(row)
        rows_left -= 1
    return parts


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] int64 and mask [B, P] bool of prompts that end in the last column."""
    longest = max(map(len, prompts))
    tokens = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Two numbers in [0, 1) for every row and step, [B, T, 2] float64 on the CPU.

    Row i is the start of the Philox stream of seeds[i], so a longer T goes on where a shorter ended.
    """
    rows = [np.random.Generator(np.random.Philox(key=s)).random((steps, 2)) for s in seeds]
    return torch.from_numpy(np.stack(rows))


class Drawn(NamedTuple):
    """A batch as it was drawn: what stands behind a row's end is arbitrary. See `Responses`."""

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    ended: Tensor


def sampled(
    name: str,
    sample_batch: Callable[[list[list[int]], Tensor], Drawn],
    parts: list[list[int]],
    prompts: list[list[int]],
    uniform: Tensor,
    pad_token_id: int,
) -> Responses:
    """Run batch after batch and put their rows in the caller's order.

    Raises:
        ValueError: the model gave logits that are not numbers.
    """
    drawn = [sample_batch([prompts[row] for row in part], uniform[part]) for part in parts]
    tokens, log_probs, lengths, ended = (torch.cat(field) for field in zip(*drawn, strict=True))
    place = [0] * len(prompts)
    for position, row in enumerate(row for part in parts for row in part):
        place[row] = position
    if place != list(range(len(prompts))):
        index = torch.tensor(place, device=tokens.device)
        tokens, log_probs, lengths, ended = (
            x.index_select(0, index) for x in (tokens, log_probs, lengths, ended)
        )
    behind = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
    tokens = tokens.masked_fill(behind, pad_token_id)
    log_probs = log_probs.masked_fill(behind, 0.0)
    finite = log_probs.isfinite().all(1)
    facts = torch.stack([lengths, ended.long(), finite.long()]).tolist()
    if 0 in facts[2]:
        raise ValueError(
            f"{name}: the model's logits for prompts[{facts[2].index(0)}] hold NaN or infinity; its "
            "weights have diverged, or its dtype is too narrow"
        )
    return Responses(tokens, log_probs, facts[0], [bool(flag) for flag in facts[1]])


@contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Within the block no gradient, dropout or gradient checkpointing; afterwards as it was.

    Not `torch.inference_mode`: what a model keeps of it, such as rotary tables, would break the
    next backward pass.
    """
    training = [module for module in model.modules() if module.training]
    checkpointing: list[Any] = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    model.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module in checkpointing:
            module.gradient_checkpointing = True


def stream(seed: int, number: int) -> int:
    """The sampler's seed of a response: streams of one seed lie side by side."""
    return ((seed << 40) + number) % (1 << 64)


def response_ids(responses: Responses) -> list[list[int]]:
    """The tokens of each response, without padding; reads them from the device once."""
    rows = responses.tokens.tolist()
    return [row[:length] for row, length in zip(rows, responses.lengths, strict=True)]


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    first: int = 0,
    batch_size: int | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """A response to each prompt as token ids, EOS included, and whether it ended.

    Args:
        model, tokenizer: a causal LM of transformers and its tokenizer.
        prompts: lists of token ids.
        max_new_tokens, temperature: of the responses.
        seed, first: response k is number first + k of this seed's stream.
        batch_size: rows sampled at once; None: all.
    """
    pad, eos = check_tokenizer(tokenizer)
    responses = make_sampler(model, [eos], pad, batch_size=batch_size)(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=[stream(seed, first + k) for k in range(len(prompts))],
    )
    return response_ids(responses), responses.ended
