"""A toy MDP whose every transition is known, as single, vector and tensor environments.

Position p moves up by 1 + action, reward 10 p + action. An episode ends by termination at p >= 7
and by truncation after 4 steps; some end by both at once. Episodes start at 0, 1, 2, 0, 1, 2, ...
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import nn

GOAL, LIMIT, STARTS = 7, 4, 3


def advance(position, action, steps):
    """(next position, reward, terminated, truncated) of one transition."""
    following = position + 1 + action
    return following, 10.0 * position + action, following >= GOAL, steps + 1 >= LIMIT


def policy_action(position):
    """The action the test policy takes: moves by two from every third position."""
    return 1 if position % 3 == 2 else 0


def value_of(position):
    """The test critic: any fixed function will do."""
    return float(np.sin(1.7 * position) * 5.0)


def transitions(count):
    """The first `count` transitions any one environment makes under `policy_action`."""
    rows, episode = [], 0
    position, steps = 0, 0
    while len(rows) < count:
        action = policy_action(position)
        following, reward, terminated, truncated = advance(position, action, steps)
        rows.append((position, action, reward, following, terminated, truncated))
        position, steps = following, steps + 1
        if terminated or truncated:
            episode += 1
            position, steps = episode % STARTS, 0
    return rows


class Chain(gym.Env):
    observation_space = spaces.Box(-100, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.position, self.steps = self.episode % STARTS, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.position], np.float32)

    def step(self, action):
        self.position, reward, terminated, truncated = advance(
            self.position, int(action), self.steps
        )
        self.steps += 1
        return self._obs(), reward, terminated, truncated, {}


class TensorChain:
    """N chains in torch, resetting within the step."""

    def __init__(self, num_envs, *, style="gymnasium", final=True):
        self.num_envs = num_envs
        self.single_observation_space = Chain.observation_space
        self.single_action_space = Chain.action_space
        self.device = torch.device("cpu")
        self.style, self.final = style, final

    def reset(self, seed=None):
        self.episode = torch.zeros(self.num_envs, dtype=torch.int64)
        self.position = self.episode % STARTS
        self.steps = torch.zeros(self.num_envs, dtype=torch.int64)
        return self.position[:, None].float(), {}

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        rewards = 10.0 * self.position + actions
        last = self.position + 1 + actions
        self.steps += 1
        terminated, truncated = last >= GOAL, self.steps >= LIMIT
        done = terminated | truncated
        self.episode += done
        self.position = torch.where(done, self.episode % STARTS, last)
        self.steps = torch.where(done, 0, self.steps)
        obs, info = self.position[:, None].float(), {}
        if self.final:
            info["final_obs"] = last[:, None].float()
        if self.style == "rsl_rl":
            info["time_outs"] = truncated & ~terminated
            return obs, rewards, done.long(), info
        return obs, rewards, terminated, truncated, info


class NativeChain(gym.vector.VectorEnv):
    """N chains in numpy that reset on the step after an episode's end, as native CartPole does."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = (
            Chain.observation_space,
            Chain.action_space,
        )
        self.chains = [Chain() for _ in range(num_envs)]

    def reset(self, *, seed=None, options=None):
        self.over = np.zeros(self.num_envs, bool)
        return np.stack([chain.reset()[0] for chain in self.chains]), {}

    def step(self, actions):
        rows = [
            (chain.reset()[0], 0.0, False, False) if over else chain.step(action)[:4]
            for chain, over, action in zip(self.chains, self.over, actions, strict=True)
        ]
        obs, rewards, terminated, truncated = (
            np.array(column) for column in zip(*rows, strict=True)
        )
        self.over = terminated | truncated
        return obs, rewards, terminated, truncated, {}


class ChainPolicy(nn.Module):
    """`policy_action` with near certainty, and `value_of`."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, obs):
        position = obs[:, 0]
        moves = (position % 3 == 2).float()
        logits = torch.stack([50.0 * (1 - moves), 50.0 * moves], -1)
        return logits + self.unused, torch.sin(1.7 * position) * 5.0
