"""Returns and lengths of finished episodes, against a plain loop."""

import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain, transitions
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ppo_fast import PPO
from ppo_fast.control.episodes import EpisodeStats


def test_finished_episodes_equal_a_plain_loop_over_rollouts_and_masks():
    rng = np.random.default_rng(0)
    stats = EpisodeStats(3, window=10_000)
    running, lengths, want = np.zeros(3), np.zeros(3, int), []
    for _ in range(5):
        rewards = rng.normal(size=(40, 3)).astype(np.float32)
        mask = rng.random((40, 3)) < 0.8
        done = (rng.random((40, 3)) < 0.1) & mask
        rewards[~mask] = np.nan
        stats.update(rewards, done, mask)
        for t in range(40):
            for n in range(3):
                if mask[t, n]:
                    running[n] += rewards[t, n]
                    lengths[n] += 1
                if done[t, n]:
                    want.append((running[n], lengths[n]))
                    running[n], lengths[n] = 0.0, 0
    assert len(want) > 30 and stats.finished == len(want)
    np.testing.assert_allclose(stats.returns, [r for r, _ in want], rtol=1e-6, atol=1e-6)
    assert list(stats.lengths) == [length for _, length in want]
    np.testing.assert_allclose(stats.running_returns, running, rtol=1e-6, atol=1e-6)


def test_only_the_last_episodes_are_kept():
    stats = EpisodeStats(1, window=3)
    stats.update(np.arange(5, dtype=np.float32)[:, None], np.ones((5, 1), bool), None)
    assert list(stats.returns) == [2.0, 3.0, 4.0] and stats.finished == 5
    assert stats.metrics() == {
        "rollout/ep_rew_mean": 3.0,
        "rollout/ep_len_mean": 1.0,
        "rollout/episodes": 5.0,
    }


def test_there_are_no_metrics_before_an_episode_ends():
    stats = EpisodeStats(1, window=3)
    stats.update(np.ones((5, 1), np.float32), np.zeros((5, 1), bool), None)
    assert stats.metrics() == {}


def test_a_long_episode_of_tiny_rewards_is_summed_exactly():
    stats = EpisodeStats(1, window=1)
    for _ in range(200):
        stats.update(np.full((1000, 1), 0.1, np.float32), np.zeros((1000, 1), bool), None)
    assert stats.running_returns[0] == pytest.approx(200_000 * float(np.float32(0.1)), rel=1e-12)


def true_episodes(count):
    """(return, length) of one environment's episodes under `policy_action`."""
    episodes, total, length = [], 0.0, 0
    for _, _, reward, _, terminated, truncated in transitions(50):
        total, length = total + reward, length + 1
        if terminated or truncated:
            episodes.append((total, length))
            total, length = 0.0, 0
    return episodes[:count]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.NEXT_STEP),
        lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.SAME_STEP),
        lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.DISABLED),
        lambda: NativeChain(1),
        lambda: TensorChain(1),
    ],
)
@pytest.mark.parametrize("norm_reward", [False, True])
def test_training_reports_raw_returns_in_every_mode(make, norm_reward):
    model = PPO(
        make(),
        ChainPolicy(),
        num_steps=7,
        num_minibatches=1,
        norm_reward=norm_reward,
        learning_rate=1e-12,
    ).learn(30)
    finished = len(model.episodes.returns)
    assert finished >= 6
    assert list(zip(model.episodes.returns, model.episodes.lengths, strict=True)) == true_episodes(
        finished
    )
    assert model.metrics["rollout/episodes"] == finished
    assert torch.is_tensor(model.collector.rollout.rewards)
