"""Stable-Baselines3's PPO with our settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from torch import nn

from peers import Trained, Trainer, Watch

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Iterations(BaseCallback):
    """Calls `watch` after every update: SB3 tells of the start of the next rollout."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.stopped = False

    def tell(self) -> None:
        returns = [float(episode["r"]) for episode in self.model.ep_info_buffer or ()]
        self.stopped = self.watch(self.model.num_timesteps, returns)

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps:
            self.tell()

    def _on_step(self) -> bool:
        return not self.stopped

    def _on_training_end(self) -> None:
        if not self.stopped:
            self.tell()


def environments(env_id: str, config: ControlConfig) -> VecEnv:
    """Make a `DummyVecEnv`, SB3's default, with its own wrappers for Atari and normalisation."""
    num_envs = config.num_envs or 8
    if env_id.endswith("NoFrameskip-v4"):
        import ale_py
        import gymnasium as gym

        gym.register_envs(ale_py)
        envs = make_vec_env(env_id, num_envs, seed=config.seed, wrapper_class=AtariWrapper)
        return VecTransposeImage(VecFrameStack(envs, n_stack=4))
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
    return envs


def settings(config: ControlConfig) -> dict[str, Any]:
    """Translate everything but the policy; `sbx` takes the same."""
    rate, clip = config.learning_rate, config.clip_coef
    return {
        "learning_rate": (lambda left: left * rate) if config.anneal_lr else rate,
        "n_steps": config.num_steps,
        "batch_size": (config.num_envs or 8) * config.num_steps // config.num_minibatches,
        "n_epochs": config.update_epochs,
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "clip_range": (lambda left: left * clip) if config.anneal_clip else clip,
        "clip_range_vf": config.vf_clip_coef,
        "normalize_advantage": config.norm_adv == "minibatch",
        "ent_coef": config.ent_coef,
        # Its value loss has no 1/2.
        "vf_coef": config.vf_coef / 2,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "device": "cpu",
    }


def trainer(model: Any, envs: VecEnv) -> Trainer:
    """Return the function that trains an SB3 or SBX model."""

    def train(total_timesteps: int, watch: Watch) -> Trained:
        model.learn(total_timesteps, Iterations(watch))
        returns = [float(episode["r"]) for episode in model.ep_info_buffer or ()]
        envs.close()
        return Trained(model.num_timesteps, returns, {})

    return train


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Make SB3's trainer.

    Its value clip has no maximum with the unclipped error: same work, slightly different value.
    """
    envs = environments(env_id, config)
    layers = list(config.hidden_sizes)
    policy: dict[str, Any] = {"ortho_init": config.ortho_init}
    if not env_id.endswith("NoFrameskip-v4"):
        # On images its CnnPolicy is the NatureCNN and a linear head each, as ours is.
        policy["net_arch"] = {"pi": layers, "vf": layers}
        policy["activation_fn"] = ACTIVATIONS[config.activation]
    kind = "CnnPolicy" if env_id.endswith("NoFrameskip-v4") else "MlpPolicy"
    model = PPO(kind, envs, policy_kwargs=policy, **settings(config))
    return trainer(model, envs)
