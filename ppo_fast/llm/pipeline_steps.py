"""The steps of a pipeline before PPO: data, SFT, preferences, reward model; each writes its result."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.extras import require

if TYPE_CHECKING:
    from ppo_fast.llm.judge import Judge
    from ppo_fast.llm.pipeline import Pipeline
    from ppo_fast.llm.preferences import Preference

PROMPTS, HELD_OUT, STORIES = "prompts.jsonl", "held_out_prompts.jsonl", "stories.jsonl"
SFT, PREFERENCES, REWARD_MODEL = "sft", "preferences.jsonl", "reward_model"
TRAINING = "training.json"

# Streams of random numbers of a seed: PPO's own begin at 0.
FIRST, SECOND, NORMALISING = 1 << 36, 2 << 36, 3 << 36

# Attention heads of the stories' model.
HEADS = 4


def device_of(settings: Pipeline) -> str:
    """Where models go: the stories' are too small for a GPU to pay."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.model is not None and torch.cuda.is_available() else "cpu"


def first_policy(settings: Pipeline, out: Path) -> str:
    """Folder or hub name of the model that PPO starts from."""
    made = settings.model is None or settings.sft_data is not None
    return str(out / SFT) if made else str(settings.model)


def check_inputs(settings: Pipeline) -> None:
    """Read the given files, and load the judge, before anything is trained."""
    if settings.model is None:
        return
    from ppo_fast.llm.commands import load_tokenizer, read_texts
    from ppo_fast.llm.preferences import read_preferences, tokenize_preferences
    from ppo_fast.llm.prompts import check_tokenizer, tokenize_prompts

    transformers = require("transformers", "llm", "ppo-fast rlhf run")
    tokenizer = load_tokenizer(settings.model)
    check_tokenizer(tokenizer)
    config = transformers.AutoConfig.from_pretrained(settings.model)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    length: Any = settings.response_length
    if context is not None and length >= context:
        raise ValueError(
            f"Pipeline: response_length is {length}; expected less than the model's context of "
            f"{context} tokens"
        )
    room = None if context is None else context - length
    tokenize_prompts(_prompt_rows(settings.prompts), tokenizer, max_length=room)
    if settings.preferences is not None:
        pairs = read_preferences(settings.preferences)
        tokenize_preferences(pairs, tokenizer, max_length=context)
    if settings.sft_data is not None:
        read_texts(Path(settings.sft_data), tokenizer)
    if settings.judge is not None:
        _judge(settings)


def write_data(settings: Pipeline, out: Path) -> None:
    """Prompts to train on, prompts held out, and the corpus of stories."""
    if settings.model is None:
        from ppo_fast.llm.stories import generate_prompts, generate_stories

        # The same prompt may be drawn twice: held out are texts, not draws.
        drawn = generate_prompts(20 * settings.eval_prompts, 1_000_003 + settings.seed)
        held_out = [*dict.fromkeys(drawn)][: settings.eval_prompts]
        apart = set(held_out)
        stories = [
            s for s in generate_stories(settings.stories, settings.seed) if s.prompt not in apart
        ]
        if not stories:
            raise ValueError(
                f"Pipeline: {settings.stories} stories are too few beside {len(held_out)} held-out "
                "prompts; raise stories or lower eval_prompts"
            )
        pairs = [{"prompt": s.prompt, "completion": s.response} for s in stories]
        _write_lines(out / STORIES, pairs)
        rows: list[Any] = [{"prompt": story.prompt} for story in stories]
        held_rows: list[Any] = [{"prompt": prompt} for prompt in held_out]
    else:
        rows = _prompt_rows(settings.prompts)
        count = min(settings.eval_prompts, max(1, len(rows) // 10))
        chosen = set(random.Random(settings.seed).sample(range(len(rows)), count))
        held_rows = [row for k, row in enumerate(rows) if k in chosen]
        rows = [row for k, row in enumerate(rows) if k not in chosen]
    _write_lines(out / HELD_OUT, held_rows)
    # Last: its presence says that the step is done.
    _write_lines(out / PROMPTS, rows)


def _prompt_rows(path: Any) -> list[dict[str, Any]]:
    """Rows with a key "prompt" of a file of JSON lines."""
    from ppo_fast.llm.prompts import read_json_lines

    rows = []
    for number, row in read_json_lines("Pipeline", path):
        if not isinstance(row, dict):
            row = {"prompt": row}
        if not isinstance(row.get("prompt"), str | list):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": ...}}, a string or a list of messages'
            )
        rows.append(row)
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} prompts; expected at least 2, one is held out")
    return rows


