"""Every kind of environment behind one interface that keeps the truth about episode ends.

Gymnasium's vector environments reset in three ways, and what a row of a rollout means differs:

| mode | an episode's last step returns | rows that are no transitions | true last observation |
|---|---|---|---|
| NEXT_STEP | its last observation | the next row: its action is ignored | the next row's observation |
| SAME_STEP | the next episode's first observation | none | `info["final_obs"]` |
| DISABLED | its last observation; we then reset | none | what `step` returned |

`Environments.step` reports what the collector needs for all of them: the next observation, which
environments will ignore the next action, and the last observations of truncated episodes that the
next observation no longer shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from ppo_fast.control.spaces import flatten_observation, space_leaves

Array = Any
"""A numpy array, or a torch tensor for tensor environments."""

FINAL_OBS_KEYS = ("final_obs", "final_observation", "terminal_observation")


class Step(NamedTuple):
    """One step of all environments; arrays are numpy, or torch for tensor environments."""

    obs: Any
    """[N, ...] leaves: the observation the next action is for"""
    rewards: Array
    """[N] float"""
    terminated: Array
    """[N] bool"""
    truncated: Array
    """[N] bool; both flags may be set, then the episode terminated"""
    ignored: Array | None
    """[N] bool: the next row is no transition (NEXT_STEP after an episode's end); None: all are"""
    final_obs: Any | None
    """[K, ...] leaves: last observations of the truncated episodes in `final_index`"""
    final_index: Array | None
    """[K] int: environments whose truncated episode's last observation is not in `obs`"""


class Environments:
    """A vector environment whose steps say exactly what each row is.

    Attributes:
        num_envs: environments stepped together.
        observation_space, action_space: of a single environment.
        leaves: the observation space's leaves by path.
        on_device: whether steps take and return torch tensors.
        approximate_truncation: whether truncated rows can only be bootstrapped from the value of
            their own observation, because the environment does not show the next one.
        mode: the autoreset mode.
    """

    def __init__(self, env: Any, env_id: str | None) -> None:
        self.env = env
        self.info: dict[str, Any] = {}
        self.env_id = env_id
        self.num_envs = int(env.num_envs)
        self.mode = _autoreset_mode(env)
        self.on_device = False
        self.approximate_truncation = False
        self._prev_done: Array | None = None
        self.observation_space, self.action_space = _single_spaces(env)
        self.leaves = space_leaves(self.observation_space)

    @property
    def device(self) -> torch.device:
        """Where a tensor environment lives; the CPU for numpy ones."""
        return (
            torch.device(getattr(self.env, "device", "cpu"))
            if self.on_device
            else torch.device("cpu")
        )

    def reset(self, seed: int | None) -> Any:
        """Start new episodes everywhere; return the first observations' leaves [N, ...]."""
        try:
            result = self.env.reset(seed=seed)
        except TypeError:
            # Tensor environments of robotics libraries and EnvPool take their seed when made.
            result = self.env.reset()
        obs, self.info = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        obs = flatten_observation(obs)
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        self.on_device = isinstance(first, Tensor)
        self._check_observation(obs)
        self._prev_done = None
        return self._select(obs)

    def _select(self, obs: Any) -> Any:
        # A robotics observation may hold groups the space does not name (a critic's, say).
        if isinstance(obs, dict) and len(obs) > len(self.leaves):
            return {path: obs[path] for path in self.leaves}
        return obs

    def _check_observation(self, obs: Any) -> None:
        named = obs if isinstance(obs, dict) else {"": obs}
        for path, space in self.leaves.items():
            where = f"observation {path!r}" if path else "observation"
            if path not in named:
                raise ValueError(f"{where} is missing; the environment returned {sorted(named)}")
            expected = (self.num_envs, *(space.shape or ()))
            if tuple(named[path].shape) != expected:
                raise ValueError(
                    f"{where} has shape {tuple(named[path].shape)}; "
                    f"expected [num_envs, *space.shape] = {expected}"
                )

    def step(self, actions: Any) -> Step:
        """Step all environments; see `Step`."""
        result = self.env.step(actions)
        if len(result) == 5:
            obs, rewards, terminated, truncated, info = result
        elif len(result) == 4:
            # rsl_rl's contract: one done flag, and which of the ends were time-outs.
            obs, rewards, dones, info = result
            dones = dones.bool()
            truncated = info["time_outs"].bool() if "time_outs" in info else torch.zeros_like(dones)
            terminated = dones & ~truncated
        else:
            raise ValueError(
                f"the environment's step returned {len(result)} values; expected (obs, rewards, "
                "terminated, truncated, info), or (obs, rewards, dones, extras)"
            )
        self.info = info
        obs = self._select(flatten_observation(obs))
        if self.mode == AutoresetMode.NEXT_STEP:
            return Step(obs, rewards, terminated, truncated, terminated | truncated, None, None)
        cut = truncated & ~terminated
        if self.mode == AutoresetMode.DISABLED:
            return self._reset_done(obs, rewards, terminated, truncated, cut)
        final_obs = final_index = None
        if self.on_device or cut.any():
            final_obs, final_index = self._final_observations(info, cut)
        return Step(obs, rewards, terminated, truncated, None, final_obs, final_index)

    def _reset_done(
        self, last_obs: Any, rewards: Array, terminated: Array, truncated: Array, cut: Array
    ) -> Step:
        done = terminated | truncated
        final_obs = final_index = None
        obs = last_obs
        if done.any():
            if cut.any():
                final_index = (
                    cut.nonzero()[0] if isinstance(cut, np.ndarray) else cut.nonzero()[:, 0]
                )
                final_obs = _take(last_obs, final_index)
            obs, reset_info = self.env.reset(options={"reset_mask": done})
            self.info = {**self.info, **reset_info}
            obs = self._select(flatten_observation(obs))
        return Step(obs, rewards, terminated, truncated, None, final_obs, final_index)

    def _final_observations(self, info: dict[str, Any], cut: Array) -> tuple[Any, Array]:
        """The last observations of truncated episodes from an info, and whose they are."""
        key = next((key for key in FINAL_OBS_KEYS if key in info), None)
        if self.on_device:
            if key is None:
                self._note_approximation()
                return None, None
            # Tensor environments give all rows; keeping them all spares a host sync.
            return self._select(flatten_observation(info[key])), None
        if key is None:
            self._note_approximation()
            return None, None
        index = cut.nonzero()[0]
        final = info[key]
        if isinstance(final, np.ndarray) and final.dtype == object:
            rows = [flatten_observation(final[i]) for i in index]
            if isinstance(rows[0], dict):
                return {path: np.stack([row[path] for row in rows]) for path in rows[0]}, index
            return np.stack(rows), index
        return _take(flatten_observation(final), index), index

    def _note_approximation(self) -> None:
        if not self.approximate_truncation:
            self.approximate_truncation = True
            warnings.warn(
                "the environment does not show the last observation of truncated episodes "
                f"(none of {', '.join(FINAL_OBS_KEYS)} in info): they are bootstrapped from the value "
                "of the observation before it, as rsl_rl and rl_games do",
                stacklevel=4,
            )

    def action_masks(self) -> Array | None:
        """Legal actions [N, A] bool for the current observation, where the environment tells them.

        Read from `info["action_mask"]` (Gymnasium's toy text, PettingZoo), or else from a method
        `action_masks()` of the environment (sb3-contrib's convention).
        """
        mask = self.info.get("action_mask") if isinstance(self.info, dict) else None
        if mask is not None:
            if isinstance(mask, np.ndarray) and mask.dtype == object:
                width = max(np.asarray(row).size for row in mask if row is not None)
                mask = np.stack([np.ones(width, bool) if row is None else row for row in mask])
            if isinstance(mask, Tensor):
                return mask.bool().reshape(self.num_envs, -1)
            mask = np.asarray(mask, dtype=bool).reshape(self.num_envs, -1)
            told = self.info.get("_action_mask")
            if told is not None:
                mask = mask | ~np.asarray(told, dtype=bool)[:, None]
            return mask
        if hasattr(self.env, "action_masks"):
            mask = self.env.action_masks()
            return mask.bool() if isinstance(mask, Tensor) else np.asarray(mask, dtype=bool)
        if isinstance(self.env, SyncVectorEnv | AsyncVectorEnv) and self._has_mask_method:
            return np.stack(
                [np.asarray(m, dtype=bool).reshape(-1) for m in self.env.call("action_masks")]
            )
        return None

    @property
    def _has_mask_method(self) -> bool:
        if not hasattr(self, "_mask_method"):
            self._mask_method = all(self.env.call("has_wrapper_attr", "action_masks"))
        return self._mask_method

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        if hasattr(self.env, "close"):
            self.env.close()


class EnvPoolEnv:
    """EnvPool's Gymnasium interface with the few names a vector environment has and it lacks.

    EnvPool resets on the step after an episode's end (NEXT_STEP) and is seeded when made.
    """

    def __init__(self, pool: Any) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.pool = pool
        self.num_envs = int(pool.config["num_envs"])
        self.single_observation_space = pool.observation_space
        self.single_action_space = pool.action_space

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; the seed was fixed when the pool was made."""
        return self.pool.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """Step all environments; the action's dtype follows the pool's."""
        obs, rewards, terminated, truncated, info = self.pool.step(
            actions.astype(self.single_action_space.dtype, copy=False)
        )
        return obs, rewards, terminated.astype(bool), truncated.astype(bool), info

    def close(self) -> None:
        """Stop the pool's threads."""
        self.pool.close()


def make_environments(
    env: str | gym.Env | Callable[[], Any] | Any, num_envs: int | None, vectorization: str
) -> Environments:
    """Turn whatever the user names into `Environments`.

    Args:
        env: a Gymnasium id, an `Env`, a callable returning an `Env` (or a vector environment), a
            `VectorEnv`, an EnvPool, or a tensor environment.
        num_envs: how many to make; None means 8 for ids and callables. Must agree with a vector
            environment's own number.
        vectorization: "auto", "sync" or "async"; see `ControlConfig`.

    Raises:
        ValueError: an unknown id, a `num_envs` that contradicts the environment, or a space without
            support.
        TypeError: something that is no environment.
    """
    env_id: str | None = None
    if isinstance(env, str):
        env_id = env
        vector: Any = _from_id(env, num_envs or 8, vectorization)
    elif isinstance(env, gym.Env) and not _is_envpool(env):
        env_id = env.spec.id if env.spec is not None else None
        vector = SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)
    elif callable(env) and (isinstance(env, type) or not hasattr(env, "step")):
        vector = _from_callable(env, num_envs or 8, vectorization)
    else:
        vector = env
    if _is_envpool(vector):
        vector = EnvPoolEnv(vector)
    for name in ("reset", "step", "num_envs"):
        if not hasattr(vector, name):
            raise TypeError(
                f"env is {type(vector).__name__} without {name!r}; expected a Gymnasium id, an Env, a "
                "callable returning one, a VectorEnv, an EnvPool or a tensor environment"
            )
    if num_envs is not None and num_envs != vector.num_envs:
        raise ValueError(
            f"num_envs = {num_envs}, but the environment given has {vector.num_envs}; leave num_envs out"
        )
    if env_id is None and getattr(vector, "spec", None) is not None:
        env_id = getattr(vector.spec, "id", None)
    return Environments(vector, env_id)


