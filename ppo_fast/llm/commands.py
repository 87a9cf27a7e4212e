"""`ppo-fast rlhf`: the whole pipeline in one command, and each of its steps as one of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ppo_fast.extras import require
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from ppo_fast.llm.ppo_trainer import PPOTrainer

USAGE = """ppo-fast rlhf: PPO for language models

  ppo-fast rlhf run [--flags]           everything below in turn, on generated stories; or with
                                        --model PATH --prompts FILE on a model of yours
  ppo-fast rlhf sft --model PATH --data FILE --out DIR
  ppo-fast rlhf judge --model PATH --prompts FILE --judge PATH --out FILE    pairs of answers, compared by
                                        a language model, or by a person with --human
  ppo-fast rlhf reward-model --model PATH --preferences FILE --out DIR
  ppo-fast rlhf ppo --model PATH --prompts FILE --reward-model PATH [--flags]
  ppo-fast rlhf ppo --resume RUN
  ppo-fast rlhf generate --model PATH --prompts FILE

Each lists its flags with --help. Files are JSON lines: {"prompt": ...}, {"prompt", "completion"} or
{"text"}, {"prompt", "chosen", "rejected"}.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOFlags(RLHFConfig):
    """PPO on a causal LM. Flags that are not listed first are fields of RLHFConfig."""

    model: str
    """folder or hub name of the policy"""
    prompts: str
    """JSON lines with a prompt each"""
    reward_model: str
    """folder of a reward model: one of `ppo-fast rlhf reward-model`, or a sequence classifier"""
    ref_model: str | None = None
    """the KL's reference; None means the policy as it begins"""
    value_model: Literal["policy", "reward-model", "shared"] = "reward-model"
    """the critic begins as a copy of this, or shares the policy's trunk"""
    eval_prompts: str | None = None
    """JSON lines; every `eval_every` updates they are answered and scored"""
    lora_rank: int | None = None
    """train adapters of this rank on all linear layers instead of the weights"""
    norm_adv: Literal["minibatch", "batch", "none"] = "batch"
    """whiten advantages over each minibatch, over all tokens of the rollout, or not at all"""
    stop_token_ids: tuple[int, ...] | None = None
    """ids that end a response; None means the tokenizer's eos"""
    run_dir: str | None = None
    """folder to write the run to; None makes runs/rlhf/TIME"""
    progress_bar: bool = True
    """show a progress bar"""


