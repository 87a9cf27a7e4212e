"""An eager PPO loop in the manner of CleanRL's scripts: what people write who copy a single file.

After ppo.py for discrete actions, ppo_continuous_action.py for continuous ones with its wrappers,
and ppo_atari_envpool.py in how EnvPool is driven. Like its models it draws from torch.distributions,
walks GAE backwards one step at a time, reads its diagnostics out of every minibatch, and takes every
end of an episode for a termination.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from peers import Trained, Trainer, Watch

if TYPE_CHECKING:
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
    """Actor and critic over flat observations.

    Args:
        obs_size: features of an observation.
        actions: number of choices, or of components where `continuous`.
        hidden: widths of the hidden layers.
        continuous: Gaussian actions with a learnt standard deviation.
    """

    def __init__(
        self, obs_size: int, actions: int, hidden: tuple[int, ...], continuous: bool = False
    ) -> None:
        super().__init__()
        self.actor = network(obs_size, hidden, actions, 0.01)
        self.critic = network(obs_size, hidden, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(1, actions)) if continuous else None

    def get_value(self, obs: Tensor) -> Tensor:
        return self.critic(obs).flatten()

    def get_action_and_value(
        self, obs: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.log_std is None:
            policy = Categorical(logits=self.actor(obs))
            if action is None:
                action = policy.sample()
            return action, policy.log_prob(action), policy.entropy(), self.get_value(obs)
        mean = self.actor(obs)
        gaussian = Normal(mean, torch.exp(self.log_std.expand_as(mean)))
        if action is None:
            action = gaussian.sample()
        log_prob, entropy = gaussian.log_prob(action).sum(1), gaussian.entropy().sum(1)
        return action, log_prob, entropy, self.get_value(obs)


class Rows(NamedTuple):
    """A rollout laid flat; actions are integers where discrete."""

    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


def new_optimizer(agent: Agent, config: ControlConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        agent.parameters(), lr=config.learning_rate, eps=config.adam_eps, foreach=True
    )


def minibatch(
    agent: Agent, optimizer: torch.optim.Adam, c: ControlConfig, data: Rows, rows: np.ndarray
) -> float:
    """Take one optimizer step on these rows; return the clip fraction."""
    _, new_log_prob, entropy, new_value = agent.get_action_and_value(
        data.obs[rows], data.actions[rows]
    )
    log_ratio = new_log_prob - data.log_probs[rows]
    ratio = log_ratio.exp()
    with torch.no_grad():
        _old_approx_kl = (-log_ratio).mean()
        _approx_kl = ((ratio - 1) - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > c.clip_coef).float().mean().item()

    advantage = data.advantages[rows]
    if c.norm_adv == "minibatch":
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    limited = torch.clamp(ratio, 1 - c.clip_coef, 1 + c.clip_coef)
    policy_loss = torch.max(-advantage * ratio, -advantage * limited).mean()

    error = (new_value - data.returns[rows]) ** 2
    if c.vf_clip_coef is not None:
        change = new_value - data.values[rows]
        near = data.values[rows] + change.clamp(-c.vf_clip_coef, c.vf_clip_coef)
        error = torch.max(error, (near - data.returns[rows]) ** 2)
    value_loss = 0.5 * error.mean()
    loss = policy_loss - c.ent_coef * entropy.mean() + c.vf_coef * value_loss

    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), c.max_grad_norm)
    optimizer.step()
    return clip_fraction


def update(
    agent: Agent,
    optimizer: torch.optim.Adam,
    c: ControlConfig,
    data: Rows,
    shuffle: np.random.Generator,
) -> None:
    """All epochs and minibatches over a rollout, then the explained variance."""
    batch_size = len(data.values)
    minibatch_size = batch_size // c.num_minibatches
    index = np.arange(batch_size)
    clip_fractions = []
    for _ in range(c.update_epochs):
        shuffle.shuffle(index)
        for start in range(0, batch_size, minibatch_size):
            rows = index[start : start + minibatch_size]
            clip_fractions.append(minibatch(agent, optimizer, c, data, rows))
    _clip_fraction = np.mean(clip_fractions)
    predicted, true = data.values.numpy(), data.returns.numpy()
    _explained_variance = 1 - np.var(true - predicted) / np.var(true)


class Environments:
    """Environments of one backend, and the returns of their finished episodes."""

    def __init__(self, env_id: str, c: ControlConfig, backend: str) -> None:
        self.num_envs = c.num_envs or 8
        self.returns: deque[float] = deque(maxlen=100)
        self.running = np.zeros(self.num_envs)
        self.seed = c.seed
        self.same_step = backend == "sync"
        if backend == "sync":
            # One by one, resetting within the step, as ppo.py was written for.
            self.envs: Any = SyncVectorEnv(
                [lambda: self._wrapped(env_id, c) for _ in range(self.num_envs)],
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
        elif c.norm_obs or c.norm_reward:
            raise ValueError(f"backend = {backend!r} has no normalisation; use 'sync'")
        elif backend == "native":
            self.envs = gym.make_vec(env_id, self.num_envs, vectorization_mode="vector_entry_point")
        elif backend == "envpool":
            import envpool

            self.envs = envpool.make(
                env_id, env_type="gymnasium", num_envs=self.num_envs, seed=c.seed, num_threads=1
            )
        else:
            raise ValueError(f"backend = {backend!r}; expected 'sync', 'native' or 'envpool'")
        pool = backend == "envpool"
        spaces = self.envs if pool else None
        self.obs_space = spaces.observation_space if pool else self.envs.single_observation_space
        self.action_space = spaces.action_space if pool else self.envs.single_action_space
        self.pool = pool

    @staticmethod
    def _wrapped(env_id: str, c: ControlConfig) -> gym.Env:
        env: gym.Env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.ClipAction(env)
        if c.norm_obs:
            env = gym.wrappers.NormalizeObservation(env)
            space = env.observation_space
            limit = c.clip_obs
            env = gym.wrappers.TransformObservation(
                env, lambda obs: np.clip(obs, -limit, limit), space
            )
        if c.norm_reward:
            env = gym.wrappers.NormalizeReward(env, gamma=c.gamma)
            bound = c.clip_reward
            env = gym.wrappers.TransformReward(env, lambda r: np.clip(r, -bound, bound))
        return env

    def reset(self) -> np.ndarray:
        return (self.envs.reset() if self.pool else self.envs.reset(seed=self.seed))[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return observations, rewards and ends of episodes."""
        obs, rewards, terminated, truncated, info = self.envs.step(actions)
        done = np.logical_or(terminated, truncated)
        if self.same_step:
            if "final_info" in info:
                episode = info["final_info"]["episode"]
                self.returns.extend(episode["r"][info["_final_info"]].tolist())
        else:
            self.running += rewards
            self.returns.extend(self.running[done].tolist())
            self.running[done] = 0.0
        return obs, rewards, done


