"""Settings that solve well-known environments; `ppo-fast train ID` starts from them.

From rl-zoo3's hyperparams/ppo.yml (vf_coef doubled, since our value loss has a factor 1/2 and SB3's
has none) and CleanRL's scripts; a comment says what differs, and what for. `make learn` measures
them.
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
    # rl-zoo3 with half its 20 epochs and value weight, and twice its learning rate of 1e-3: as many
    # steps to solved, in 60 % of the time.
    "CartPole-v1": {
        **_ZOO,
        "num_envs": 8,
        "num_steps": 32,
        "num_minibatches": 1,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "update_epochs": 10,
        "learning_rate": 2e-3,
        "anneal_lr": True,
        "anneal_clip": True,
        "vf_coef": 0.5,
    },
    # rl-zoo3 with half its 256 steps, minibatches of 256 instead of 64, and an annealed learning
    # rate of 1e-3 instead of 3e-4: two thirds of the steps to -100, in half the time.
    "Acrobot-v1": {
        **_ZOO,
        "num_envs": 16,
        "num_steps": 128,
        "num_minibatches": 8,
        "gae_lambda": 0.94,
        "update_epochs": 4,
        "learning_rate": 1e-3,
        "anneal_lr": True,
        "norm_obs": True,
        "norm_reward": True,
    },
    # rl-zoo3 without its gSDE; instead rewards are normalised, and 8 environments of 256 steps make
    # twice as many updates from minibatches of 128 as its 4 of 1024 do from 64. At a learning rate that
    # is not annealed one seed in five forgets what it had learnt.
    "Pendulum-v1": {
        **_ZOO,
        "num_envs": 8,
        "num_steps": 256,
        "num_minibatches": 16,
        "gamma": 0.9,
        "learning_rate": 1e-3,
        "anneal_lr": True,
        "norm_reward": True,
    },
    # rl-zoo3's 16 environments and entropy weight. Rewards of -100 and +100 are normalised, so that the
    # critic keeps up; 8 epochs instead of 4 over 256 steps instead of 1024, in minibatches of 256
    # instead of 64, at an annealed learning rate of 1e-3 instead of 3e-4. Four epochs need 750 to 850
    # thousand steps to 200, eight 180 to 300; rl-zoo3's gamma of 0.999 learns more slowly.
    "LunarLander-v3": {
        **_ZOO,
        "num_envs": 16,
        "num_steps": 256,
        "num_minibatches": 16,
        "gae_lambda": 0.95,
        "gamma": 0.99,
        "update_epochs": 8,
        "ent_coef": 0.01,
        "learning_rate": 1e-3,
        "anneal_lr": True,
        "vf_coef": 0.5,
        "norm_reward": True,
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
