"""What a control checkpoint holds, and how a `PPO` is put back from one.

Tensors that training changes in place (policy, optimizer, normalisers) are saved under their names and
copied back; the environments' state and the next rollout's first row are kept aside until the
environments exist.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast.checkpoint import load_checkpoint, save_checkpoint
from ppo_fast.control.env_state import capture_state, restore_state
from ppo_fast.control.envs import Environments
from ppo_fast.control.spaces import space_from_json, space_to_json
from ppo_fast.run_folder import CHECKPOINT_FILE, CONFIG_FILE

if TYPE_CHECKING:
    from ppo_fast.control.ppo import PPO

Meta = dict[str, Any]
Tensors = dict[str, Tensor]

ENVIRONMENT_PREFIXES = ("env_state", "collector.", "global_rng")


def save(model: PPO, path: str | os.PathLike[str], with_environments: bool) -> None:
    """Write everything a run needs to go on.

    Args:
        model: between two iterations, or inside a failed rollout.
        path: the file, replaced atomically.
        with_environments: also the environments' state, where they offer it; False after they
            failed.

    Raises:
        CheckpointError: the file cannot be written; what was there before is intact.
    """
    tensors = {
        **live_tensors(model),
        "generator": model.generator.get_state(),
        "running_returns": torch.from_numpy(model.episodes.running_returns),
        "running_lengths": torch.from_numpy(model.episodes.running_lengths),
    }
    env_state = None
    if with_environments:
        env_state, env_tensors = _environment_state(model)
        tensors |= env_tensors
    meta = {
        "kind": "control",
        "config": dataclasses.asdict(model.config),
        "env_id": model.env_id,
        "from_id": model.from_id,
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "num_envs": model.num_envs,
        "custom_policy": type(model.policy).__qualname__ if model.custom_policy else None,
        "schedules": sorted({*model.schedules, *model.missing_schedules}),
        "num_timesteps": model.num_timesteps,
        "iteration": model.iteration,
        "learn_total": model.learn_total,
        "learn_done": model.learn_done,
        "kl_controller": model.kl_controller.state_dict(),
        "episode_returns": list(model.episodes.returns),
        "episode_lengths": list(model.episodes.lengths),
        "episodes_finished": model.episodes.finished,
        "metrics": model.metrics,
        "env_state": env_state,
    }
    save_checkpoint(path, tensors, meta)


def _environment_state(model: PPO) -> tuple[Any, Tensors]:
    if model.saved is not None:
        # Loaded and saved again before any step: what the file held still holds.
        meta, tensors = model.saved
        if meta["env_state"] is None:
            return None, {}
        kept = {k: v for k, v in tensors.items() if k.startswith(ENVIRONMENT_PREFIXES)}
        return meta["env_state"], kept
    if model.collector is None or model.envs is None:
        return None, {}
    captured = capture_state(model.envs.env)
    if captured is None:
        return None, {}
    state, env_tensors = captured
    # Policies and tensor environments may draw from torch's global generator.
    random = {"global_rng": torch.get_rng_state()}
    return state, {**env_tensors, **model.collector.tensors(), **random}


def live_tensors(model: PPO) -> Tensors:
    """Every tensor that training changes in place, by checkpoint name."""
    policy = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    return {**policy, **model.optimizer.tensors("optimizer"), **_normalizer_tensors(model)}


def _normalizer_tensors(model: PPO) -> Tensors:
    tensors: Tensors = {}
    for path, normalizer in model.obs_normalizers.items():
        tensors |= normalizer.moments.tensors(f"obs_normalizer.{path}")
    if model.reward_normalizer is not None:
        tensors |= model.reward_normalizer.moments.tensors("reward_normalizer")
        tensors["reward_normalizer.returns"] = model.reward_normalizer.returns
    return tensors


def read_control_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, Tensors, Meta]:
    """Read a checkpoint file, or the one in a run folder.

    Raises:
        CheckpointError: a missing, truncated or foreign file.
        ValueError: a checkpoint of another kind of training.
    """
    path = Path(path)
    if path.is_dir() and (path / CHECKPOINT_FILE).exists():
        path = path / CHECKPOINT_FILE
    tensors, meta = load_checkpoint(path)
    if meta.get("kind") != "control":
        raise ValueError(f"{path} is a checkpoint of kind {meta.get('kind')!r}; expected 'control'")
    return path, tensors, meta


def run_folder_of(path: Path) -> Path | None:
    """The run folder a checkpoint file is the current one of; None for any other file."""
    in_folder = path.name == CHECKPOINT_FILE and (path.parent / CONFIG_FILE).exists()
    return path.parent if in_folder else None


def check_same_spaces(path: Path, meta: Meta, envs: Environments) -> None:
    """Raise ValueError unless the environments have the checkpoint's spaces."""
    for name in ("observation_space", "action_space"):
        if space_to_json(getattr(envs, name)) != meta[name]:
            raise ValueError(
                f"{path} was saved from {meta['env_id'] or 'an environment'} with {name} "
                f"{space_from_json(meta[name])}; the environment given has {getattr(envs, name)}"
            )


