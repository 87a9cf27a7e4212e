"""The recipes learn: slow enough to mark, short enough for every run of the tests."""

import pytest

from ppo_fast import PPO, evaluate, recipe

pytestmark = pytest.mark.slow


def test_cartpole_is_solved_within_100k_steps():
    # 77 of 80 seeds are there by then.
    model = PPO("CartPole-v1", config=recipe("CartPole-v1"), seed=2, stop_return=475.0)
    model.learn(100_000)
    assert model.reached_stop_return()
    assert model.num_timesteps <= 100_000


def test_pendulum_learns_which_needs_true_truncation():
    # Every episode is truncated: without the bootstrap the values are those of a shorter game.
    model = PPO("Pendulum-v1", config=recipe("Pendulum-v1"), seed=1)
    model.learn(60_000)
    assert evaluate(model, episodes=20).returns.mean() > -300
