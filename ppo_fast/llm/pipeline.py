"""The whole of RLHF in one call: data, SFT, preferences, reward model, PPO, results.

Without a model it runs on the stories of `ppo_fast.llm.stories`, whose gold reward shows what the
reward model cannot: PPO without a KL penalty ends up with responses that it scores high and that are
worth little (Gao et al. 2022, arXiv:2210.10760).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.extras import require
from ppo_fast.llm import pipeline_steps as steps
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.pipeline_steps import HELD_OUT, PREFERENCES, PROMPTS, REWARD_MODEL, SFT
from ppo_fast.run_folder import CHECKPOINT_FILE

if TYPE_CHECKING:
    from ppo_fast.llm.ppo_trainer import PPOTrainer

SETTINGS = "pipeline.json"
# Run folder and policy of either training, by whether it has the KL penalty.
RUNS = {True: ("ppo", "policy"), False: ("ppo-no-kl", "policy-no-kl")}

# Settings of which None means: the first for the stories' tiny model, the second for a real one.
BY_MODE: dict[str, tuple[Any, Any]] = {
    "sft_steps": (1600, None),
    "sft_batch_size": (24, 32),
    "sft_learning_rate": (4e-3, 2e-5),
    "pairs": (4500, None),
    "reward_epochs": (2.0, 1.0),
    "reward_batch_size": (16, 32),
    "reward_learning_rate": (7e-4, 1e-5),
    "learning_rate": (5e-4, 3e-6),
    "rollout_batch_size": (128, 64),
    "num_minibatches": (2, 1),
    "updates": (80, None),
    "response_length": (32, 128),
    "kl_coef": (0.2, 0.05),
    "without_kl": (True, False),
    "torch_threads": (1, None),
}
# What may differ when a folder is taken up again.
FREE = {"out", "processes", "torch_threads", "progress_bar"}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """RLHF from start to results, into one folder; on generated stories unless there is a model.

    Run again with the same flags and --out DIR, it goes on where it stopped. Flags that are None
    have one default for the stories' tiny model and another for yours.
    """

    out: str | None = None
    """folder for everything; None makes runs/rlhf/TIME. What is done in it is not done again"""
    seed: int = 1
    """of data, initialisation, samples and labels"""
    model: str | None = None
    """folder or hub name of a causal LM; None makes and trains one on generated stories"""
    prompts: str | None = None
    """with a model: JSON lines with a prompt each"""
    sft_data: str | None = None
    """with a model: JSON lines, {"prompt", "completion"} or {"text"}, to fine-tune it on first"""
    preferences: str | None = None
    """with a model: JSON lines, {"prompt", "chosen", "rejected"}; or let a judge compare samples"""
    judge: str | None = None
    """with a model: folder or hub name of a causal LM that compares its samples (RLAIF)"""
    principle: str = "Choose the answer that is more helpful, honest and harmless."
    """what the judge goes by"""
    stories: int = 8000
    """stories of the corpus, where there is no model"""
    layers: int = 2
    """of the stories' model"""
    hidden_size: int = 96
    """of the stories' model"""
    eval_prompts: int = 300
    """prompts held out from everything, for results; at most a tenth of yours"""
    sft_steps: int | None = None
    """optimizer steps of SFT; None means 1600, or one pass over sft_data"""
    sft_batch_size: int | None = None
    """texts per step; None means 24, or 32"""
    sft_learning_rate: float | None = None
    """highest, after warm-up; None means 4e-3, or 2e-5"""
    pairs: int | None = None
    """pairs of samples to compare; None means 4500, or one for every prompt"""
    reward_epochs: float | None = None
    """passes of the reward model over the preferences; None means 2, or 1"""
    reward_batch_size: int | None = None
    """pairs per step; None means 16, or 32"""
    reward_learning_rate: float | None = None
    """highest, after warm-up; None means 7e-4, or 1e-5"""
    updates: int | None = None
    """of PPO; None means 80, or one pass over the prompts"""
    rollout_batch_size: int | None = None
    """responses per update; None means 128, or 64"""
    num_minibatches: int | None = None
    """minibatches per pass over a rollout; None means 2, or 1"""
    update_epochs: int = 4
    """passes over each rollout"""
    learning_rate: float | None = None
    """PPO's, for policy and critic, lowered linearly to 0; None means 5e-4, or 3e-6"""
    response_length: int | None = None
    """most tokens of a response; None means 32, or 128"""
    temperature: float = 1.0
    """of all sampling"""
    missing_eos_score: float = -3.0
    """score of a response that does not end; the reward model's have mean 0 and standard deviation 1
    over samples of the model before PPO"""
    kl_coef: float | None = None
    """first weight of the KL penalty; None means 0.2, or 0.05"""
    kl_target: float = 5.0
    """KL(policy || model before PPO) in nats a response that the weight is steered to"""
    kl_horizon: float = 300
    """responses over which the weight changes by at most 20 %"""
    without_kl: bool | None = None
    """also train without KL penalty, to compare; None means on the stories only"""
    processes: int = 2
    """1 trains with and without KL penalty one after the other, 2 side by side"""
    torch_threads: int | None = None
    """CPU threads of a process; None means 1, or torch's choice"""
    device: str = "auto"
    """"auto" (a GPU if there is one and a model was given, else the CPU), "cpu" or "cuda" """
    progress_bar: bool = True
    """show progress bars"""

    def __post_init__(self) -> None:
        """Check what can be checked without reading files.

        Raises:
            ValueError: sources that do not go together, or a number out of range.
        """
        sources = {name: getattr(self, name) for name in ("prompts", "sft_data", "preferences")}
        given = sorted(name for name, path in (sources | {"judge": self.judge}).items() if path)
        if self.model is None and given:
            raise ValueError(
                f"Pipeline: {given[0]} is given and model is not; expected the model that it is for, "
                "or neither: the stories bring their own"
            )
        if self.model is not None and self.prompts is None:
            raise ValueError(
                "Pipeline: prompts is None; expected JSON lines of prompts for the model"
            )
        if self.model is not None and (self.preferences is None) == (self.judge is None):
            raise ValueError(
                "Pipeline: with a model, give either preferences, a file of pairs, or judge, a model "
                "that compares samples"
            )
        if not self.principle.strip():
            raise ValueError("Pipeline: principle is empty; expected what makes an answer better")
        for name in ("stories", "layers", "hidden_size", "eval_prompts", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pipeline: {name} is {getattr(self, name)}; expected at least 1")
        for name in ("pairs", "sft_steps", "sft_batch_size", "reward_batch_size", "updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Pipeline: {name} is {value}; expected at least 1, or None")
        for name in ("sft_learning_rate", "reward_learning_rate", "reward_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Pipeline: {name} is {value}; expected a number > 0, or None")
        if self.hidden_size % (2 * steps.HEADS):
            raise ValueError(
                f"Pipeline: hidden_size is {self.hidden_size}; expected a multiple of {2 * steps.HEADS}"
            )
        # RLHFConfig checks the rest.
        for with_kl in RUNS:
            ppo_config(self.resolved(), None, with_kl)

    def resolved(self) -> Pipeline:
        """With the mode's defaults in place of None."""
        place = 0 if self.model is None else 1
        found = {
            name: choices[place]
            for name, choices in BY_MODE.items()
            if getattr(self, name) is None and choices[place] is not None
        }
        return dataclasses.replace(self, **found) if found else self


def run_pipeline(settings: Pipeline) -> dict[str, dict[str, float]]:
    """Do what is not done yet, and write results.md, results.json, samples.jsonl and pictures.

    Each step leaves a file or folder, which appears whole or not at all; PPO goes on from its
    checkpoint.

    Returns:
        The rows of the table by policy ("sft", "policy", "policy-no-kl"): see `summary`.

    Raises:
        ValueError: inputs that cannot be used, before the first training; or a folder that was made
            with other settings.
        FileExistsError: the folder holds something else.
    """
    from ppo_fast.llm.evaluation import compare

    for module, extra in (("transformers", "llm"), ("tokenizers", "llm"), ("matplotlib", "train")):
        require(module, extra, "ppo-fast rlhf run")
    settings = settings.resolved()
    out = _open(settings)
    print(f"{out}", flush=True)
    with _threads(settings), _quiet():
        _step("data", out / PROMPTS, lambda: steps.write_data(settings, out))
        if settings.model is None or settings.sft_data is not None:
            _step("sft", out / SFT, lambda: steps.train_sft_model(settings, out))
        _step("preferences", out / PREFERENCES, lambda: steps.write_preferences_file(settings, out))
        _step("reward model", out / REWARD_MODEL, lambda: steps.train_scorer(settings, out))
        _train_policies(settings, out)
        return compare(settings, out)


@contextmanager
def _threads(settings: Pipeline) -> Iterator[None]:
    """Torch's threads as set, and then as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.torch_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers, which shows one for every file."""
    logging = require("transformers.utils.logging", "llm", "ppo-fast rlhf run")
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def ppo_config(settings: Pipeline, run_dir: Path | None, with_kl: bool) -> RLHFConfig:
    """PPO's settings of a run with or without KL penalty, of `resolved` settings."""
    penalty: dict[str, Any] = {"kl_coef": 0.0}
    if with_kl:
        penalty = {
            "kl_coef": settings.kl_coef,
            "kl_controller": "proportional",
            "kl_target": settings.kl_target,
            "kl_unit": "seq",
            "kl_horizon": settings.kl_horizon,
        }
    size: Any = settings.rollout_batch_size
    updates = settings.updates
    return RLHFConfig(
        **penalty,
        learning_rate=settings.learning_rate,  # type: ignore[arg-type]
        rollout_batch_size=size,
        total_episodes=None if updates is None else updates * size,
        num_minibatches=settings.num_minibatches,  # type: ignore[arg-type]
        update_epochs=settings.update_epochs,
        response_length=settings.response_length,  # type: ignore[arg-type]
        temperature=settings.temperature,
        missing_eos_score=settings.missing_eos_score,
        vf_clip_coef=None,
        eval_every=5 if settings.model is None else 20,
        seed=settings.seed,
        device=steps.device_of(settings),
        torch_threads=settings.torch_threads,
        run_dir=None if run_dir is None else str(run_dir),
    )


def _open(settings: Pipeline) -> Path:
    """The folder, new or one of the same settings; what files are given is read once, to check it."""
    out = Path(settings.out or Path("runs") / "rlhf" / time.strftime("%Y%m%d-%H%M%S"))
    record = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    path = out / SETTINGS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in record.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{out} was made with other settings: "
                + ", ".join(f"{n} = {before.get(n)!r}, now {record[n]!r}" for n in changed)
                + "; give the same flags, or another --out"
            )
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} is not empty and holds no {SETTINGS}; choose another --out, or empty it"
        )
    steps.check_inputs(settings)
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    return out


