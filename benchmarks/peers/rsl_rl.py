"""rsl_rl's OnPolicyRunner on our tensor environments: continuous actions only.

It has no annealed learning rate, clips the gradients of actor and critic apart, and bootstraps a
truncated episode with the value of its last state but one.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

from peers import NotHere, Trained, Trainer, Watch
from ppo_fast.control.tensor_envs import make_tensor_env

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig


class TensorVecEnv(VecEnv):
    """A tensor environment under rsl_rl's interface; keeps the returns of finished episodes."""

    def __init__(self, env: Any, seed: int) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.num_actions = int(env.single_action_space.shape[0])
        self.max_episode_length = 200
        self.device = env.device
        self.cfg: dict[str, Any] = {}
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, device=env.device)
        bounds = env.single_action_space
        self.low = torch.as_tensor(bounds.low, device=env.device)
        self.high = torch.as_tensor(bounds.high, device=env.device)
        self.running = torch.zeros(self.num_envs, device=env.device)
        self.returns: deque[float] = deque(maxlen=100)
        self.obs, _ = env.reset(seed=seed)

    def get_observations(self) -> TensorDict:
        # The environment overwrites its buffer before the runner stores what it acted on.
        return TensorDict({"policy": self.obs.clone()}, batch_size=[self.num_envs])

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict[str, Any]]:
        clipped = torch.clamp(actions, self.low, self.high)
        self.obs, rewards, terminated, truncated, _ = self.env.step(clipped)
        rewards = rewards.float()
        done = terminated | truncated
        self.running += rewards
        if done.any():
            self.returns.extend(self.running[done].tolist())
            self.running[done] = 0.0
        return self.get_observations(), rewards, done, {"time_outs": truncated.float()}


class _Stop(Exception):
    pass


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Make the runner on the tensor form of an environment id.

    Raises:
        NotHere: discrete actions.
    """
    c = config
    torch.manual_seed(c.seed)
    device = "cpu" if c.device == "auto" else c.device
    env = make_tensor_env(env_id, c.num_envs or 8, device=device)
    if not hasattr(env.single_action_space, "low"):
        raise NotHere("has continuous actions only")
    envs = TensorVecEnv(env, c.seed)
    network = {
        "class_name": "MLPModel",
        "hidden_dims": list(c.hidden_sizes),
        "activation": c.activation,
        "obs_normalization": c.norm_obs,
    }
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "log"}
    settings = {
        "num_steps_per_env": c.num_steps,
        "save_interval": 10**9,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "multi_gpu": None,
        "actor": {**network, "distribution_cfg": gaussian},
        "critic": dict(network),
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": c.update_epochs,
            "num_mini_batches": c.num_minibatches,
            "clip_param": c.clip_coef,
            "gamma": c.gamma,
            "lam": c.gae_lambda,
            # Its value loss has no 1/2.
            "value_loss_coef": c.vf_coef / 2,
            "entropy_coef": c.ent_coef,
            "learning_rate": c.learning_rate,
            "max_grad_norm": c.max_grad_norm,
            "use_clipped_value_loss": c.vf_clip_coef is not None,
            "schedule": "fixed" if c.adaptive_lr_kl is None else "adaptive",
            "desired_kl": c.adaptive_lr_kl,
            "normalize_advantage_per_mini_batch": c.norm_adv == "minibatch",
            "rnd_cfg": None,
            "symmetry_cfg": None,
        },
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its networks
        runner = OnPolicyRunner(envs, settings, log_dir=None, device=device)
    batch_size = envs.num_envs * c.num_steps

    def train(total_timesteps: int, watch: Watch) -> Trained:
        steps = 0
        update = runner.alg.update

        def update_and_tell() -> dict[str, float]:
            nonlocal steps
            losses = update()
            steps += batch_size
            if watch(steps, envs.returns):
                raise _Stop
            return losses

        runner.alg.update = update_and_tell
        with contextlib.suppress(_Stop):
            runner.learn(-(-total_timesteps // batch_size))
        return Trained(steps, list(envs.returns), {})

    return train