def _from_id(env_id: str, num_envs: int, vectorization: str) -> Any:
    try:
        spec = gym.spec(env_id)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment id {env_id!r} names a module that does not import: {error}"
        ) from error
    except gym.error.Error as error:
        raise ValueError(
            f"environment id {env_id!r} is unknown to Gymnasium: {error}{_extra_hint(env_id)}"
        ) from error
    mode: str | None = vectorization
    if vectorization == "auto":
        native = spec.vector_entry_point is not None and not spec.additional_wrappers
        mode = "vector_entry_point" if native else "sync"
    # We choose SAME_STEP where we may: no row of a rollout is spent on a reset.
    kwargs = {} if mode == "vector_entry_point" else {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        return gym.make_vec(
            env_id, num_envs=num_envs, vectorization_mode=mode, vector_kwargs=kwargs
        )
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError, ImportError) as error:
        raise ImportError(
            f"environment {env_id!r} needs a package: {error}{_extra_hint(env_id, spec)}"
        ) from error


def _extra_hint(env_id: str, spec: Any = None) -> str:
    entry = str(getattr(spec, "entry_point", ""))
    for extra, words in {
        "atari": ("ALE/", "NoFrameskip", "ale_py"),
        "mujoco": ("mujoco",),
        "box2d": ("box2d", "LunarLander", "BipedalWalker", "CarRacing"),
    }.items():
        if any(word in env_id or word in entry for word in words):
            return f"; install it with pip install 'ppo-fast[{extra}]'"
    return ""


