"""What a checkpoint of a language model's training holds, and how a trainer is put back from one.

Frozen weights are not in it: a run goes on with the models it was started with, which a fingerprint
checks.
"""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_fast.run_folder import CHECKPOINT_FILE, CONFIG_FILE

if TYPE_CHECKING:
    from ppo_fast.llm.ppo_trainer import PPOTrainer

KIND = "rlhf"

# What may differ between a run and its continuation.
FREE = {
    "run_dir",
    "save_every",
    "eval_every",
    "total_episodes",
    "num_epochs",
    "torch_threads",
    "progress_bar",
}
FREE |= {"token_budget", "logits_mb", "device", "sample_batch_size", "gradient_checkpointing"}


def save_trainer(trainer: PPOTrainer, path: str | os.PathLike[str]) -> None:
    """Write everything a run needs to go on, between two updates."""
    meta = {
        "kind": KIND,
        "config": dataclasses.asdict(trainer.config),
        "num_episodes": trainer.num_episodes,
        "iteration": trainer.iteration,
        "kl_controller": trainer.kl_controller.state_dict(),
        "num_prompts": len(trainer.prompts_data),
        "prompts": checksum(trainer.prompts_data.ids),
        "frozen": fingerprint(trainer),
        "metrics": trainer.metrics,
    }
    save_checkpoint(path, live_tensors(trainer), meta)


def load_trainer(trainer: PPOTrainer, path: str | os.PathLike[str]) -> Path | None:
    """Put a trainer into a checkpoint's state; return the run folder it lies in, if it does.

    Raises:
        CheckpointError: a missing, truncated or foreign file.
        ValueError: other models, prompts or settings than the run's.
    """
    path = Path(path)
    if path.is_dir() and (path / CHECKPOINT_FILE).exists():
        path = path / CHECKPOINT_FILE
    tensors, meta = load_checkpoint(path)
    if meta.get("kind") != KIND:
        raise CheckpointError(f"{path} is no checkpoint of PPO for language models")
    ours = dataclasses.asdict(trainer.config)
    changed = sorted(
        name
        for name, value in meta["config"].items()
        if name in ours and name not in FREE and _plain(ours[name]) != value
    )
    if changed:
        raise ValueError(
            f"{path} is of a run with other settings: "
            + ", ".join(f"{n} = {meta['config'][n]!r}, now {ours[n]!r}" for n in changed)
            + "; make the trainer with the run's"
        )
    if meta["num_prompts"] != len(trainer.prompts_data):
        raise ValueError(
            f"{path} is of a run on {meta['num_prompts']} prompts, train_dataset has "
            f"{len(trainer.prompts_data)}; expected the same"
        )
    if meta["prompts"] != checksum(trainer.prompts_data.ids):
        raise ValueError(
            f"{path} is of a run on other prompts, or on the same in another order; give the run's "
            "train_dataset"
        )
    live = live_tensors(trainer)
    wrong = sorted(set(live) ^ set(tensors)) or sorted(
        name
        for name, tensor in live.items()
        if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype)
    )
    if wrong:
        raise ValueError(
            f"{path} is of other models: {', '.join(wrong[:3])} {'and more ' if wrong[3:] else ''}"
            "do not fit; make the trainer with the models the run began with"
        )
    if not _alike(meta["frozen"], fingerprint(trainer)):
        raise ValueError(
            f"{path} is of a run with another reference or other frozen weights; make the trainer "
            "with the models the run began with"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
    trainer.kl_controller.load_state_dict(meta["kl_controller"])
    trainer.num_episodes, trainer.iteration = meta["num_episodes"], meta["iteration"]
    trainer.metrics = meta["metrics"]
    in_folder = path.name == CHECKPOINT_FILE and (path.parent / CONFIG_FILE).exists()
    return path.parent.resolve() if in_folder else None


def live_tensors(trainer: PPOTrainer) -> dict[str, Tensor]:
    """All that training changes, by name: copy into these to restore."""
    named = [(f"policy.{n}", p) for n, p in trainer.policy.model.named_parameters()]
    named += [(f"critic.{n}", p) for n, p in trainer.critic.named_parameters()]
    trained = {name: p.detach() for name, p in named if p.requires_grad}
    return {**trained, **trainer.optimizer.tensors("optimizer")}


def fingerprint(trainer: PPOTrainer) -> list[float]:
    """Sums that tell whether frozen weights are the same."""
    frozen = [p for p in trainer.policy.model.parameters() if not p.requires_grad]
    if trainer.reference is not None and trainer.reference.model is not trainer.policy.model:
        frozen += list(trainer.reference.model.parameters())
    return [float(p.detach().sum(dtype=torch.float64)) for p in frozen]


def checksum(prompts: list[list[int]]) -> int:
    """CRC-32 of token ids and of where prompts begin."""
    found = 0
    for prompt in prompts:
        found = zlib.crc32(np.array([len(prompt), *prompt], dtype="<i8").tobytes(), found)
    return found


def _alike(saved: list[float], own: list[float]) -> bool:
    """Whether sums are the same but for the order of additions, which another device changes."""
    return len(saved) == len(own) and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6) for a, b in zip(saved, own, strict=True)
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
