"""The update phase alone: CleanRL's minibatch, our autograd loop, our explicit gradient.

Ours is timed by the trainer's own clock over whole updates (permutation, epochs, minibatches,
optimizer), on environments that return noise; all in turns in one process on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from harness import Timing, interleaved, timing_rows
from peers.cleanrl_style import Agent, Rows, new_optimizer, update
from peers.ours import PlainPolicy

from ppo_fast import PPO
from ppo_fast.config import ControlConfig

OURS, AUTOGRAD, CLEANRL = "ppo_fast", "ppo_fast, autograd", "CleanRL-style"


class Problem(NamedTuple):
    rows: int
    """of a minibatch"""
    obs_size: int
    hidden: tuple[int, ...]
    actions: int
    continuous: bool
    num_envs: int
    num_steps: int
    epochs: int

    @property
    def label(self) -> str:
        sizes = (self.obs_size, *self.hidden, self.actions)
        head = "Gaussian" if self.continuous else "categorical"
        return f"{self.rows} rows, {'-'.join(map(str, sizes))}, {head}"

    @property
    def config(self) -> ControlConfig:
        return ControlConfig(
            num_envs=self.num_envs,
            num_steps=self.num_steps,
            num_minibatches=self.num_envs * self.num_steps // self.rows,
            update_epochs=self.epochs,
            hidden_sizes=self.hidden,
            anneal_lr=False,
            torch_threads=1,
            device="cpu",
        )

    @property
    def minibatches(self) -> int:
        return self.epochs * self.config.num_minibatches


PROBLEMS = (
    Problem(256, 4, (64, 64), 2, False, 8, 128, 4),
    Problem(64, 17, (64, 64), 6, True, 8, 128, 4),
    Problem(4096, 17, (128, 128), 6, True, 128, 128, 1),
    Problem(32768, 4, (64, 64), 2, False, 1024, 128, 1),
)


class Noise(VectorEnv):
    """Observations and rewards that are noise, from a store; one episode in a hundred steps ends."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, problem: Problem) -> None:
        p = problem
        self.num_envs = p.num_envs
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (p.obs_size,), np.float32)
        self.single_action_space = (
            spaces.Box(-1.0, 1.0, (p.actions,), np.float32)
            if p.continuous
            else spaces.Discrete(p.actions)
        )
        self.observation_space = batch_space(self.single_observation_space, p.num_envs)
        self.action_space = batch_space(self.single_action_space, p.num_envs)
        draw = np.random.default_rng(0)
        self.obs = draw.standard_normal((16, p.num_envs, p.obs_size), np.float32)
        self.rewards = draw.standard_normal((16, p.num_envs))
        self.ended = draw.random((16, p.num_envs)) < 0.01
        self.at = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self.obs[0], {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.at = (self.at + 1) % 16
        going = np.zeros(self.num_envs, bool)
        return self.obs[self.at], self.rewards[self.at], self.ended[self.at], going, {}


def our_update(problem: Problem, explicit: bool) -> Callable[[], float]:
    """Return what runs one iteration and returns the seconds a minibatch of its update took."""
    config = problem.config
    policy = None
    if not explicit:
        policy = PPO(Noise(problem), config=config).policy
        policy.__class__ = PlainPolicy
    model = PPO(Noise(problem), policy, config=config)

    def sample() -> float:
        model.learn(config.num_steps * problem.num_envs)
        return model.metrics["time/update_seconds"] / problem.minibatches

    return sample


def cleanrl_update(problem: Problem) -> Callable[[], float]:
    p, config = problem, problem.config
    torch.manual_seed(1)
    agent = Agent(p.obs_size, p.actions, p.hidden, p.continuous)
    optimizer = new_optimizer(agent, config)
    size = p.num_envs * p.num_steps
    obs = torch.randn(size, p.obs_size)
    with torch.no_grad():
        actions, log_probs, _, values = agent.get_action_and_value(obs)
    advantages = torch.randn(size)
    rows = Rows(obs, actions, log_probs, advantages, advantages + values, values)
    shuffle = np.random.default_rng(1)

    def sample() -> float:
        start = time.perf_counter()
        update(agent, optimizer, config, rows, shuffle)
        return (time.perf_counter() - start) / p.minibatches

    return sample


def measure(rounds: int, problems: tuple[Problem, ...] = PROBLEMS) -> list[dict[str, Any]]:
    """Rows as `harness.timing_rows` makes them, a problem after another."""
    gym.logger.min_level = gym.logger.ERROR
    rows = []
    for problem in problems:
        samplers = {
            OURS: our_update(problem, explicit=True),
            AUTOGRAD: our_update(problem, explicit=False),
            CLEANRL: cleanrl_update(problem),
        }
        for sampler in samplers.values():
            sampler()  # to warm up
        samples = interleaved(samplers, rounds)
        timings = {name: Timing(tuple(found), 1) for name, found in samples.items()}
        rows += timing_rows(timings, OURS, problem=problem.label)
    return rows