def rlhf(arguments: list[str]) -> None:
    """Run a subcommand; see `USAGE`."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run,
        "sft": lambda rest: _call(sft, rest, "sft"),
        "judge": lambda rest: _call(judge, rest, "judge"),
        "reward-model": lambda rest: _call(reward_model, rest, "reward-model"),
        "ppo": _ppo,
        "generate": lambda rest: _call(generate, rest, "generate"),
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if arguments[0] not in commands:
        print(f"ppo-fast rlhf: unknown command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    commands[arguments[0]](arguments[1:])


def _call(function: Callable[..., None], arguments: list[str], name: str) -> None:
    tyro = require("tyro", "train", "the ppo-fast command")
    tyro.cli(function, args=arguments, prog=f"ppo-fast rlhf {name}")


def _run(arguments: list[str]) -> None:
    from ppo_fast.llm.pipeline import Pipeline, run_pipeline

    tyro = require("tyro", "train", "the ppo-fast command")
    run_pipeline(tyro.cli(Pipeline, args=arguments, prog="ppo-fast rlhf run"))


def sft(
    model: str,
    data: Path,
    out: Path,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    seed: int = 1,
) -> None:
    """Fine-tune a causal LM on texts, or on completions of prompts.

    Args:
        model: folder or hub name
        data: JSON lines, {"prompt", "completion"} or {"text"}
        out: folder for the model
        epochs: passes over the data
        batch_size: texts per step
        learning_rate: highest, after warm-up
        seed: of order and held-out texts
    """
    from ppo_fast.llm.sft import train_sft

    policy, tokenizer = load_causal_lm(model)
    sequences, prompt_lengths = read_texts(data, tokenizer)
    metrics = train_sft(
        policy,
        sequences,
        prompt_lengths,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _print_metrics(metrics)
    print(out)


def judge(
    model: str,
    prompts: Path,
    out: Path,
    judge: str | None = None,
    human: bool = False,
    principle: str = "Choose the answer that is more helpful, honest and harmless.",
    response_length: int = 53,
    temperature: float = 1.0,
    seed: int = 1,
) -> None:
    """Sample two answers to each prompt and have the better one chosen; writes preferences.

    Args:
        model: folder or hub name of the model that answers
        prompts: JSON lines with a prompt each
        out: JSON lines of preferences
        judge: folder or hub name of the model that judges (RLAIF)
        human: ask a person at this terminal instead; answers are kept one by one
        principle: what the judge goes by
        response_length: most tokens of an answer
        temperature: of the answers
        seed: of the answers
    """
    from ppo_fast.llm.judge import CausalLMJudge
    from ppo_fast.llm.preferences import collect_preferences, label_pairs, write_preferences
    from ppo_fast.llm.prompts import tokenize_prompts

    if human == (judge is not None):
        raise ValueError("judge: give one of --judge PATH and --human")
    policy, tokenizer = load_causal_lm(model)
    data = tokenize_prompts(prompts, tokenizer)

    def sample(_: list[str]) -> list[tuple[str, str]]:
        first, second = (
            sample_texts(policy, tokenizer, data.ids, response_length, temperature, seed + k)
            for k in (0, 1)
        )
        return list(zip(first, second, strict=True))

    if human:
        answers = sample(data.texts)
        pairs = [(p, a, b) for p, (a, b) in zip(data.texts, answers, strict=True) if a != b]
        print(f"{label_pairs(pairs, out)} preferences in {out}")
        return
    assert judge is not None
    judging, its_tokenizer = load_causal_lm(judge)
    found = collect_preferences(
        data.texts, sample, CausalLMJudge(judging, its_tokenizer, principle), seed=seed
    )
    write_preferences(out, found.preferences)
    print(
        f"{len(found.preferences)} preferences in {out}; dropped {found.equal} equal and "
        f"{found.empty} empty pairs"
    )


def reward_model(
    model: str,
    preferences: Path,
    out: Path,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 1e-5,
    center_rewards_coefficient: float = 0.01,
    seed: int = 1,
) -> None:
    """Train a reward model on preferences (Bradley-Terry).

    Args:
        model: folder or hub name of the causal LM whose trunk it begins with
        preferences: JSON lines, {"prompt", "chosen", "rejected"}
        out: folder for the reward model
        epochs: passes over the pairs
        batch_size: pairs per step
        learning_rate: highest, after warm-up
        center_rewards_coefficient: weight of the term that keeps the mean score at 0
        seed: of order and held-out pairs
    """
    from ppo_fast.llm.preferences import (
        read_preferences,
        split_preferences,
        tokenize_preferences,
    )
    from ppo_fast.llm.reward_model import RewardModel, train_reward_model

    policy, tokenizer = load_causal_lm(model)
    train, held_out = split_preferences(read_preferences(preferences), seed=seed)
    pairs = tokenize_preferences(train, tokenizer)
    scorer = RewardModel.from_causal_lm(policy, seed)
    metrics = train_reward_model(
        scorer,
        pairs,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        center_rewards_coefficient=center_rewards_coefficient,
        held_out=tokenize_preferences(held_out, tokenizer),
        seed=seed,
    )
    scorer.normalise([sequence for pair in pairs for sequence in pair[:2]])
    scorer.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _print_metrics(metrics)
    print(out)


def generate(
    model: str,
    prompts: Path,
    response_length: int = 53,
    temperature: float = 1.0,
    seed: int = 1,
) -> None:
    """Answer prompts; one JSON line each on standard output.

    Args:
        model: folder or hub name
        prompts: JSON lines with a prompt each
        response_length: most tokens of an answer
        temperature: of sampling
        seed: of sampling
    """
    from ppo_fast.llm.prompts import tokenize_prompts

    policy, tokenizer = load_causal_lm(model)
    data = tokenize_prompts(prompts, tokenizer)
    texts = sample_texts(policy, tokenizer, data.ids, response_length, temperature, seed)
    for prompt, text in zip(data.texts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))


def _ppo(arguments: list[str]) -> None:
    tyro = require("tyro", "train", "the ppo-fast command")
    if arguments and arguments[0].partition("=")[0] == "--resume":
        _, given, run = arguments[0].partition("=")
        rest = ([run] if given else []) + arguments[1:]
        if len(rest) != 1:
            raise ValueError("ppo --resume takes one run folder and no other flag")
        flags = read_flags(Path(rest[0]))
        trainer = make_trainer(flags).load(rest[0])
        print(f"resuming {rest[0]} after {trainer.num_episodes} episodes")
    else:
        flags = tyro.cli(PPOFlags, args=arguments, prog="ppo-fast rlhf ppo")
        if flags.run_dir is None:
            folder = Path("runs") / "rlhf" / time.strftime("%Y%m%d-%H%M%S")
            flags = dataclasses.replace(flags, run_dir=str(folder))
        trainer = make_trainer(flags)
    trainer.learn()
    folder = Path(str(flags.run_dir))
    trainer.save_model(folder / "policy")
    _print_metrics(
        {k: v for k, v in trainer.metrics.items() if k.startswith(("objective", "eval"))}
    )
    print(f"run folder {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


def make_trainer(flags: PPOFlags) -> PPOTrainer:
    """The trainer that `ppo-fast rlhf ppo` runs, from its flags."""
    import torch

    from ppo_fast.llm.ppo_trainer import PPOTrainer

    settings = dataclasses.asdict(flags)
    if flags.device == "auto" and torch.cuda.is_available():
        settings["device"] = "cuda"
    fields = RLHFConfig.__dataclass_fields__
    sources = {name: value for name, value in settings.items() if name not in fields}
    policy, tokenizer = load_causal_lm(flags.model)
    scorer = load_reward_model(flags.reward_model)
    critic: Any = None
    if flags.value_model == "policy":
        critic = load_causal_lm(flags.model)[0]
    elif flags.value_model == "reward-model":
        critic = load_reward_model(flags.reward_model)
    adapters = None
    if flags.lora_rank is not None:
        peft = require("peft", "llm", "lora_rank")
        adapters = peft.LoraConfig(
            r=flags.lora_rank,
            lora_alpha=2 * flags.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    reference: Any = "copy" if flags.kl_coef > 0 and adapters is None else None
    if flags.ref_model is not None:
        reference = load_causal_lm(flags.ref_model)[0]
    trainer = PPOTrainer(
        RLHFConfig(**{name: settings[name] for name in fields}),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic,
        train_dataset=flags.prompts,
        eval_dataset=flags.eval_prompts,
        peft_config=adapters,
    )
    trainer.sources = sources
    return trainer


def read_flags(folder: Path) -> PPOFlags:
    """The flags a run folder was made with.

    Raises:
        ValueError: the folder is not of `ppo-fast rlhf ppo`.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {CONFIG_FILE}; expected a run folder")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not record.get("sources"):
        raise ValueError(f"{path} names no models; `ppo-fast rlhf ppo` did not make this run")
    fields = RLHFConfig.__dataclass_fields__
    settings = {name: value for name, value in record.items() if name in fields}
    return PPOFlags(**{**settings, **record["sources"], "run_dir": str(folder)})


