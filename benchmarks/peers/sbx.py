"""SBX, Stable-Baselines3's algorithms in JAX, with our settings.

It has no value clip, and clips the gradient of actor and critic apart. Its JAX functions are
compiled when first called, so that its first iteration takes seconds longer than the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from flax import linen
from gymnasium.vector import AutoresetMode, VectorEnv
from sbx import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from peers import Trainer
from peers.sb3 import environments, settings, trainer

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig

ACTIVATIONS = {"tanh": linen.tanh, "relu": linen.relu}


class NativeVecEnv(VecEnv):
    """A Gymnasium vector environment of the NEXT_STEP kind under SB3's interface.

    Stepping a thousand environments one by one would time Python's loop; this leaves one row an
    episode that is no transition, as EnvPool does.
    """

    def __init__(self, envs: VectorEnv, seed: int) -> None:
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs = envs
        self.first_seed = seed
        self.actions: np.ndarray | None = None

    def reset(self) -> np.ndarray:
        return self.envs.reset(seed=self.first_seed)[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[Any, ...]:
        obs, rewards, terminated, truncated, _ = self.envs.step(self.actions)
        # SB3 writes into each environment's info.
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        return obs, rewards.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        self.envs.close()

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.envs, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **more: Any) -> list:
        raise NotImplementedError


def native(env_id: str, config: ControlConfig) -> VecEnv:
    envs = gym.make_vec(env_id, config.num_envs or 8, vectorization_mode="vector_entry_point")
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise ValueError(f"{env_id} resets by {mode}; expected {AutoresetMode.NEXT_STEP}")
    return VecMonitor(NativeVecEnv(envs, config.seed))


def build(env_id: str, config: ControlConfig, *, backend: str = "sync") -> Trainer:
    """Make SBX's trainer on environments stepped one by one ("sync") or by their "native" form."""
    envs = native(env_id, config) if backend == "native" else environments(env_id, config)
    layers = list(config.hidden_sizes)
    policy = {
        "net_arch": {"pi": layers, "vf": layers},
        "activation_fn": ACTIVATIONS[config.activation],
        "ortho_init": config.ortho_init,
    }
    constants = {**settings(config), "clip_range_vf": None}
    return trainer(PPO("MlpPolicy", envs, policy_kwargs=policy, **constants), envs)
