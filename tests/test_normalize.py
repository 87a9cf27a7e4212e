"""Running normalisation: exact moments, SB3's rules, and the same numbers in every mode."""

import numpy as np
import pytest
import torch
from chain import Chain, NativeChain, TensorChain, transitions
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from ppo_fast import PPO
from ppo_fast.control.collect import Collector
from ppo_fast.control.make_envs import make_environments
from ppo_fast.control.normalize import ObservationNormalizer, RewardNormalizer, RunningMoments
from ppo_fast.distributions import Categorical

CPU = torch.device("cpu")


def moments_of(batches):
    moments = RunningMoments(batches[0].shape[1:], CPU)
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_equal_numpys_over_everything_seen(offset):
    rng = np.random.default_rng(0)
    sizes = (3, 1, 200, 7)
    batches = [rng.normal(offset + i, 1 + i, (size, 2, 3)) for i, size in enumerate(sizes)]
    moments = moments_of(batches)
    everything = np.concatenate(batches)
    # The start, mean 0 and variance 1, has the weight of a ten-thousandth of a row.
    mean = everything.sum(0) / (len(everything) + 1e-4)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    var = (everything**2).sum(0) + 1e-4
    var = var / (len(everything) + 1e-4) - mean**2
    np.testing.assert_allclose(moments.var, var, rtol=1e-9 if offset == 0 else 1e-3)
    if offset == 0:
        np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.var, everything.var(0), rtol=1e-3)
    assert float(moments.count) == pytest.approx(len(everything) + 1e-4)
    assert moments.mean.dtype == torch.float64


def test_rows_that_are_left_out_are_not_read():
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(10, 3))
    valid = rng.random(10) < 0.5
    spoiled = np.where(valid[:, None], batch, np.nan)
    moments, want = RunningMoments((3,), CPU), moments_of([batch[valid]])
    moments.update(torch.from_numpy(spoiled), torch.from_numpy(valid))
    for name, tensor in moments.tensors("m").items():
        torch.testing.assert_close(tensor, want.tensors("m")[name], msg=name)


def test_an_update_without_any_valid_row_changes_nothing():
    moments = moments_of([np.random.default_rng(0).normal(size=(10, 3))])
    before = {name: tensor.clone() for name, tensor in moments.tensors("m").items()}
    moments.update(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.bool))
    for name, tensor in moments.tensors("m").items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-15, atol=0)


def test_normalised_observations_are_float32_clipped_and_standard():
    rng = np.random.default_rng(0)
    normalizer = ObservationNormalizer((2,), CPU, clip=2.5)
    obs = torch.from_numpy(rng.normal([5, -300], [0.1, 40], (5000, 2)))
    normalizer.update(obs)
    scaled = normalizer(obs)
    assert scaled.dtype == torch.float32 and scaled.abs().max() == 2.5
    assert scaled.mean(0).abs().max() < 0.01 and (scaled.std(0) - 1).abs().max() < 0.03
    wide = ObservationNormalizer((2,), CPU, clip=1e9)
    wide.update(obs)
    torch.testing.assert_close(
        wide(obs).double().mean(0), torch.zeros(2).double(), atol=1e-4, rtol=0
    )


def vec_normalize(rewards, dones, observations):
    """What SB3's VecNormalize makes of given steps: observations [T + 1], rewards [T]."""
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    steps, width = rewards.shape

    class Replay(vec_env.VecEnv):
        def __init__(self):
            space = spaces.Box(-np.inf, np.inf, observations.shape[2:], np.float64)
            super().__init__(width, space, spaces.Discrete(2))

        def reset(self):
            self.t = 0
            return observations[0]

        def step_async(self, actions):
            pass

        def step_wait(self):
            self.t += 1
            infos = [{"terminal_observation": observations[0, 0]} for _ in range(width)]
            return observations[self.t], rewards[self.t - 1], dones[self.t - 1], infos

        def close(self):
            pass

        def get_attr(self, name, indices=None):
            return [None] * width

        set_attr = env_method = env_is_wrapped = None

    Replay.__abstractmethods__ = frozenset()
    env = vec_env.VecNormalize(Replay(), gamma=0.9)
    seen, got = [env.reset()], []
    for _ in range(steps):
        obs, reward, _, _ = env.step(np.zeros(width))
        seen.append(obs)
        got.append(reward)
    return np.stack(seen), np.stack(got), env