def load_causal_lm(path: str | Path) -> tuple[Any, Any]:
    """A causal LM in float32 and its tokenizer, from a folder or the hub; runs no code of theirs.

    Raises:
        ValueError: there is none.
    """
    transformers = require("transformers", "llm", "ppo-fast rlhf")
    import torch

    tokenizer = load_tokenizer(path)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no causal language model: {error}") from error
    return model, tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model, from a folder or the hub.

    Raises:
        ValueError: there is none.
    """
    transformers = require("transformers", "llm", "ppo-fast rlhf")
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no model with a tokenizer: {error}") from error


def load_reward_model(path: str | Path) -> Any:
    """A reward model of ours, or a sequence classifier as one, from a folder."""
    from ppo_fast.llm.reward_model import RewardModel

    return RewardModel.from_pretrained(path)


def sample_texts(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    response_length: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """An answer to each prompt."""
    from ppo_fast.llm.sampler import sample_answers

    ids, _ = sample_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=response_length,
        temperature=temperature,
        seed=seed,
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def read_texts(path: Path, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """Token ids of the texts of a file, EOS last, and how many of each belong to its prompt.

    Raises:
        ValueError: no such file, a line that is not JSON, or rows of another form.
    """
    from ppo_fast.llm.prompts import check_tokenizer, read_json_lines

    eos = check_tokenizer(tokenizer)[1]
    sequences, prompt_lengths = [], []
    for number, row in read_json_lines("sft", path):
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            before, rest = [], tokenizer(row["text"])["input_ids"]
        elif isinstance(row, dict) and {"prompt", "completion"} <= row.keys():
            before = tokenizer(row["prompt"])["input_ids"]
            rest = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        else:
            raise ValueError(
                f'{path}, line {number}: expected {{"text": ...}} or {{"prompt": ..., "completion": ...}}'
            )
        sequences.append([*before, *rest, eos])
        prompt_lengths.append(len(before))
    if not sequences:
        raise ValueError(f"{path} holds no texts")
    return sequences, prompt_lengths


def _print_metrics(metrics: dict[str, float]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.4g}")
