"""Mean return of a policy over a number of whole episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from ppo_fast.control.make_envs import make_environments
from ppo_fast.control.ppo import PPO
from ppo_fast.extras import require


class Evaluation(NamedTuple):
    """Returns and lengths of the evaluated episodes."""

    returns: np.ndarray
    """[episodes] float64"""
    lengths: np.ndarray
    """[episodes] int64"""

    def __str__(self) -> str:
        spread = self.returns.std(ddof=1) if len(self.returns) > 1 else 0.0
        return (
            f"return {self.returns.mean():.2f} +- {spread:.2f} over {len(self.returns)} episodes, "
            f"mean length {self.lengths.mean():.1f}"
        )


def evaluate(
    model: PPO,
    env: Any = None,
    episodes: int = 10,
    *,
    deterministic: bool = True,
    seed: int | None = 10_000,
) -> Evaluation:
    """Play whole episodes with a fixed policy.

    Every environment plays the same number of episodes, up to one, so short episodes are not
    over-represented as they are when the first `episodes` to finish are taken.

    Args:
        model: the policy; its normalisation statistics are used and left alone.
        env: see `PPO`; None makes the model's own environment anew.
        episodes: how many.
        deterministic: the most likely action, or a sample.
        seed: of the environments.

    Raises:
        ValueError: `episodes` below 1, or no environment to be made.
    """
    if episodes < 1:
        raise ValueError(f"evaluate: episodes = {episodes}; expected at least 1")
    if env is None and not model.from_id:
        raise ValueError("evaluate: the model was not trained on an environment id; pass env=")
    env = model.env_id if env is None else env
    width = min(episodes, 8) if isinstance(env, str) else None
    # Gymnasium's own environments, whatever it was trained on.
    envs = make_environments(env, width, "native")
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    returns: list[float] = []
    lengths: list[int] = []
    sums, steps = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    ignored = np.zeros(envs.num_envs, bool)
    obs = envs.reset(seed)
    try:
        while quota.any():
            masks = envs.action_masks()
            actions, _ = model.predict(obs, deterministic, masks)
            step = envs.step(actions if not envs.on_device else torch.as_tensor(actions))
            obs = step.obs
            rewards, done = _host(step.rewards), _host(step.terminated) | _host(step.truncated)
            sums += np.where(ignored, 0.0, rewards)
            steps += ~ignored
            for i in np.flatnonzero(done & (quota > 0)):
                returns.append(float(sums[i]))
                lengths.append(int(steps[i]))
                quota[i] -= 1
            sums[done], steps[done] = 0.0, 0
            ignored = done if envs.mode == AutoresetMode.NEXT_STEP else np.zeros_like(done)
    finally:
        # An environment given as an object stays its owner's.
        if not hasattr(env, "step") or isinstance(env, type):
            envs.close()
    return Evaluation(np.asarray(returns), np.asarray(lengths))


def _host(column: Any) -> np.ndarray:
    return column.cpu().numpy() if isinstance(column, torch.Tensor) else np.asarray(column)


def record_video(model: PPO, folder: Path, seed: int = 10_000) -> Path:
    """Record one deterministic episode as an MP4.

    Args:
        model: the policy; its environment must have an id that renders "rgb_array".
        folder: made if missing.
        seed: of the environment.

    Returns:
        The file written.

    Raises:
        ImportError: moviepy is missing.
        ValueError: the model names no environment id.
    """
    require("moviepy", "video", "recording a video")
    if model.env_id is None or not model.from_id:
        raise ValueError("record_video: the model was not trained on an environment id")
    env = gym.make(model.env_id, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(
        env, str(folder), episode_trigger=lambda _: True, disable_logger=True
    )
    evaluate(model, env, episodes=1, seed=seed)
    env.close()
    return max(folder.glob("*.mp4"), key=lambda file: file.stat().st_mtime)
