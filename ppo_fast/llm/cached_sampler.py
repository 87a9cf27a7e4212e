"""Sampling by a key-value-cache loop of our own: one pass over the prompts, one a token.

Against `model.generate` it saves the cache's copies (see kv_cache.py), the rows that have ended,
which are moved out of the batch, and generate's work around each step. On a GPU a step is recorded
as a CUDA graph, one for every number of rows, and the host looks at the device only now and then.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.capture import Phase, may_read
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

log = logging.getLogger("ppo_fast")

SLOT_MULTIPLE = 64
"""Slots of a recorded step are rounded up to it, so that rollouts of like length share a graph."""

FIXED_ATTENTION = ("sdpa", "eager", "ppo_fast")
"""Attention that reads the mask; flash attention cuts off at the end of the cache instead."""

_NAME = "CachedSampler"


def unsupported(model: Any) -> str | None:
    """Say why `CachedSampler` cannot run a model, or None if it can."""
    model = unwrapped(_NAME, model)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        return f"{type(model).__name__} is not a transformers model"
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        return "it has an encoder"
    takes = inspect.signature(model.forward).parameters
    lacking = {"attention_mask", "position_ids", "past_key_values"} - set(takes)
    if lacking:
        return f"its forward does not take {', '.join(sorted(lacking))}"
    if getattr(model, "_is_stateful", False):
        return "it keeps a state other than keys and values"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    if getattr(config, "alibi", False):
        return "its positions are biases of the attention (ALiBi)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        return "its config has no num_hidden_layers"
    return None


class CachedSampler:
    """Sample from a causal LM of transformers, or one wrapped by peft, in this process.

    The model runs in eval mode and without gradients, and is left as it was found. On a GPU the cache
    of the last batch is kept for the next rollout, for which its steps are recorded; see `release`.

    Args:
        model: the policy itself: rollouts follow its weights.
        eos_token_ids: tokens that end a response; may be empty: all have full length then.
        pad_token_id: fills up rows; may be an EOS id, padding is told by lengths.
        batch_size: rows sampled at once; None: all.
        max_batch_tokens: rows times (longest prompt + max_new_tokens) at once; None: no limit. The
            cache takes that times 2 x layers x key-value heads x head size x bytes of the dtype.
        compact: take ended rows out of the batch.
        look_every: on a GPU, steps between looks at which rows have ended.

    Raises:
        TypeError: a token id is not an int.
        ValueError: the model is of a kind this loop cannot run (`GenerateSampler` can), token ids
            are outside its vocabulary, or a limit is below 1.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        compact: bool = True,
        look_every: int = 16,
    ) -> None:
        why_not = unsupported(model)
        if why_not is not None:
            raise ValueError(
                f"{_NAME}: cannot run this {type(model).__name__}, {why_not}; use GenerateSampler, "
                "or make_sampler(kind='auto')"
            )
        if look_every < 1:
            raise ValueError(f"{_NAME}: look_every is {look_every}; expected at least 1")
        check_limits(_NAME, batch_size, max_batch_tokens)
        self.model = unwrapped(_NAME, model)
        self.eos_token_ids = check_special_tokens(_NAME, self.model, eos_token_ids, pad_token_id)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.compact = compact
        self.look_every = look_every
        self._decoding: _Decoding | None = None

    def load_policy(self, model: nn.Module) -> None:
        """Nothing to do: the sampler holds the policy itself."""

    def release(self) -> None:
        """Give back the memory and recordings that a GPU's next rollout would use again."""
        self._decoding = None

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
    ) -> Responses:
        """Sample a response to each prompt.

        Args:
            prompts: B lists of token ids, unpadded, none empty.
            max_new_tokens: T, at which a response without an EOS token is cut off.
            temperature: divides the logits.
            seeds: B ints in [0, 2**64), of which a row's draws are made.

        Raises:
            TypeError: texts instead of token ids, or something that is no int.
            ValueError: see `check_request`; or the model's logits are not numbers.
        """
        check_request(_NAME, self.model, prompts, max_new_tokens, temperature, seeds)
        lengths = [len(prompt) for prompt in prompts]
        parts = batches(_NAME, lengths, max_new_tokens, self.batch_size, self.max_batch_tokens)

        def sample_batch(prompts: list[list[int]], uniform: Tensor) -> Drawn:
            return self._sample(prompts, uniform, temperature)

        uniform = uniforms(seeds, max_new_tokens)
        with sampling_mode(self.model):
            return sampled(_NAME, sample_batch, parts, prompts, uniform, self.pad_token_id)

    def _sample(self, prompts: list[list[int]], uniform: Tensor, temperature: float) -> Drawn:
        tokens, mask = left_padded(prompts, self.pad_token_id, device_of(self.model))
        decoding = self._decoding_for(tokens, uniform.shape[1])
        decoding.begin(tokens, mask, uniform, temperature)
        steps, reads = uniform.shape[1], may_read(tokens.device)
        order = list(range(len(prompts)))
        for step in range(1, steps):
            if reads or step % self.look_every == 0:
                ended = decoding.ended[: decoding.cursor.rows].tolist()
                if all(ended):
                    break
                if self.compact and any(ended):
                    decoding.drop(ended, order, to_halves=not reads)
            decoding.step()
        place = [0] * len(order)
        for position, row in enumerate(order):
            place[row] = position
        return decoding.results(torch.tensor(place, device=tokens.device), steps)

    def _decoding_for(self, tokens: Tensor, steps: int) -> _Decoding:
        rows, prompt_length = tokens.shape
        slots = prompt_length + steps - 1  # the last token is never read
        device = device_of(self.model)
        fixed = not may_read(device) and _attention_of(self.model) in FIXED_ATTENTION
        if not fixed:
            return _Decoding(self.model, self.eos_token_ids, rows, slots, steps, device, False)
        slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
        identity = _identity(self.model)
        last = self._decoding
        if last is None or not last.fits(rows, slots, steps, identity):
            self._decoding = last = None  # its memory first
            last = _Decoding(self.model, self.eos_token_ids, rows, slots, steps, device, True)
            last.identity = identity
            self._decoding = last
        return last


