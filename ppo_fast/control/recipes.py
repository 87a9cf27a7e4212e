"""Settings that solve well-known environments; `ppo-fast train ID` starts from them.

From rl-zoo3's hyperparams/ppo.yml (vf_coef doubled, since our value loss has a factor 1/2 and SB3's
has none) and CleanRL's scripts, adjusted where noted.
"""

from __future__ import annotations

from typing import Any

from ppo_fast.config import ControlConfig

_ZOO: dict[str, Any] = {
    "learning_rate": 3e-4,
    "anneal_lr": False,
    "vf_coef": 1.0,
    "vf_clip_coef": None,
    "ent_coef": 0.0,
    "update_epochs": 10,
}

RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        **_ZOO,
        "num_envs": 8,
        "num_steps": 32,
        "num_minibatches": 1,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "update_epochs": 20,
        "learning_rate": 1e-3,
        "anneal_lr": True,
        "anneal_clip": True,
    },
    "Acrobot-v1": {
        **_ZOO,
        "num_envs": 16,
        "num_steps": 256,
        "num_minibatches": 64,
        "gae_lambda": 0.94,
        "update_epochs": 4,
        "norm_obs": True,
        "norm_reward": True,
    },
    "Pendulum-v1": {
        **_ZOO,
        "num_envs": 4,
        "num_steps": 1024,
        "num_minibatches": 64,
        "gamma": 0.9,
        "learning_rate": 1e-3,
    },
    "LunarLander-v3": {
        **_ZOO,
        "num_envs": 16,
        "num_steps": 1024,
        "num_minibatches": 256,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "update_epochs": 4,
        "ent_coef": 0.01,
    },
    # CleanRL's ppo_continuous_action.py.
    "HalfCheetah-v5": {
        "num_envs": 1,
        "num_steps": 2048,
        "num_minibatches": 32,
        "update_epochs": 10,
        "learning_rate": 3e-4,
        "ent_coef": 0.0,
        "norm_obs": True,
        "norm_reward": True,
    },
}


def recipe(env_id: str) -> ControlConfig:
    """Return the recipe of an environment id, or the defaults where there is none."""
    return ControlConfig(**RECIPES.get(env_id, {}))