def _step(name: str, result: Path, make: Callable[[], Any]) -> None:
    """Run a step unless its result is there, and say so."""
    if result.exists():
        print(f"{name}: done before", flush=True)
        return
    started = time.perf_counter()
    report = make()
    print(f"{name}: {time.perf_counter() - started:.1f} s{_short(report)}", flush=True)


def _short(report: dict[str, float] | None) -> str:
    shown = {k: v for k, v in (report or {}).items() if k not in ("seconds", "steps")}
    return "".join(f", {name} {value:.3g}" for name, value in shown.items())


def _train_policies(settings: Pipeline, out: Path) -> None:
    """Train with and, where asked for, without KL penalty."""
    todo = [
        with_kl
        for with_kl in RUNS
        if (with_kl or settings.without_kl) and not (out / RUNS[with_kl][1]).exists()
    ]
    if not todo:
        print("ppo: done before", flush=True)
        return
    started = time.perf_counter()
    if len(todo) == 1 or settings.processes == 1:
        for with_kl in todo:
            _train_policy(settings, out, with_kl, settings.progress_bar)
    else:
        # Spawned: a forked copy of torch's threads does not work.
        other = multiprocessing.get_context("spawn").Process(
            target=_train_beside, args=(settings, out, os.getpid())
        )
        other.start()
        try:
            _train_policy(settings, out, True, settings.progress_bar)
        except BaseException:
            other.terminate()  # after its update, with a checkpoint
            raise
        finally:
            other.join()
        if other.exitcode:
            raise RuntimeError(
                "PPO without KL penalty failed in its process, for the reason printed above; run the "
                "same command again to go on from its checkpoint"
            )
    print(f"ppo: {time.perf_counter() - started:.1f} s", flush=True)