def _write_lines(path: Path, rows: list[Any]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def train_sft_model(settings: Pipeline, out: Path) -> dict[str, float]:
    """Fine-tune the model, or train the stories' from random weights."""
    from ppo_fast.llm.commands import load_causal_lm, read_texts
    from ppo_fast.llm.sft import train_sft

    if settings.model is None:
        model, tokenizer = _story_model(settings)
        data = out / STORIES
    else:
        model, tokenizer = load_causal_lm(settings.model)
        data = Path(str(settings.sft_data))
    sequences, prompt_lengths = read_texts(data, tokenizer)
    with _bar(settings, "sft") as callback:
        metrics = train_sft(
            model.to(device_of(settings)),
            sequences,
            prompt_lengths,
            steps=settings.sft_steps,
            batch_size=settings.sft_batch_size,  # type: ignore[arg-type]
            learning_rate=settings.sft_learning_rate,  # type: ignore[arg-type]
            weight_decay=0.01,
            seed=settings.seed,
            log_every=10,
            callback=callback,
        )
    with whole(out / SFT) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_training(folder, metrics)
    return metrics


def _story_model(settings: Pipeline) -> tuple[Any, Any]:
    """A small Llama with random weights, and the stories' tokenizer."""
    transformers = require("transformers", "llm", "ppo-fast rlhf run")
    from ppo_fast.llm.stories import make_tokenizer

    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden_size,
                intermediate_size=3 * settings.hidden_size,
                num_hidden_layers=settings.layers,
                num_attention_heads=HEADS,
                # Openings have 13 tokens at most.
                max_position_embeddings=32 + max(64, settings.response_length or 0),
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return model, tokenizer


def write_preferences_file(settings: Pipeline, out: Path) -> dict[str, float]:
    """Preferences between two samples to a prompt each, or those given."""
    from ppo_fast.llm.commands import load_causal_lm
    from ppo_fast.llm.preferences import collect_preferences, read_preferences, write_preferences
    from ppo_fast.llm.prompts import tokenize_prompts

    if settings.preferences is not None:
        given = read_preferences(settings.preferences)
        write_preferences(out / PREFERENCES, given)
        return {"pairs": len(given)}
    judge = _judge(settings)
    policy, tokenizer = load_causal_lm(first_policy(settings, out))
    policy.to(device_of(settings))
    data = tokenize_prompts(out / PROMPTS, tokenizer)
    chosen = [k % len(data) for k in range(settings.pairs or len(data))]
    some = data.take(chosen)

    def sample(_: list[str]) -> list[tuple[str, str]]:
        answers = [
            tokenizer.batch_decode(
                sample_ids(settings, policy, tokenizer, some.ids, stream)[0],
                skip_special_tokens=True,
            )
            for stream in (FIRST, SECOND)
        ]
        return list(zip(*answers, strict=True))

    found = collect_preferences(
        some.texts, sample, judge, seed=settings.seed, hard_labels=settings.model is not None
    )
    rows = _prompt_rows(out / PROMPTS)
    asked = {data.texts[k]: rows[k]["prompt"] for k in set(chosen)}
    preferences = [_in_form_of(asked[str(p.prompt)], p) for p in found.preferences]
    write_preferences(out / PREFERENCES, preferences)
    return {"pairs": len(preferences), "equal": found.equal, "empty": found.empty}


def _in_form_of(prompt: Any, preference: Preference) -> Preference:
    """The preference with its prompt as it was given, and answers that fit."""
    if isinstance(prompt, str):
        return preference
    chosen, rejected = (
        [{"role": "assistant", "content": str(text)}]
        for text in (preference.chosen, preference.rejected)
    )
    return dataclasses.replace(preference, prompt=prompt, chosen=chosen, rejected=rejected)


def _judge(settings: Pipeline) -> Judge:
    from ppo_fast.llm.judge import CausalLMJudge, FunctionJudge

    if settings.judge is not None:
        from ppo_fast.llm.commands import load_causal_lm

        model, tokenizer = load_causal_lm(settings.judge)
        return CausalLMJudge(model.to(device_of(settings)), tokenizer, settings.principle)
    from ppo_fast.llm.stories import EOS, gold_reward

    # Samples lose their EOS when they are decoded, and get one where they are learnt from.
    return FunctionJudge(lambda prompt, answer: gold_reward(prompt, f"{answer} {EOS}"))


def sample_ids(
    settings: Pipeline, model: Any, tokenizer: Any, prompts: list[list[int]], stream: int
) -> tuple[list[list[int]], list[bool]]:
    """A response to each prompt as token ids, EOS included, and whether it ended."""
    from ppo_fast.llm.sampler import sample_answers

    return sample_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.response_length,  # type: ignore[arg-type]
        temperature=settings.temperature,
        seed=settings.seed,
        first=stream,
        batch_size=256,
    )


