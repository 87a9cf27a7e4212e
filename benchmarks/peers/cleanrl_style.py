"""An eager PPO loop in the manner of CleanRL's ppo.py: what people write who copy a single file.

Discrete actions only. Like its model it draws from torch.distributions, walks GAE backwards one
step at a time, reads its diagnostics out of every minibatch, and takes every end of an episode for
a termination.
"""

from __future__ import annotations

from collections import deque

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from peers import Trained, Trainer
from ppo_fast.config import ControlConfig


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.constant_(layer.bias, 0.0)
    return layer


def network(inputs: int, hidden: tuple[int, ...], outputs: int, gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [linear(inputs, width, 2**0.5), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, linear(inputs, outputs, gain))


class Agent(nn.Module):
    def __init__(self, obs_size: int, actions: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.actor = network(obs_size, hidden, actions, 0.01)
        self.critic = network(obs_size, hidden, 1, 1.0)

    def get_value(self, obs: Tensor) -> Tensor:
        return self.critic(obs).flatten()

    def get_action_and_value(
        self, obs: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        policy = Categorical(logits=self.actor(obs))
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), self.get_value(obs)


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Make the loop on a `SyncVectorEnv` that resets within the step."""
    c = config
    num_envs = c.num_envs or 8
    torch.manual_seed(c.seed)
    shuffle = np.random.default_rng(c.seed)
    envs = SyncVectorEnv(
        [lambda: gym.make(env_id) for _ in range(num_envs)],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    obs_size = int(np.prod(envs.single_observation_space.shape or ()))
    agent = Agent(obs_size, int(envs.single_action_space.n), c.hidden_sizes)  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=c.learning_rate, eps=c.adam_eps, foreach=True
    )
    batch_size = num_envs * c.num_steps
    minibatch_size = batch_size // c.num_minibatches
    finished: deque[float] = deque(maxlen=100)

    obs = torch.zeros(c.num_steps, num_envs, obs_size)
    actions = torch.zeros(c.num_steps, num_envs)
    log_probs = torch.zeros(c.num_steps, num_envs)
    rewards = torch.zeros(c.num_steps, num_envs)
    dones = torch.zeros(c.num_steps, num_envs)
    values = torch.zeros(c.num_steps, num_envs)

    def advantages_of(next_obs: Tensor, next_done: Tensor) -> Tensor:
        with torch.no_grad():
            following = agent.get_value(next_obs)
            advantages = torch.zeros_like(rewards)
            running = torch.zeros(num_envs)
            going = 1.0 - next_done
            for t in range(c.num_steps - 1, -1, -1):
                delta = rewards[t] + c.gamma * following * going - values[t]
                running = delta + c.gamma * c.gae_lambda * going * running
                advantages[t] = running
                following, going = values[t], 1.0 - dones[t]
        return advantages

    def update(advantages: Tensor) -> None:
        flat_obs = obs.reshape(batch_size, obs_size)
        flat_actions, flat_log_probs = actions.reshape(-1), log_probs.reshape(-1)
        flat_values, flat_advantages = values.reshape(-1), advantages.reshape(-1)
        flat_returns = flat_advantages + flat_values
        index = np.arange(batch_size)
        clip_fractions = []
        for _ in range(c.update_epochs):
            shuffle.shuffle(index)
            for start in range(0, batch_size, minibatch_size):
                rows = index[start : start + minibatch_size]
                _, new_log_prob, entropy, new_value = agent.get_action_and_value(
                    flat_obs[rows], flat_actions.long()[rows]
                )
                log_ratio = new_log_prob - flat_log_probs[rows]
                ratio = log_ratio.exp()
                with torch.no_grad():
                    _approx_kl = ((ratio - 1) - log_ratio).mean()
                    clipped = (ratio - 1).abs() > c.clip_coef
                    clip_fractions.append(clipped.float().mean().item())

                advantage = flat_advantages[rows]
                if c.norm_adv == "minibatch":
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                limited = torch.clamp(ratio, 1 - c.clip_coef, 1 + c.clip_coef)
                policy_loss = torch.max(-advantage * ratio, -advantage * limited).mean()

                error = (new_value - flat_returns[rows]) ** 2
                if c.vf_clip_coef is not None:
                    change = new_value - flat_values[rows]
                    near = flat_values[rows] + change.clamp(-c.vf_clip_coef, c.vf_clip_coef)
                    error = torch.max(error, (near - flat_returns[rows]) ** 2)
                value_loss = 0.5 * error.mean()
                loss = policy_loss - c.ent_coef * entropy.mean() + c.vf_coef * value_loss

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), c.max_grad_norm)
                optimizer.step()
        predicted, true = flat_values.numpy(), flat_returns.numpy()
        _explained_variance = 1 - np.var(true - predicted) / np.var(true)

    def train(total_timesteps: int) -> Trained:
        iterations = -(-total_timesteps // batch_size)
        first, _ = envs.reset(seed=c.seed)
        next_obs, next_done = torch.Tensor(first), torch.zeros(num_envs)
        running = np.zeros(num_envs)
        for iteration in range(iterations):
            if c.anneal_lr:
                left = 1.0 - iteration / iterations
                optimizer.param_groups[0]["lr"] = left * c.learning_rate
            for t in range(c.num_steps):
                obs[t], dones[t] = next_obs, next_done
                with torch.no_grad():
                    action, log_prob, _, value = agent.get_action_and_value(next_obs)
                actions[t], log_probs[t], values[t] = action, log_prob, value
                seen, reward, terminated, truncated, _ = envs.step(action.numpy())
                done = np.logical_or(terminated, truncated)
                rewards[t] = torch.tensor(reward)
                next_obs, next_done = torch.Tensor(seen), torch.Tensor(done)
                running += reward
                finished.extend(running[done].tolist())
                running[done] = 0.0
            update(advantages_of(next_obs, next_done))
        envs.close()
        return Trained(iterations * batch_size, list(finished), {})

    return train