def test_both_normalisers_equal_sb3s_step_by_step():
    rng = np.random.default_rng(0)
    steps, width = 50, 3
    rewards = rng.normal(1, 30, (steps, width))
    dones = rng.random((steps, width)) < 0.1
    observations = rng.normal([3, -40], [0.1, 60], (steps + 1, width, 2))
    observations[20] *= 100  # something to clip
    want_obs, want_rewards, env = vec_normalize(rewards, dones, observations)

    normalizer = ObservationNormalizer((2,), CPU, clip=10.0)
    for row, want in zip(observations, want_obs, strict=True):
        normalizer.update(torch.from_numpy(row))
        np.testing.assert_allclose(normalizer(torch.from_numpy(row)), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalizer.moments.var, env.obs_rms.var, rtol=1e-12)

    reward_normalizer = RewardNormalizer(width, CPU, gamma=0.9, clip=10.0)
    for start in (0, 20):  # in two rollouts, whose border changes nothing
        part = slice(start, start + 20 if start == 0 else steps)
        got = reward_normalizer.normalize(
            torch.from_numpy(rewards[part]), torch.from_numpy(dones[part]), None
        )
        np.testing.assert_allclose(got, want_rewards[part], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(reward_normalizer.moments.var, env.ret_rms.var, rtol=1e-12)


def test_rewards_of_rows_that_are_no_transitions_change_nothing():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(30, 1))
    done = np.arange(30)[:, None] % 7 == 6
    keep = np.sort(rng.choice(40, 30, replace=False))
    spread, mask = np.full((40, 1), np.nan), np.zeros((40, 1), bool)
    spread_done = np.zeros((40, 1), bool)
    spread[keep], mask[keep], spread_done[keep] = rewards, True, done
    plain, masked = (RewardNormalizer(1, CPU, 0.99, 10.0) for _ in range(2))
    want = plain.normalize(torch.from_numpy(rewards), torch.from_numpy(done), None)
    got = masked.normalize(*(torch.from_numpy(x) for x in (spread, spread_done, mask)))
    torch.testing.assert_close(got[torch.from_numpy(mask)], want[:, 0])
    assert (got[~torch.from_numpy(mask)] == 0).all()
    torch.testing.assert_close(masked.moments.var, plain.moments.var)


MODES = {
    "next_step": lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.NEXT_STEP),
    "native": lambda: NativeChain(1),
    "same_step": lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.SAME_STEP),
    "disabled": lambda: SyncVectorEnv([Chain], autoreset_mode=AutoresetMode.DISABLED),
    "async": lambda: AsyncVectorEnv([Chain], autoreset_mode=AutoresetMode.SAME_STEP),
    "tensor": lambda: TensorChain(1),
}


class Blind(torch.nn.Module):
    """Moves by one whatever it sees, so that normalisation cannot change the course."""

    def forward(self, obs):
        return torch.tensor([100.0, 0.0]).expand(len(obs), -1), obs[:, 0]


@pytest.mark.parametrize("name", ["same_step", "disabled", "async", "tensor"])
def test_last_observations_are_normalised_for_the_critic(name):
    envs = make_environments(MODES[name](), None, "auto")
    normalizer = ObservationNormalizer((1,), CPU, 10.0)
    collector = Collector(
        envs, Blind(), Categorical(Chain.action_space), 4, CPU,
        torch.Generator().manual_seed(0), {"": normalizer}, None,
    )  # fmt: skip
    collector.start(0)
    rollout = collector.collect()  # positions 0, 1, 2, 3, and the fourth step is the last
    assert rollout.truncated[3, 0]
    want = normalizer(torch.tensor([4.0]))
    torch.testing.assert_close(rollout.bootstrap_values[3], want)
    envs.close()