def build(env_id: str, config: ControlConfig, *, backend: str = "sync") -> Trainer:
    """Make the loop.

    Args:
        env_id: a Gymnasium id, which EnvPool shares.
        config: what is not CleanRL's is not looked at.
        backend: "sync" (one by one, resetting within the step), "native" (the id's own vector form)
            or "envpool"; the latter two reset in a step of its own.
    """
    c = config
    torch.manual_seed(c.seed)
    shuffle = np.random.default_rng(c.seed)
    envs = Environments(env_id, c, backend)
    num_envs = envs.num_envs
    obs_size = int(np.prod(envs.obs_space.shape or ()))
    continuous = isinstance(envs.action_space, gym.spaces.Box)
    shape = envs.action_space.shape if continuous else ()
    choices = int(np.prod(shape)) if continuous else int(envs.action_space.n)
    agent = Agent(obs_size, choices, tuple(c.hidden_sizes), continuous)
    optimizer = new_optimizer(agent, c)
    batch_size = num_envs * c.num_steps

    obs = torch.zeros(c.num_steps, num_envs, obs_size)
    actions = torch.zeros((c.num_steps, num_envs, *shape))
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

    def flat(advantages: Tensor) -> Rows:
        flat_actions = actions.reshape(batch_size, *shape)
        return Rows(
            obs.reshape(batch_size, obs_size),
            flat_actions if continuous else flat_actions.long(),
            log_probs.reshape(-1),
            advantages.reshape(-1),
            (advantages + values).reshape(-1),
            values.reshape(-1),
        )

    def train(total_timesteps: int, watch: Watch) -> Trained:
        iterations = -(-total_timesteps // batch_size)
        next_obs = torch.Tensor(envs.reset()).reshape(num_envs, obs_size)
        next_done = torch.zeros(num_envs)
        steps = 0
        for iteration in range(iterations):
            if c.anneal_lr:
                left = 1.0 - iteration / iterations
                optimizer.param_groups[0]["lr"] = left * c.learning_rate
            for t in range(c.num_steps):
                obs[t], dones[t] = next_obs, next_done
                with torch.no_grad():
                    action, log_prob, _, value = agent.get_action_and_value(next_obs)
                actions[t], log_probs[t], values[t] = action, log_prob, value
                seen, reward, done = envs.step(action.numpy())
                rewards[t] = torch.tensor(reward)
                next_obs = torch.Tensor(seen).reshape(num_envs, obs_size)
                next_done = torch.Tensor(done)
            update(agent, optimizer, c, flat(advantages_of(next_obs, next_done)), shuffle)
            steps += batch_size
            if watch(steps, envs.returns):
                break
        envs.envs.close()
        return Trained(steps, list(envs.returns), {})

    return train
