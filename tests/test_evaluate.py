"""Evaluation plays whole episodes, equally many everywhere, and changes nothing."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from test_envs import Haunted
from test_episodes import true_episodes

from ppo_fast import PPO, evaluate
from ppo_fast.control.evaluate import record_video

SMALL = {"num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
BACKENDS = {
    "next_step": lambda n: SyncVectorEnv([Chain] * n, autoreset_mode=AutoresetMode.NEXT_STEP),
    "same_step": lambda n: SyncVectorEnv([Chain] * n, autoreset_mode=AutoresetMode.SAME_STEP),
    "disabled": lambda n: SyncVectorEnv([Chain] * n, autoreset_mode=AutoresetMode.DISABLED),
    "async": lambda n: AsyncVectorEnv([Chain] * n, autoreset_mode=AutoresetMode.SAME_STEP),
    "native": NativeChain,
    "native with rewards in resets": Haunted,
    "tensor": TensorChain,
    "rsl_rl": lambda n: TensorChain(n, style="rsl_rl"),
}


@pytest.fixture(scope="module")
def chain_model():
    return PPO(Chain, ChainPolicy(), num_envs=1, **SMALL)


@pytest.mark.parametrize("name", BACKENDS)
def test_returns_and_lengths_are_exact_in_every_mode(chain_model, name):
    env = BACKENDS[name](3)
    result = evaluate(chain_model, env, episodes=8)
    want = sorted(true_episodes(3) * 2 + true_episodes(2))  # two environments play 3, one plays 2
    assert sorted(zip(result.returns, result.lengths, strict=True)) == want
    if hasattr(env, "close"):
        env.close()


def test_short_episodes_are_not_over_represented():
    class Either(gym.Env):
        """Every other environment's episodes are ten times as long, and worth ten times as much."""

        observation_space, action_space = spaces.Box(0, 1, (1,)), spaces.Discrete(2)

        def __init__(self, limit):
            self.limit = limit

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), 1.0, self.t >= self.limit, False, {}

    env = SyncVectorEnv([lambda: Either(2), lambda: Either(20)])
    result = evaluate(PPO(env, **SMALL), env, episodes=10)
    assert sorted(result.lengths) == [2] * 5 + [20] * 5 and result.returns.mean() == 11


def test_the_models_own_id_is_made_anew_and_its_environments_are_left_alone():
    model = PPO("CartPole-v1", num_envs=2, vectorization="native", **SMALL).learn(16)
    before = model.envs.env.state.copy()
    obs = model.collector.rollout.inputs[-1].clone()
    result = evaluate(model, episodes=3)
    assert len(result.returns) == 3 and (result.returns == result.lengths).all()
    np.testing.assert_array_equal(model.envs.env.state, before)
    assert torch.equal(model.collector.rollout.inputs[-1], obs)


def test_the_same_seed_plays_the_same_episodes_and_another_others():
    model = PPO("CartPole-v1", num_envs=2, **SMALL)
    first, again, other = (evaluate(model, episodes=4, seed=s).returns for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("env", [Chain, lambda: Chain(), Chain()])
def test_classes_callables_and_instances_are_environments_too(chain_model, env):
    assert len(evaluate(chain_model, env, episodes=3).returns) == 3


def test_what_it_made_is_closed_and_what_it_was_given_is_not(chain_model):
    closed = []

    class Closing(Chain):
        def close(self):
            closed.append(self)

    env = Closing()
    evaluate(chain_model, env, episodes=1)
    assert closed == []
    evaluate(chain_model, Closing, episodes=1)
    assert len(closed) == 8


def test_deterministic_evaluation_draws_no_random_numbers():
    model = PPO("CartPole-v1", num_envs=2, **SMALL)
    state = model.generator.get_state()
    evaluate(model, episodes=2)
    assert torch.equal(model.generator.get_state(), state)
    evaluate(model, episodes=2, deterministic=False)
    assert not torch.equal(model.generator.get_state(), state)


def test_action_masks_hold_in_evaluation():
    class Guarded(Chain):
        def action_masks(self):
            return np.array([False, True])

        def step(self, action):
            assert action == 1
            return super().step(action)

    model = PPO(Guarded, num_envs=2, **SMALL)
    assert len(evaluate(model, Guarded, episodes=4).returns) == 4


def test_the_summary_names_mean_spread_and_length(chain_model):
    result = evaluate(chain_model, Chain(), episodes=3)
    spread = result.returns.std(ddof=1)
    assert str(result) == (
        f"return {result.returns.mean():.2f} +- {spread:.2f} over 3 episodes, "
        f"mean length {result.lengths.mean():.1f}"
    )
    assert "+- 0.00 over 1 " in str(evaluate(chain_model, Chain(), episodes=1))


def test_bad_arguments_are_refused(chain_model):
    with pytest.raises(ValueError, match="episodes = 0; expected at least 1"):
        evaluate(chain_model, Chain(), episodes=0)
    with pytest.raises(ValueError, match="not trained on an environment id; pass env="):
        evaluate(chain_model, episodes=1)
    with pytest.raises(ValueError, match=r"shape \(1, 4\); expected \(1,\)"):
        evaluate(chain_model, "CartPole-v1", episodes=1)


def test_a_video_needs_moviepy_and_an_id(chain_model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(ImportError, match=r"recording a video needs moviepy.*ppo-fast\[video\]"):
        record_video(chain_model, tmp_path)
