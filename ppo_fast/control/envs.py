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

import functools
import inspect
import multiprocessing.connection
import warnings
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from ppo_fast.control.spaces import flatten_observation, space_leaves
from ppo_fast.control.tensor_envs import TensorEnv

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
        capturable: whether steps may be recorded in a CUDA graph, as those of `TensorEnv`.
    """

    def __init__(self, env: Any, env_id: str | None) -> None:
        self.env = env
        self.info: dict[str, Any] = {}
        self.env_id = env_id
        self.num_envs = int(env.num_envs)
        self.mode = _autoreset_mode(env)
        self.on_device = False
        self.capturable = isinstance(env, TensorEnv)
        self.approximate_truncation = False
        self._over: Array | None = None
        self._takes_seed = _accepts_seed(env)
        self.observation_space, self.action_space = _single_spaces(env)
        self.leaves = space_leaves(self.observation_space)
        self._expected = {
            path: ((self.num_envs, *(space.shape or ())), np.dtype(space.dtype).kind != "f")
            for path, space in self.leaves.items()
        }

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
        # Tensor environments of robotics libraries take their seed when made.
        result = self._call("reset", **({"seed": seed} if self._takes_seed else {}))
        obs, self.info = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        self._over = None
        obs = flatten_observation(obs)
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        self.on_device = isinstance(first, Tensor)
        return self._checked(obs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the environment; a worker process that died is named."""
        try:
            return getattr(self.env, name)(*args, **kwargs)
        except (EOFError, ConnectionError) as error:
            died = _end_workers(self.env)
            if died is None:
                raise
            raise RuntimeError(
                f"the worker process of environment {died[0]} ended with exit code {died[1]} during "
                f"{name}; vectorization = 'sync' runs the environments in this process and shows where"
            ) from error

    def _checked(self, obs: Any) -> Any:
        """The observation's leaves that the space names, once their shapes and dtypes fit."""
        named = obs if isinstance(obs, dict) else {"": obs}
        for path, (expected, integer) in self._expected.items():
            if path not in named:
                raise ValueError(
                    f"{_called(path)} is missing; the environment returned {sorted(named)}"
                )
            leaf = named[path]
            if not isinstance(leaf, Tensor | np.ndarray):
                raise TypeError(
                    f"{_called(path)} is a {type(leaf).__name__}; expected an array or a tensor"
                )
            if leaf.shape != expected:
                raise ValueError(
                    f"{_called(path)} has shape {tuple(leaf.shape)}; "
                    f"expected [num_envs, *space.shape] = {expected}"
                )
            if integer and _is_float(leaf):
                raise ValueError(
                    f"{_called(path)} has dtype {leaf.dtype}; expected {self.leaves[path].dtype}, "
                    "the dtype of its space"
                )
        # A robotics observation may hold groups the space does not name (a critic's, say).
        if isinstance(obs, dict) and len(obs) > len(self.leaves):
            return {path: obs[path] for path in self.leaves}
        return obs

    def _column(self, name: str, column: Any, flags: bool) -> Array:
        column = column if isinstance(column, Tensor) else np.asarray(column)
        if column.shape != (self.num_envs,):
            raise ValueError(
                f"the environment's step returned {name} of shape {tuple(column.shape)}; expected "
                f"[num_envs] = {(self.num_envs,)}"
            )
        if not flags:
            return column
        return column.bool() if isinstance(column, Tensor) else column.astype(bool, copy=False)

    def step(self, actions: Any) -> Step:
        """Step all environments; see `Step`.

        Raises:
            ValueError: the environment returned another number of values, or other shapes or dtypes
                than its spaces promise.
            RuntimeError: a worker process ended.
        """
        result = self._call("step", actions)
        if len(result) == 5:
            obs, rewards, terminated, truncated, info = result
            terminated = self._column("terminated", terminated, True)
            truncated = self._column("truncated", truncated, True)
        elif len(result) == 4:
            # rsl_rl's contract: one done flag, and which of the ends were time-outs.
            obs, rewards, dones, info = result
            dones = self._column("dones", dones, True)
            truncated = dones & self._column("time_outs", info.get("time_outs", ~dones), True)
            terminated = dones & ~truncated
        else:
            raise ValueError(
                f"the environment's step returned {len(result)} values; expected (obs, rewards, "
                "terminated, truncated, info), or (obs, rewards, dones, extras)"
            )
        rewards = self._column("rewards", rewards, False)
        self.info = info
        obs = self._checked(flatten_observation(obs))
        if self.mode == AutoresetMode.NEXT_STEP:
            self._over = terminated | truncated
            return Step(obs, rewards, terminated, truncated, self._over, None, None)
        if self.mode == AutoresetMode.DISABLED:
            cut = truncated & ~terminated
            return self._reset_done(obs, rewards, terminated, truncated, cut)
        final_obs = final_index = None
        # On a device nothing is worked out that only a host sync could use.
        if self.on_device or (truncated & ~terminated).any():
            final_obs, final_index = self._final_observations(info, terminated, truncated)
        return Step(obs, rewards, terminated, truncated, None, final_obs, final_index)

    def _reset_done(
        self, last_obs: Any, rewards: Array, terminated: Array, truncated: Array, cut: Array
    ) -> Step:
        done = terminated | truncated
        final_obs = final_index = None
        obs = last_obs
        if done.any():
            if cut.any():
                final_index = _where(cut)
                final_obs = _take(last_obs, final_index)
            obs, reset_info = self._call("reset", options={"reset_mask": done})
            legal = _legal_after_reset(self._legal(self.info), self._legal(reset_info), done)
            self.info = {**self.info, **reset_info, "action_mask": legal, "_action_mask": None}
            obs = self._checked(flatten_observation(obs))
        return Step(obs, rewards, terminated, truncated, None, final_obs, final_index)

    def _final_observations(
        self, info: dict[str, Any], terminated: Array, truncated: Array
    ) -> tuple[Any, Array]:
        """The last observations of truncated episodes from an info, and whose they are."""
        key = next((key for key in FINAL_OBS_KEYS if key in info), None)
        if key is None:
            # Asking whether an episode was cut at all would wait for a GPU.
            if not self.on_device or self.device.type != "cpu" or (truncated & ~terminated).any():
                self._note_approximation()
            return None, None
        final = info[key]
        single = isinstance(final, np.ndarray) and final.dtype == object
        if self.on_device and not single:
            # Tensor environments give all rows; keeping them all spares a host sync.
            return self._checked(flatten_observation(final)), None
        index = _where(truncated & ~terminated)
        if not len(index):
            return None, None
        if single:
            rows = [flatten_observation(final[i]) for i in index]
            self._refuse_shared_memory(rows, index)
            if isinstance(rows[0], dict):
                return {path: np.stack([row[path] for row in rows]) for path in rows[0]}, index
            return np.stack(rows), index
        return _take(flatten_observation(final), index), index

    def _refuse_shared_memory(self, final: list[Any], index: Array) -> None:
        env = getattr(self.env, "unwrapped", self.env)
        if not isinstance(env, SyncVectorEnv):
            return
        for i, last in zip(index, final, strict=True):
            first = flatten_observation(env._env_obs[i])
            pairs = [(last[path], first[path]) for path in last] if isinstance(last, dict) else []
            if any(np.may_share_memory(*pair) for pair in pairs or [(last, first)]):
                raise ValueError(
                    f"environment {i} returns its observations in one array, in which reset has "
                    "overwritten the last one of an episode; return copies, as in obs.copy()"
                )

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

        All are legal where the next action will be ignored. Read from `info["action_mask"]`
        (Gymnasium's toy text, PettingZoo), or else from a method `action_masks()` of the
        environment (sb3-contrib's convention).
        """
        legal = self._legal(self.info)
        if legal is None and hasattr(self.env, "action_masks"):
            mask = self.env.action_masks()
            legal = mask.bool() if isinstance(mask, Tensor) else np.asarray(mask, dtype=bool)
        elif legal is None and self._has_mask_method:
            rows = getattr(self.env, "unwrapped", self.env).call("action_masks")
            legal = np.stack([np.asarray(row, dtype=bool).reshape(-1) for row in rows])
        return legal if legal is None or self._over is None else legal | self._over[:, None]

    def _legal(self, info: Any) -> Array | None:
        """The legal actions [N, A] an info tells; all of them where it is silent about a row."""
        mask = info.get("action_mask") if isinstance(info, dict) else None
        if mask is None:
            return None
        if isinstance(mask, Tensor):
            return mask.bool().reshape(self.num_envs, -1)
        mask = np.asarray(mask)
        if mask.dtype == object:
            width = max(np.asarray(row).size for row in mask if row is not None)
            mask = np.stack([np.ones(width, bool) if row is None else row for row in mask])
        mask = mask.astype(bool).reshape(self.num_envs, -1)
        told = info.get("_action_mask")
        return mask if told is None else mask | ~told.astype(bool)[:, None]

    @functools.cached_property
    def _has_mask_method(self) -> bool:
        env = getattr(self.env, "unwrapped", self.env)
        if not isinstance(env, SyncVectorEnv | AsyncVectorEnv):
            return False
        return all(env.call("has_wrapper_attr", "action_masks"))

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        if hasattr(self.env, "close"):
            self.env.close()


def _end_workers(env: Any) -> tuple[int, int | None] | None:
    """End an AsyncVectorEnv of which a worker died; return which and its exit code, or None."""
    env = getattr(env, "unwrapped", env)
    if not isinstance(env, AsyncVectorEnv):
        return None
    # A pipe breaks a moment before its process is gone, and that a moment before its code is known.
    gone = multiprocessing.connection.wait([p.sentinel for p in env.processes], timeout=1)
    # A worker whose environment raised has told so, and its pipe is closed.
    told = [pipe is None for pipe in env.parent_pipes]
    died = [i for i, p in enumerate(env.processes) if p.sentinel in gone and not told[i]]
    if not died:
        return None
    env.processes[died[0]].join(timeout=1)
    code = env.processes[died[0]].exitcode
    for process in env.processes:
        process.terminate()
        process.join()
    # Closing it would wait for answers that cannot come.
    env.closed = True
    return died[0], code


def _accepts_seed(env: Any) -> bool:
    parameters = inspect.signature(env.reset).parameters.values()
    return any(p.name == "seed" or p.kind == p.VAR_KEYWORD for p in parameters)


def _autoreset_mode(env: Any) -> AutoresetMode:
    metadata = getattr(env, "metadata", None) or {}
    if "autoreset_mode" in metadata:
        return AutoresetMode(metadata["autoreset_mode"])
    if isinstance(env, gym.vector.VectorEnv):
        warnings.warn(
            f"{type(env).__name__}.metadata names no 'autoreset_mode'; taking Gymnasium's default, "
            "AutoresetMode.NEXT_STEP: a wrong mode trains on transitions that never were",
            stacklevel=4,
        )
        return AutoresetMode.NEXT_STEP
    # rsl_rl-style tensor environments carry no metadata: they reset within the step.
    return AutoresetMode.SAME_STEP


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


def _where(flags: Array) -> Array:
    return flags.nonzero()[0] if isinstance(flags, np.ndarray) else flags.nonzero()[:, 0]


def _legal_after_reset(before: Array | None, new: Array | None, done: Array) -> Array | None:
    """Legal actions [N, A]: the reset's where an environment was reset, else the step's."""
    like = before if before is not None else new
    if like is None:
        return None
    every = like | True
    before, new = (every if mask is None else mask for mask in (before, new))
    where = torch.where if isinstance(like, Tensor) else np.where
    return where(done[:, None], new, before)


def _called(path: str) -> str:
    return f"observation {path!r}" if path else "observation"


def _is_float(leaf: Any) -> bool:
    return leaf.is_floating_point() if isinstance(leaf, Tensor) else leaf.dtype.kind == "f"