def _from_callable(make: Callable[[], Any], num_envs: int, vectorization: str) -> Any:
    if vectorization == "async":
        return AsyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    first = make()
    if not isinstance(first, gym.Env) or _is_envpool(first):
        return first
    others = [make] * (num_envs - 1)
    return SyncVectorEnv([lambda: first, *others], autoreset_mode=AutoresetMode.SAME_STEP)


def _is_envpool(env: Any) -> bool:
    return any("envpool" in base.__module__ for base in type(env).__mro__) and hasattr(
        env, "config"
    )


def _autoreset_mode(env: Any) -> AutoresetMode:
    metadata = getattr(env, "metadata", None) or {}
    mode = metadata.get("autoreset_mode", AutoresetMode.SAME_STEP)
    # rsl_rl-style tensor environments carry no metadata: they reset within the step.
    return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)


def _single_spaces(env: Any) -> tuple[spaces.Space, spaces.Space]:
    observation = getattr(env, "single_observation_space", None)
    action = getattr(env, "single_action_space", None)
    if observation is None or action is None:
        return _spaces_from_sizes(env)
    return observation, action


def _spaces_from_sizes(env: Any) -> tuple[spaces.Space, spaces.Space]:
    """rsl_rl's environments name sizes instead of spaces: `num_actions` and an observation."""
    actions = getattr(env, "num_actions", None)
    if actions is None or not hasattr(env, "get_observations"):
        raise TypeError(
            f"env {type(env).__name__} has no single_observation_space and single_action_space, nor "
            "rsl_rl's num_actions and get_observations()"
        )
    obs = env.get_observations()
    obs = flatten_observation(obs[0] if isinstance(obs, tuple) else obs)
    if isinstance(obs, dict):
        obs = {"policy": obs["policy"]} if "policy" in obs else obs
        observation: spaces.Space = spaces.Dict({k: _unbounded(v) for k, v in obs.items()})
    else:
        observation = _unbounded(obs)
    return observation, spaces.Box(-np.inf, np.inf, (int(actions),), np.float32)


def _unbounded(leaf: Tensor) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, tuple(leaf.shape[1:]), np.float32)


def _take(leaves: Any, index: Array) -> Any:
    if isinstance(leaves, dict):
        return {path: leaf[index] for path, leaf in leaves.items()}
    return leaves[index]