def _train_beside(settings: Pipeline, out: Path, parent: int) -> None:
    """The run without KL penalty in a process of its own, whose interrupts are its parent's."""
    with suppress(KeyboardInterrupt):
        _train_policy(settings, out, False, False, parent)


def _train_policy(
    settings: Pipeline, out: Path, with_kl: bool, progress_bar: bool, parent: int | None = None
) -> None:
    """One run of PPO, from its checkpoint if it has one.

    Args:
        settings: resolved.
        out: the pipeline's folder.
        with_kl: whether the KL is penalised; it is measured in any case.
        progress_bar: show one.
        parent: process to stop with; None for none.
    """
    with _quiet():
        _train_and_save(settings, out, with_kl, progress_bar, parent)


def _train_and_save(
    settings: Pipeline, out: Path, with_kl: bool, progress_bar: bool, parent: int | None
) -> None:
    run, target = (out / name for name in RUNS[with_kl])
    started = time.perf_counter()
    trainer = make_policy_trainer(settings, out, with_kl, progress_bar)
    if (run / CHECKPOINT_FILE).exists():
        trainer.load(run)
    else:
        # Killed before its first checkpoint: there is nothing in it yet.
        shutil.rmtree(run, ignore_errors=True)
    before = trainer.num_episodes
    # Without its parent it would train beside the run that takes up the folder.
    trainer.learn(lambda _: parent is None or os.getppid() == parent)
    if trainer.num_episodes < trainer.total_episodes:
        return
    with steps.whole(target) as folder:
        trainer.save_model(folder)
        steps.write_training(
            folder,
            {
                "seconds": time.perf_counter() - started,
                "updates": trainer.iteration,
                "episodes_before": before,
            },
        )


def make_policy_trainer(
    settings: Pipeline, out: Path, with_kl: bool, progress_bar: bool = False
) -> PPOTrainer:
    """The trainer of a run, of `resolved` settings; on stories it reports the gold reward too."""
    from ppo_fast.llm.commands import load_causal_lm, load_reward_model
    from ppo_fast.llm.ppo_trainer import PPOTrainer
    from ppo_fast.llm.stories import gold_reward_fn

    policy, tokenizer = load_causal_lm(steps.first_policy(settings, out))
    is_story = settings.model is None
    return PPOTrainer(
        dataclasses.replace(
            ppo_config(settings, out / RUNS[with_kl][0], with_kl), progress_bar=progress_bar
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model="copy",
        reward_model=load_reward_model(out / REWARD_MODEL),
        value_model=load_reward_model(out / REWARD_MODEL),
        train_dataset=out / PROMPTS,
        eval_dataset=out / HELD_OUT,
        reward_fn=gold_reward_fn(tokenizer) if is_story else None,
        reward_weights=[0.0, 1.0] if is_story else None,
    )
