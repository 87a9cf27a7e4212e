"""Advantages are exact in every autoreset mode and on every kind of environment."""

import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain, transitions, value_of
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from ppo_fast.control.collect import Collector
from ppo_fast.control.make_envs import make_environments
from ppo_fast.distributions import Categorical

N, T = 3, 40
GAMMA, LAMBDA = 0.9, 0.7

BACKENDS = {
    "sync-next_step": lambda: SyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.NEXT_STEP),
    "sync-same_step": lambda: SyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.SAME_STEP),
    "sync-disabled": lambda: SyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.DISABLED),
    "async-next_step": lambda: AsyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.NEXT_STEP),
    "async-same_step": lambda: AsyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.SAME_STEP),
    "async-disabled": lambda: AsyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.DISABLED),
    "native-next_step": lambda: NativeChain(N),
    "callable": lambda: Chain,
    "tensor": lambda: TensorChain(N),
    "tensor-rsl_rl": lambda: TensorChain(N, style="rsl_rl"),
}


def collector_for(env, steps=T):
    envs = make_environments(env, N if env is Chain else None, "auto")
    collector = Collector(
        envs,
        ChainPolicy(),
        Categorical(Chain.action_space),
        steps,
        torch.device("cpu"),
        torch.Generator().manual_seed(0),
        {},
        None,
    )
    collector.start(seed=0)
    return collector


def expected_advantages(rows):
    """Plain recursion over consecutive transitions, cut and bootstrapped after the last."""
    advantages, running = [], 0.0
    for position, _, reward, following, terminated, truncated in reversed(rows):
        bootstrap = 0.0 if terminated else value_of(following)
        delta = reward + GAMMA * bootstrap - value_of(position)
        running = delta + GAMMA * LAMBDA * (0.0 if terminated or truncated else running)
        advantages.append(running)
    return advantages[::-1]


def collected(collector):
    """Per environment: positions, rewards, advantages and returns of one rollout's valid rows."""
    rollout = collector.collect()
    batch = rollout.to_batch(GAMMA, LAMBDA, False)
    mask = rollout.mask.clone()
    columns = {
        "positions": rollout.inputs[:-1, :, 0],
        "rewards": rollout.rewards,
        "advantages": batch.advantages.view(-1, N),
        "returns": batch.returns.view(-1, N),
    }
    return [
        {name: column[mask[:, n], n].clone() for name, column in columns.items()} for n in range(N)
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_advantages_equal_plain_recursion_over_true_transitions(name):
    collector = collector_for(BACKENDS[name]())
    truth = transitions(4 * T)
    seen = [0] * N
    for _ in range(3):  # later rollouts begin inside episodes, or on a spurious row
        for n, columns in enumerate(collected(collector)):
            count = len(columns["rewards"])
            rows = truth[seen[n] : seen[n] + count]
            seen[n] += count
            np.testing.assert_array_equal(columns["positions"], [row[0] for row in rows])
            np.testing.assert_array_equal(columns["rewards"], [row[2] for row in rows])
            want = expected_advantages(rows)
            np.testing.assert_allclose(columns["advantages"], want, rtol=1e-5, atol=1e-4)
            want_returns = np.array(want) + [value_of(row[0]) for row in rows]
            np.testing.assert_allclose(columns["returns"], want_returns, rtol=1e-5, atol=1e-4)
    collector.envs.close()


def test_every_mode_and_backend_gives_identical_advantages():
    complete = {}
    for name, make in BACKENDS.items():
        collector = collector_for(make())
        complete[name] = collected(collector)[0]["advantages"][:20].tolist()
        collector.envs.close()
    reference = complete.pop("sync-same_step")
    for name, advantages in complete.items():
        assert advantages == pytest.approx(reference, rel=1e-6, abs=1e-5), name


def test_toy_has_every_kind_of_end():
    ends = {(row[4], row[5]) for row in transitions(100)}
    assert ends == {(False, False), (True, False), (False, True), (True, True)}


def test_next_step_rows_are_masked_and_carried_over_rollouts():
    env = SyncVectorEnv([Chain] * N, autoreset_mode=AutoresetMode.NEXT_STEP)
    collector = collector_for(env, steps=1)
    masks = [collector.collect().mask[0, 0].item() for _ in range(15)]
    lengths = []
    count = 0
    for row in transitions(12):
        count += 1
        if row[4] or row[5]:
            lengths.append(count)
            count = 0
    want = [flag for length in lengths for flag in [True] * length + [False]]
    assert masks[: len(want)] == want[: len(masks)]


def test_masked_rows_have_no_advantage_and_no_return():
    collector = collector_for(NativeChain(N))
    rollout = collector.collect()
    batch = rollout.to_batch(GAMMA, LAMBDA, True)
    spurious = ~rollout.mask.flatten()
    assert spurious.any()
    assert (batch.advantages[spurious] == 0).all() and (batch.returns[spurious] == 0).all()


def test_tensor_environment_without_final_obs_warns_and_uses_the_last_seen_value():
    collector = collector_for(TensorChain(N, style="rsl_rl", final=False))
    with pytest.warns(UserWarning, match="bootstrapped from the value"):
        rollout = collector.collect()
    cut = rollout.truncated & ~rollout.terminated
    assert cut.any()
    torch.testing.assert_close(rollout.bootstrap_values[cut], rollout.values[:-1][cut])