def restore(model: PPO, path: Path, tensors: Tensors, meta: Meta) -> None:
    """Copy a checkpoint into a freshly built model.

    Raises:
        ValueError: a tensor is missing or has another shape, as with another policy.
    """
    same_envs = model.num_envs == meta["num_envs"]
    live = live_tensors(model)
    if not same_envs:
        live.pop("reward_normalizer.returns", None)
    surplus = sorted(k for k in tensors if k.startswith("policy.") and k not in live)
    if surplus:
        raise ValueError(
            f"{path} has {surplus[0]!r} of shape {tuple(tensors[surplus[0]].shape)}, which the "
            "policy has not: it differs from the one that was saved"
        )
    for name, tensor in live.items():
        saved = tensors.get(name)
        if saved is None or saved.shape != tensor.shape:
            came = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
            raise ValueError(
                f"{path} has {came} for {name!r}; expected shape {tuple(tensor.shape)}. The policy "
                "or a setting differs from the one that was saved"
            )
    for name, tensor in live.items():
        tensor.copy_(tensors[name])
    # A GPU's generator has another state; a run moved between devices draws anew.
    if model.generator.get_state().shape == tensors["generator"].shape:
        model.generator.set_state(tensors["generator"])
    model.num_timesteps, model.iteration = meta["num_timesteps"], meta["iteration"]
    model.learn_total, model.learn_done = meta["learn_total"], meta["learn_done"]
    model.kl_controller.load_state_dict(meta["kl_controller"])
    model.episodes.returns.extend(meta["episode_returns"])
    model.episodes.lengths.extend(meta["episode_lengths"])
    model.episodes.finished = meta["episodes_finished"]
    model.metrics = meta["metrics"]
    if same_envs:
        model.episodes.running_returns[:] = tensors["running_returns"].numpy()
        model.episodes.running_lengths[:] = tensors["running_lengths"].numpy()
    else:
        meta = {**meta, "env_state": None}
    model.saved = (meta, tensors)


def restore_environments(model: PPO, meta: Meta, tensors: Tensors) -> None:
    """Put the environments and the collector where they were when the checkpoint was saved.

    Raises:
        ValueError: the environments are of another kind than the saved ones.
    """
    assert model.collector is not None and model.envs is not None
    # Starting shows the normalisers a first observation, which they must forget again.
    normalizers = _normalizer_tensors(model)
    kept = {name: tensor.clone() for name, tensor in normalizers.items()}
    model.collector.start(model.config.seed)
    for name, tensor in normalizers.items():
        tensor.copy_(kept[name])
    restore_state(model.envs.env, meta["env_state"], tensors)
    model.collector.restore(tensors)
    torch.set_rng_state(tensors["global_rng"])
