"""Stable-Baselines3's PPO with our settings."""

from __future__ import annotations

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from peers import Trained, Trainer
from ppo_fast.config import ControlConfig

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Make SB3's trainer on a `DummyVecEnv`, its default.

    Its value loss has no 1/2, so vf_coef is halved. Its value clip has no maximum with the unclipped
    error: same work, slightly different value.
    """
    num_envs = config.num_envs or 8
    envs = make_vec_env(env_id, num_envs, seed=config.seed)
    if config.norm_obs or config.norm_reward:
        envs = VecNormalize(
            envs,
            norm_obs=config.norm_obs,
            norm_reward=config.norm_reward,
            clip_obs=config.clip_obs,
            clip_reward=config.clip_reward,
            gamma=config.gamma,
        )
    rate, clip = config.learning_rate, config.clip_coef
    layers = list(config.hidden_sizes)
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=(lambda left: left * rate) if config.anneal_lr else rate,
        n_steps=config.num_steps,
        batch_size=num_envs * config.num_steps // config.num_minibatches,
        n_epochs=config.update_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=(lambda left: left * clip) if config.anneal_clip else clip,
        clip_range_vf=config.vf_clip_coef,
        normalize_advantage=config.norm_adv == "minibatch",
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef / 2,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={
            "net_arch": {"pi": layers, "vf": layers},
            "activation_fn": ACTIVATIONS[config.activation],
            "ortho_init": config.ortho_init,
        },
        seed=config.seed,
        device="cpu",
    )

    def train(total_timesteps: int) -> Trained:
        model.learn(total_timesteps)
        returns = [float(episode["r"]) for episode in model.ep_info_buffer or ()]
        envs.close()
        return Trained(model.num_timesteps, returns, {})

    return train