def _attention_of(model: Any) -> str:
    return str(getattr(model.config.get_text_config(decoder=True), "_attn_implementation", ""))


def _identity(model: nn.Module) -> tuple[Any, ...]:
    """What a recorded step has frozen: where the weights lie, which adapters are on, autocast."""
    device = device_of(model).type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    layers: Iterator[Any] = model.modules()
    adapters = [
        (module.disable_adapters, *module.active_adapters, module.merged)
        for module in layers
        if hasattr(module, "_disable_adapters")  # peft's layers; transformers' models have methods
    ]
    return (autocast, *(p.data_ptr() for p in model.parameters()), *adapters)


class _Decoding:
    """The memory of a batch while it is sampled, and the step that works on it.

    A step reads and writes at fixed addresses. `step` and `slot` are tensors, so that a recorded
    one can be replayed; only a growing cache has the host count along.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Sequence[int],
        rows: int,
        slots: int,
        steps: int,
        device: torch.device,
        fixed: bool,
    ) -> None:
        from ppo_fast.llm.kv_cache import Cursor, make_cache

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.model = model
        self.device = device
        self.fixed = fixed
        self.identity: tuple[Any, ...] = ()
        self.cursor = Cursor(rows, slots, zeros(1) if fixed else None)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = make_cache(layers, self.cursor)
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.inputs = zeros(rows, 1)
        self.positions = zeros(rows, 1)
        self.mask = zeros(rows, slots, dtype=torch.bool)
        self.uniform = zeros(rows, steps, 2, dtype=torch.float64)
        self.tokens = zeros(rows, steps)
        self.log_probs = zeros(rows, steps, dtype=torch.float32)
        self.lengths = zeros(rows)
        self.ended = zeros(rows, dtype=torch.bool)
        self.done = zeros(1)
        # A tensor where a recorded step is to follow it.
        self.temperature: float | Tensor = 1.0
        if fixed:
            self.temperature = torch.ones((), dtype=torch.float64, device=device)
        self._phases: dict[int, Phase[None]] = {}

    def fits(self, rows: int, slots: int, steps: int, identity: tuple[Any, ...]) -> bool:
        """Whether a batch can be sampled in this memory, and not much of it be read in vain."""
        enough = rows <= self.cursor.max_rows and steps <= self.tokens.shape[1]
        return enough and slots <= self.cursor.slots < 2 * slots and identity == self.identity

    def begin(self, tokens: Tensor, mask: Tensor, uniform: Tensor, temperature: float) -> None:
        """Read the prompts, tokens and mask [B, P], and draw the first token of each response."""
        rows, length = tokens.shape
        cursor = self.cursor
        cursor.rows, cursor.slot, cursor.filling = rows, 0, True
        # What lies behind the prompt is hidden by causality until it is written.
        self.mask.fill_(True)
        self.mask[:rows, :length] = mask
        self.uniform[:rows, : uniform.shape[1]] = uniform.to(self.device)
        self.lengths.zero_()
        self.ended.zero_()
        self.done.zero_()
        if isinstance(self.temperature, Tensor):
            self.temperature.fill_(temperature)
        else:
            self.temperature = temperature
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        self.positions[:rows] = positions[:, -1:]
        logits = self._logits(tokens, mask, positions)
        if not all(layer.is_initialized for layer in self.cache.layers):
            raise RuntimeError(
                f"{_NAME}: {type(self.model).__name__} did not keep its keys and values in the cache "
                "it was given; use GenerateSampler"
            )
        self._draw(logits)
        cursor.slot, cursor.filling = length, False
        if cursor.index is not None:
            cursor.index.fill_(length)

    def step(self) -> None:
        """Read the token drawn last and draw the next, in all rows in use."""
        if self.fixed:
            rows = self.cursor.rows
            if rows not in self._phases:
                name = f"sampling a token in {rows} rows"
                self._phases[rows] = Phase(name, self._step, self.device)
            self._phases[rows]()
        else:
            self._step()
        self.cursor.slot += 1

    def _step(self) -> None:
        cursor = self.cursor
        rows = cursor.rows
        mask = self.mask[:rows] if self.fixed else self.mask[:rows, : cursor.slot + 1]
        self._draw(self._logits(self.inputs[:rows], mask, self.positions[:rows]))
        if cursor.index is not None:
            cursor.index.add_(1)

    def _logits(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, V] of the tokens after the last column."""
        only = {"logits_to_keep": 1} if self.last_only else {}
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **only,
        )
        return output.logits[:, -1]

    def _draw(self, logits: Tensor) -> None:
        rows = self.cursor.rows
        uniform = self.uniform[:rows].index_select(1, self.done).squeeze(1)
        drawn = sample_from_logits(logits, temperature=self.temperature, uniform=uniform)
        token = drawn.actions.unsqueeze(1)
        self.tokens[:rows].index_copy_(1, self.done, token)
        self.log_probs[:rows].index_copy_(1, self.done, drawn.log_probs.float().unsqueeze(1))
        ended = self.ended[:rows]
        self.lengths[:rows] += ~ended
        ended |= (token == self.eos).any(1)
        self.inputs[:rows] = token
        self.positions[:rows] += 1
        self.done += 1

    def drop(self, ended: list[bool], order: list[int], to_halves: bool) -> None:
        """Have fewer rows: the last of those still going take the places of ended ones.

        A row moves at most once for a row that ends, and later steps are a row shorter.

        Args:
            ended: for the rows in use.
            order: which row of the batch lies where; changed along.
            to_halves: only ever halve the number of rows, so that few numbers occur.
        """
        alive = ended.count(False)
        rows = len(ended)
        if to_halves:
            while (rows + 1) // 2 >= alive and rows > 1:
                rows = (rows + 1) // 2
        else:
            rows = alive
        if rows == len(ended):
            return
        movers = [row for row in range(rows, len(ended)) if not ended[row]]
        places = [row for row in range(rows) if ended[row]][: len(movers)]
        if movers:
            for mover, place in zip(movers, places, strict=True):
                order[mover], order[place] = order[place], order[mover]
            source = torch.tensor(movers, device=self.device)
            target = torch.tensor(places, device=self.device)
            for layer in self.cache.layers:
                layer.move(source, target)
            for x in (self.mask, self.uniform, self.inputs, self.positions):
                x[target] = x[source]
            # Of an ended row these are still wanted.
            for x in (self.tokens, self.log_probs, self.lengths, self.ended):
                x[target], x[source] = x[source], x[target]
        self.cursor.rows = rows

    def results(self, place: Tensor, steps: int) -> Drawn:
        """Copies of what was drawn, row i from where `place` says it lies now."""
        wide = (self.tokens[:, :steps], self.log_probs[:, :steps], self.lengths, self.ended)
        return Drawn(*(x.index_select(0, place) for x in wide))