def train_scorer(settings: Pipeline, out: Path) -> dict[str, float]:
    """Train the reward model on the preferences; scores of the first policy get mean 0 and std 1."""
    from ppo_fast.llm.commands import load_causal_lm
    from ppo_fast.llm.preferences import (
        read_preferences,
        split_preferences,
        tokenize_preferences,
    )
    from ppo_fast.llm.prompts import tokenize_prompts
    from ppo_fast.llm.reward_model import RewardModel, evaluate_reward_model, train_reward_model

    policy, tokenizer = load_causal_lm(first_policy(settings, out))
    policy.to(device_of(settings))
    train, held_out = split_preferences(read_preferences(out / PREFERENCES), seed=settings.seed)
    scorer = RewardModel.from_causal_lm(policy, settings.seed)
    with _bar(settings, "reward model") as callback:
        metrics = train_reward_model(
            scorer,
            tokenize_preferences(train, tokenizer),
            epochs=settings.reward_epochs,  # type: ignore[arg-type]
            batch_size=settings.reward_batch_size,  # type: ignore[arg-type]
            learning_rate=settings.reward_learning_rate,  # type: ignore[arg-type]
            center_rewards_coefficient=0.01,
            held_out=tokenize_preferences(held_out, tokenizer),
            seed=settings.seed,
            log_every=10,
            callback=callback,
        )
    if settings.model is None:
        sure = _without_noise(held_out)
        found = evaluate_reward_model(scorer, tokenize_preferences(sure, tokenizer))
        metrics["eval_gold_accuracy"] = found["eval_accuracy"]
    data = tokenize_prompts(out / PROMPTS, tokenizer)
    asked = data.take(range(min(1000, len(data)))).ids
    answers, _ = sample_ids(settings, policy, tokenizer, asked, NORMALISING)
    scorer.normalise([prompt + answer for prompt, answer in zip(asked, answers, strict=True)])
    with whole(out / REWARD_MODEL) as folder:
        scorer.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_training(folder, metrics)
    return metrics


def _without_noise(preferences: list[Preference]) -> list[Preference]:
    """As gold would have it: p is its probability, and drawn labels were right where p > 0.5."""
    return [
        p
        if p.p is not None and p.p > 0.5
        else dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen)
        for p in preferences
        if p.p != 0.5
    ]


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, that takes its name once the block is done."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def write_training(folder: Path, metrics: dict[str, float]) -> None:
    """Metrics of a training, beside its model."""
    atomic_write_text(folder / TRAINING, json.dumps(metrics, indent=2) + "\n")


@contextmanager
def _bar(settings: Pipeline, name: str) -> Iterator[Callable[[int, dict[str, float]], None] | None]:
    """A callback of SFT and the reward model that shows their progress."""
    if not settings.progress_bar:
        yield None
        return
    tqdm = require("tqdm.auto", "train", "progress_bar=True").tqdm
    with tqdm(desc=name, unit=" steps", disable=None, leave=False) as bar:

        def show(step: int, metrics: dict[str, float]) -> None:
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update(step - bar.n)

        yield show