@pytest.mark.parametrize("name", MODES)
def test_statistics_are_of_the_observations_that_were_acted_on_in_every_mode(name):
    envs = make_environments(MODES[name](), None, "auto")
    normalizers = {"": ObservationNormalizer((1,), CPU, 10.0)}
    rewards = RewardNormalizer(1, CPU, 0.9, 10.0)
    collector = Collector(
        envs, Blind(), Categorical(Chain.action_space), 1, CPU,
        torch.Generator().manual_seed(0), normalizers, rewards,
    )  # fmt: skip
    collector.start(0)
    steps = 0
    while steps < 30 or not bool(collector.rollout.mask.all()):
        collector.collect()
        steps += int(collector.rollout.mask.sum())
    positions, returns, running = [], [], 0.0
    position = age = episode = 0
    for _ in range(steps):
        positions.append(position)
        reward, position, age = 10.0 * position, position + 1, age + 1
        running = running * 0.9 + reward
        returns.append(running)
        if position >= 7 or age >= 4:
            episode += 1
            position, age, running = episode % 3, 0, 0.0
    ended = age == 0
    if not (ended and envs.mode == AutoresetMode.NEXT_STEP):
        positions.append(position)  # seen, and about to be acted on
    moments = normalizers[""].moments
    want = moments_of([np.array(positions, np.float64)[:, None]])
    torch.testing.assert_close(moments.mean, want.mean)
    torch.testing.assert_close(moments.var, want.var)
    want = moments_of([np.array(returns)])
    torch.testing.assert_close(rewards.moments.mean, want.mean)
    torch.testing.assert_close(rewards.moments.var, want.var)
    envs.close()


def test_the_toys_course_is_the_one_assumed_above():
    assert [row[:2] for row in transitions(3)] == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_statistics_stand_still_during_an_update(env):
    seen = []

    def callback(model):
        seen.append(model.metrics["train/first_ratio_deviation"])
        assert model.collector.rollout.inputs.abs().max() <= 10

    PPO(env, num_envs=2, num_steps=64, norm_obs=True, norm_reward=True, seed=3).learn(512, callback)
    assert len(seen) >= 4 and max(seen) < 1e-5


def test_prediction_normalises_and_leaves_the_statistics_alone():
    model = PPO("Pendulum-v1", num_envs=2, num_steps=64, norm_obs=True).learn(256)
    moments = model.obs_normalizers[""].moments
    before = moments.mean.clone()
    obs = np.array([0.1, 0.9, -3.0], np.float32)
    scaled = (obs - moments.mean.numpy()) / np.sqrt(moments.var.numpy() + 1e-8)
    want = model.policy.critic(torch.tensor(scaled[None], dtype=torch.float32))
    np.testing.assert_allclose(model.predict_values(obs), want.item(), rtol=1e-5)
    mean = model.policy.actor(torch.tensor(scaled[None], dtype=torch.float32))[0]
    np.testing.assert_allclose(model.predict(obs)[0], mean.detach()[0].clamp(-2, 2), rtol=1e-5)
    assert torch.equal(moments.mean, before)


def test_only_float_leaves_are_normalised():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "n": spaces.Discrete(3)})

    class Both(Chain):
        observation_space = space

        def _obs(self):
            return {"a": np.full(2, self.position, np.float32), "n": np.int64(self.position % 3)}

    model = PPO(Both, num_envs=2, num_steps=16, norm_obs=True).learn(32)
    assert list(model.obs_normalizers) == ["a"]
    inputs = model.collector.rollout.inputs
    assert inputs["n"].dtype == torch.int64 and inputs["n"].max() == 2
    assert inputs["a"].mean().abs() < 1


def test_norm_obs_without_floats_is_refused():
    class Numbers(Chain):
        observation_space = spaces.Discrete(9)

    with pytest.raises(ValueError, match=r"norm_obs = True, but Discrete\(9\) holds no floats"):
        PPO(Numbers, norm_obs=True)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_numpys_way_equals_torchs(rows, shape):
    by_numpy, by_torch = (ObservationNormalizer(shape, CPU, 2.0) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        obs = 3 * torch.randn(rows, *shape, generator=generator) + step
        out = np.empty(obs.shape, np.float32)
        assert by_numpy.step_on_host(obs.numpy(), out)
        by_torch.update(obs)
        np.testing.assert_allclose(out, by_torch(obs).numpy(), rtol=1e-6, atol=1e-6)
    for name, tensor in by_numpy.moments.tensors("").items():
        torch.testing.assert_close(tensor, by_torch.moments.tensors("")[name])


def test_numpys_way_leaves_infinities_to_torchs():
    normalizer = ObservationNormalizer((2,), CPU, 10.0)
    before = [tensor.clone() for tensor in normalizer.moments.tensors("").values()]
    out = np.zeros((2, 2), np.float32)
    assert not normalizer.step_on_host(np.array([[1.0, np.nan], [0.0, 0.0]]), out)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, normalizer.moments.tensors("").values(), strict=True)
    )
