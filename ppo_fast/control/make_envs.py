"""From what a user names (an id, an environment, a callable, a pool) to `Environments`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import signal
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from ppo_fast.control.envs import Environments
from ppo_fast.control.sync_envs import SyncEnvs
from ppo_fast.control.tensor_envs import TENSOR_ENVS, make_tensor_env

GPU_ENVS = 512

ATARI_WORDS = ("ALE/", "NoFrameskip")


def make_environments(
    env: str | gym.Env | Callable[[], Any] | Any,
    num_envs: int | None,
    vectorization: str,
    device: str = "auto",
) -> Environments:
    """Turn whatever the user names into `Environments`.

    Args:
        env: a Gymnasium id ("module:id" imports the module first), an `Env`, a callable that returns a
            new `Env` (or a vector environment), a `VectorEnv`, an EnvPool, or a tensor environment.
        num_envs: how many to make; None means 8 for ids and callables. Must agree with a vector
            environment's own number.
        vectorization: "auto", "tensor", "native", "sync" or "async"; see `ControlConfig`.
        device: of tensor environments made here; "auto" is the GPU, where torch sees one, from
            512 environments on.

    Raises:
        ValueError: an unknown id, one without a tensor version where that is asked for, a `num_envs`
            that contradicts the environment, or a space without support.
        TypeError: something that is no environment.
    """
    env_id = env if isinstance(env, str) else getattr(getattr(env, "spec", None), "id", None)
    if isinstance(env, str) and _in_torch(env, vectorization):
        number = num_envs or 8
        if device == "auto":
            # Fewer keep a GPU waiting for the next launch.
            device = "cuda" if number >= GPU_ENVS and torch.cuda.is_available() else "cpu"
        vector: Any = make_tensor_env(env, number, device=checked_device(device))
    elif isinstance(env, str):
        vector = _from_id(env, num_envs or 8, vectorization)
    elif isinstance(env, gym.Env) and not hasattr(env, "single_action_space"):
        vector = _sync([lambda: env])
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
    return Environments(vector, env_id)


def checked_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch knows no such device, or sees no GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device = {name!r}; expected 'auto', 'cpu', 'cuda' or one like 'cuda:1'"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU; use device = 'cpu'")
    return device


def _in_torch(env_id: str, vectorization: str) -> bool:
    return vectorization == "tensor" or (vectorization == "auto" and env_id in TENSOR_ENVS)


def _from_id(env_id: str, num_envs: int, vectorization: str) -> Any:
    if any(word in env_id for word in ATARI_WORDS) and importlib.util.find_spec("ale_py"):
        importlib.import_module("ale_py")  # registers its ids
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gym.spec(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment id {env_id!r} names a module that does not import: {error}"
        ) from error
    except gym.error.Error as error:
        # Atari's ids are known only once its package is there.
        hint = _extra_hint(env_id) if any(word in env_id for word in ATARI_WORDS) else ""
        raise ValueError(
            f"environment id {env_id!r} is unknown to Gymnasium: {error}{hint}"
        ) from error
    native = spec.vector_entry_point is not None and not spec.additional_wrappers
    try:
        if vectorization in ("auto", "native") and native:
            return gym.make_vec(name, num_envs, vectorization_mode="vector_entry_point")
        # Gymnasium's checks cost as much as a small environment's step; shapes, dtypes and finite
        # values are checked here in any case.
        make = functools.partial(gym.make, name, disable_env_checker=True)
        return _from_callable(make, num_envs, vectorization)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise ImportError(
            f"environment {env_id!r} needs a package: {error}{_extra_hint(env_id, spec)}"
        ) from error


def _extra_hint(env_id: str, spec: Any = None) -> str:
    entry = str(getattr(spec, "entry_point", ""))
    for extra, words in {
        "atari": (*ATARI_WORDS, "ale_py"),
        "mujoco": ("mujoco",),
        "box2d": ("box2d", "LunarLander", "BipedalWalker", "CarRacing"),
    }.items():
        if any(word in env_id or word in entry for word in words):
            return f"; install it with pip install 'ppo-fast[{extra}]'"
    return ""


def _from_callable(make: Callable[[], Any], num_envs: int, vectorization: str) -> Any:
    # We choose SAME_STEP where we may: no row of a rollout is spent on a reset.
    if vectorization == "async":
        worker = _for_a_worker(make)
        return AsyncVectorEnv([worker] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    first = make()
    if not isinstance(first, gym.Env) or hasattr(first, "single_action_space"):
        return first
    if vectorization == "tensor":
        raise ValueError(
            f"vectorization = 'tensor', but the callable returned a {type(first).__name__}; expected a "
            "tensor environment, or use vectorization = 'sync'"
        )
    others = [make() for _ in range(num_envs - 1)]
    if any(other is first for other in others):
        raise ValueError(
            "the callable returned the same environment twice; expected a new one from every call, as "
            "in lambda: gym.make(...)"
        )
    made = iter([first, *others])
    return _sync([lambda: next(made)] * num_envs)


def _sync(makers: Sequence[Callable[[], gym.Env]]) -> SyncVectorEnv:
    first, *others = makers
    env = first()
    made = iter([env, *(make() for make in others)])
    makers = [lambda: next(made)] * len(makers)
    if isinstance(env.observation_space, spaces.Box):
        return SyncEnvs(makers)
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def _for_a_worker(make: Callable[[], Any]) -> Callable[[], Any]:
    """Make environments that live in a process of their own."""
    ours = os.getpid()

    def make_in_worker() -> Any:
        env = make()
        if os.getpid() == ours:
            return env
        # Ctrl-C reaches every process of a terminal; workers leave it to ours, which saves first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        step = env.step

        def step_and_keep(action: Any) -> tuple[Any, ...]:
            # The worker resets before it sends: an environment may reuse the array it returned.
            obs, reward, terminated, truncated, info = step(action)
            ended = terminated or truncated
            return deepcopy(obs) if ended else obs, reward, terminated, truncated, info

        env.step = step_and_keep
        return env

    return make_in_worker


def _is_envpool(env: Any) -> bool:
    return any("envpool" in base.__module__ for base in type(env).__mro__) and hasattr(
        env, "config"
    )


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
