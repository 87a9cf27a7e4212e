"""Supervised fine-tuning of a causal LM, and the training loop the reward model shares with it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.llm.forward import (
    choose_layout,
    disable_dropout,
    hidden_states,
    logits_of,
    trunk_of,
    unwrapped,
)
from ppo_fast.llm.packing import micro_batches, pack

SCHEDULES = ("cosine", "linear", "constant")

Callback = Callable[[int, dict[str, float]], None]


def train_sft(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 32,
    token_budget: int = 16_384,
    learning_rate: float = 2e-5,
    warmup: float = 0.05,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    eval_fraction: float = 0.05,
    require_eos: bool = True,
    layout: str = "auto",
    seed: int = 0,
    log_every: int = 50,
    callback: Callback | None = None,
) -> dict[str, float]:
    """Train a causal LM on sequences by the mean negative log-likelihood of their tokens.

    The mean of a step is over all target tokens of its batch, however it is cut into
    micro-batches. Sequences are packed, so padding costs nothing and enters nothing. Dropout is
    switched off, as it is in every later stage.

    Args:
        model: a transformers causal LM, or a peft model of one; trained in place, on its device.
        sequences: token ids, at least two each, EOS included where the text has ended.
        prompt_lengths: tokens at the start of each sequence that are no targets. None is 0; as
            nothing predicts the first token, 0 and 1 are the same.
        epochs: passes over the training sequences; not read where `steps` is given.
        steps: optimizer steps.
        batch_size: sequences an optimizer step.
        token_budget: tokens a forward, see `micro_batches`; bounds the memory.
        learning_rate: peak of AdamW's.
        warmup: share of the steps over which the learning rate rises to it.
        schedule: how it goes down to 0 after that: "cosine", "linear", or "constant" for not.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this L2 norm.
        eval_fraction: share of the sequences held out; 0 for none.
        require_eos: refuse sequences of which none ends by the EOS token of the model's config.
        layout: "auto", "packed" or "padded", see `choose_layout`.
        seed: of the held-out choice and of the order.
        log_every: steps between calls of `callback`.
        callback: given the step and `loss`, `learning_rate`, `grad_norm`, means since the last call.

    Returns:
        `loss` (mean over the last tenth of the steps), `steps`, `target_tokens` trained on,
        `seconds`, and where sequences were held out `eval_loss` (nats a token),
        `eval_perplexity`, `eval_token_accuracy`.

    Raises:
        ValueError: sequences and settings that are not as above, token ids outside the model's
            vocabulary, a sequence longer than the model's context, no EOS.
        FloatingPointError: a loss or gradient is not finite; the model is as before that step.
    """
    name = "train_sft"
    check_sequences(name, "sequences", sequences, unwrapped(model))
    prompt_lengths = _checked_prompt_lengths(name, sequences, prompt_lengths)
    if require_eos:
        _check_eos(sequences, unwrapped(model))
    train, held_out = split(name, len(sequences), eval_fraction, seed)
    disable_dropout(model)
    layout = choose_layout(model, layout)
    targets = [len(s) - p for s, p in zip(sequences, prompt_lengths, strict=True)]

    def loss_of(batch: list[int], denominator: int) -> Tensor:
        chosen = [sequences[index] for index in batch]
        log_probs, _ = _log_probs(model, layout, chosen, [prompt_lengths[i] for i in batch])
        return -log_probs.sum() / denominator

    metrics = minimise(
        name,
        model,
        loss_of,
        indices=train,
        lengths=[len(sequence) for sequence in sequences],
        weights=targets,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        token_budget=token_budget,
        learning_rate=learning_rate,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        log_every=log_every,
        callback=callback,
    )
    metrics["target_tokens"] = metrics.pop("weight")
    if held_out:
        metrics |= evaluate_sft(
            model,
            [sequences[index] for index in held_out],
            [prompt_lengths[index] for index in held_out],
            token_budget=token_budget,
            layout=layout,
        )
    return metrics


@torch.no_grad()
def evaluate_sft(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
    *,
    token_budget: int = 16_384,
    layout: str = "auto",
) -> dict[str, float]:
    """How well a model predicts the tokens of sequences; arguments and errors as in `train_sft`.

    Returns:
        `eval_loss` in nats a token, `eval_perplexity` = exp(eval_loss), and `eval_token_accuracy`,
        the share of tokens that were the likeliest one.
    """
    name = "evaluate_sft"
    check_sequences(name, "sequences", sequences, unwrapped(model))
    prompt_lengths = _checked_prompt_lengths(name, sequences, prompt_lengths)
    disable_dropout(model)
    layout = choose_layout(model, layout)
    totals = torch.zeros(2, dtype=torch.float64)
    for group in micro_batches([len(sequence) for sequence in sequences], token_budget):
        chosen = [sequences[index] for index in group]
        log_probs, hits = _log_probs(model, layout, chosen, [prompt_lengths[i] for i in group])
        totals += torch.stack((-log_probs.double().sum(), hits.double().sum())).cpu()
    count = sum(map(len, sequences)) - sum(prompt_lengths)
    loss, accuracy = (totals / count).tolist()
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval_token_accuracy": accuracy,
    }


def minimise(
    name: str,
    model: nn.Module,
    loss_of: Callable[[list[int], int], Tensor],
    *,
    indices: Sequence[int],
    lengths: Sequence[int],
    weights: Sequence[int],
    epochs: float,
    steps: int | None,
    batch_size: int,
    token_budget: int,
    learning_rate: float,
    warmup: float,
    schedule: str,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    log_every: int,
    callback: Callback | None,
) -> dict[str, float]:
    """Minibatch AdamW on a loss that is a weighted mean over examples.

    Args:
        name: of the caller, for errors.
        model: whose parameters that require a gradient are trained.
        loss_of: examples of a micro-batch, and the weight of the whole batch, to the sum of their
            losses over that weight.
        indices: examples to train on.
        lengths: tokens of every example there is, for `token_budget`.
        weights: what every example there is counts in the mean.
        epochs, steps, batch_size, token_budget, learning_rate, warmup, schedule, weight_decay,
            max_grad_norm, seed, log_every, callback: see `train_sft`.

    Returns:
        `loss`, `steps`, `seconds`, and `weight`, the total trained on.

    Raises:
        ValueError, FloatingPointError: see `train_sft`.
    """
    _check_settings(name, locals())
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{name}: no parameter of the model requires a gradient; nothing to train")
    per_epoch = math.ceil(len(indices) / batch_size)
    total = steps if steps is not None else math.ceil(epochs * per_epoch)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    batches = _batches(indices, batch_size, seed)
    training = model.training
    model.train()
    start, weight = time.perf_counter(), 0
    losses: list[float] = []
    norms: list[float] = []
    try:
        for step in range(total):
            batch = next(batches)
            denominator = sum(weights[index] for index in batch)
            parts = []
            for group in micro_batches([lengths[index] for index in batch], token_budget):
                loss = loss_of([batch[place] for place in group], denominator)
                loss.backward()
                parts.append(loss.detach())
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            value, norm_value = torch.stack((torch.stack(parts).sum(), norm)).tolist()
            if not (math.isfinite(value) and math.isfinite(norm_value)):
                raise FloatingPointError(
                    f"{name}: step {step + 1} of {total} has loss {value} and gradient norm "
                    f"{norm_value}; expected finite numbers. The model is as before this step; "
                    "check it for NaN, or lower the learning rate"
                )
            rate = learning_rate * rate_at(step, total, warmup, schedule)
            for group_of_parameters in optimizer.param_groups:
                group_of_parameters["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value)
            norms.append(norm_value)
            weight += denominator
            if callback is not None and ((step + 1) % log_every == 0 or step + 1 == total):
                since = step % log_every + 1
                callback(
                    step + 1,
                    {
                        "loss": _mean(losses[-since:]),
                        "learning_rate": rate,
                        "grad_norm": _mean(norms[-since:]),
                    },
                )
    finally:
        optimizer.zero_grad()
        model.train(training)
    return {
        "loss": _mean(losses[-math.ceil(total / 10) :]),
        "steps": total,
        "weight": weight,
        "seconds": time.perf_counter() - start,
    }


def rate_at(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The learning rate of a step, 0-based, as a share of its peak."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 if schedule == "constant" else 1.0 - done


def split(name: str, count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out.

    Raises:
        ValueError: the fraction is not in [0, 1), or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"{name}: the held-out share is {fraction}; expected 0 <= share < 1")
    held_out = math.ceil(count * fraction)
    if held_out >= count:
        raise ValueError(
            f"{name}: a held-out share of {fraction} leaves none of {count} examples to train on; "
            "give more, or hold out less"
        )
    order = list(range(count))
    random.Random(f"split {seed}").shuffle(order)
    return sorted(order[held_out:]), sorted(order[:held_out])


def check_sequences(
    name: str, argument: str, sequences: Sequence[Sequence[int]], model: Any
) -> None:
    """Refuse token sequences that a transformers model cannot take.

    Raises:
        ValueError: there is none, one is empty, an id is outside the vocabulary, one is longer than
            the context.
    """
    if not len(sequences):
        raise ValueError(f"{name}: {argument} is empty; expected at least one sequence")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    context = getattr(model.config, "max_position_embeddings", None)
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"{name}: {argument}[{index}] is empty; expected at least one token")
        low, high = min(sequence), max(sequence)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{name}: {argument}[{index}] holds the token id {low if low < 0 else high}; expected "
                f"0 to {vocabulary - 1}, the model's vocabulary. It was encoded with another tokenizer"
            )
        if context is not None and len(sequence) > context:
            raise ValueError(
                f"{name}: {argument}[{index}] has {len(sequence)} tokens; expected at most {context}, "
                "the model's context. Cut it, or leave it out"
            )


def _log_probs(
    model: nn.Module,
    layout: str,
    sequences: list[Sequence[int]],
    prompt_lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """[M] of all target tokens: float32 log-probs, and whether the target was the likeliest."""
    packed = pack(
        [s[:p] for s, p in zip(sequences, prompt_lengths, strict=True)],
        [s[p:] for s, p in zip(sequences, prompt_lengths, strict=True)],
        next(model.parameters()).device,
    )
    logits = logits_of(model, hidden_states(trunk_of(model), packed, layout))
    log_probs = log_probs_from_logits(logits, packed.targets)
    return log_probs, logits.detach().argmax(-1) == packed.targets


def _batches(indices: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled passes; the last batch of a pass may be smaller."""
    rng = random.Random(f"order {seed}")
    while True:
        order = list(indices)
        rng.shuffle(order)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def _checked_prompt_lengths(
    name: str, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None
) -> list[int]:
    """At least 1 each: the first token is predicted by nothing."""
    if prompt_lengths is None:
        prompt_lengths = [0] * len(sequences)
    if len(prompt_lengths) != len(sequences):
        raise ValueError(
            f"{name}: {len(prompt_lengths)} prompt_lengths for {len(sequences)} sequences; expected "
            "one each"
        )
    lengths = [max(1, length) for length in prompt_lengths]
    for index, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if prompt_lengths[index] < 0 or length >= len(sequence):
            raise ValueError(
                f"{name}: sequence {index} has {len(sequence)} tokens and prompt length "
                f"{prompt_lengths[index]}; expected at least one token after the prompt, and one "
                "before it. Leave the sequence out"
            )
    return lengths


def _check_eos(sequences: Sequence[Sequence[int]], model: Any) -> None:
    eos = model.config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    if ends and not any(sequence[-1] in ends for sequence in sequences):
        raise ValueError(
            f"train_sft: no sequence ends by the model's EOS token ({eos}); expected it where a text "
            "has ended, or the model never learns to stop. Append it, set model.config.eos_token_id "
            "to the tokenizer's, or pass require_eos=False"
        )


def _check_settings(name: str, given: dict[str, Any]) -> None:
    for setting in ("batch_size", "token_budget", "log_every", "steps"):
        value = given[setting]
        if value is not None and value < 1:
            raise ValueError(f"{name}: {setting} is {value}; expected at least 1")
    for setting in ("epochs", "learning_rate", "max_grad_norm"):
        if not given[setting] > 0:
            raise ValueError(f"{name}: {setting} is {given[setting]}; expected a number > 0")
    if not 0 <= given["warmup"] <= 1:
        raise ValueError(
            f"{name}: warmup is {given['warmup']}; expected a share of the steps, 0 to 1"
        )
    if given["schedule"] not in SCHEDULES:
        raise ValueError(
            f"{name}: schedule is {given['schedule']!r}; expected one of {', '.join(SCHEDULES)}"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
