"""Tensor environments against Gymnasium's own: physics, episode ends, resets, and what a step costs."""

import copy
import itertools
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import AcrobotEnv, PendulumEnv
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast import PPO
from ppo_fast.control.env_state import capture_state, restore_state
from ppo_fast.control.evaluate import evaluate
from ppo_fast.control.make_envs import make_environments
from ppo_fast.control.tensor_envs import (
    SHORTEST_EPISODE,
    TENSOR_ENVS,
    TensorAcrobot,
    TensorCartPole,
    TensorMountainCar,
    TensorPendulum,
    make_tensor_env,
)

IDS = tuple(TENSOR_ENVS)
DISCRETE = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0")
EPS = 2.0**-23
every_id = pytest.mark.parametrize("env_id", IDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def physics(env_id, rows):
    """A state's rows [R, ...] as the variables of Gymnasium's `state`, [k, ...] float64."""
    rows = np.asarray(rows, np.float64)
    if env_id == "Pendulum-v1":
        return np.stack([np.arctan2(rows[1], rows[0]), rows[2]])
    if env_id == "Acrobot-v1":
        return rows[[6, 7, 4, 5]]
    return rows[: 4 if env_id == "CartPole-v1" else 2]


def rows_of(env_id, state):
    """The inverse of `physics`; the last row, of steps, is 0."""
    zero = np.zeros_like(state[0])
    if env_id == "Pendulum-v1":
        return np.stack([np.cos(state[0]), np.sin(state[0]), state[1], zero])
    if env_id == "Acrobot-v1":
        a, b, *speeds = state
        return np.stack([np.cos(a), np.sin(a), np.cos(b), np.sin(b), *speeds, a, b, zero])
    return np.stack([*state, zero])


def observe(env_id, state):
    """Observations [S, ...] float64 of Gymnasium states [k, ...]."""
    if env_id in ("Pendulum-v1", "Acrobot-v1"):
        return rows_of(env_id, state)[: 3 if env_id == "Pendulum-v1" else 6]
    return state


def put(env, rows, steps=0):
    """Have an environment stand in the given rows [R, N]."""
    saved = env.state_dict()
    saved["state"].copy_(torch.as_tensor(rows))
    saved["state"][-1] = torch.as_tensor(steps, dtype=env.dtype)
    saved["started"] = True
    env.load_state_dict(saved)


def random_actions(env, rng):
    if isinstance(env.single_action_space, gym.spaces.Discrete):
        count = int(env.single_action_space.n)
        return torch.from_numpy(rng.integers(0, count, env.num_envs))
    # Gymnasium squares an action in the action's own dtype.
    return torch.from_numpy(rng.uniform(-3, 3, (env.num_envs, 1))).to(env.dtype)


def mixed_actions(env_id, env, obs, rng):
    """Random actions for even environments; for odd ones a policy that reaches other ends."""
    actions = random_actions(env, rng)
    if env_id == "CartPole-v1":
        clever = (obs @ torch.tensor([0.05, 0.3, 1.0, 0.5]) > 0).long()
    elif env_id == "Acrobot-v1":
        clever = 1 + torch.sign(obs[:, 5]).long()
    elif env_id == "Pendulum-v1":
        clever = 2.0 * torch.sign(obs[:, 2:3])
    else:
        clever = torch.sign(obs[:, 1:2])
        clever = clever[:, 0].long() + 1 if env_id == "MountainCar-v0" else clever
    actions[1::2] = clever[1::2]
    return actions


# --- an oracle over arrays, made of Gymnasium's own code where that takes arrays -------------------


def oracle(env_id, state, actions):
    """Gymnasium's step over states [k, M] and actions [M]: (next state, reward, terminated, margin).

    `margin` [M] is how far a state is beyond the threshold of termination.
    """
    return {
        "CartPole-v1": cartpole,
        "Pendulum-v1": pendulum,
        "Acrobot-v1": acrobot,
        "MountainCar-v0": mountain_car,
        "MountainCarContinuous-v0": mountain_car_continuous,
    }[env_id](state, actions)


def cartpole(state, actions):
    env = CartPoleVectorEnv(state.shape[1])
    env.state = state
    _, reward, terminated, _, _ = env.step(actions)
    x, _, theta, _ = env.state
    margin = np.maximum(abs(x) - 2.4, abs(theta) - env.theta_threshold_radians)
    return env.state, reward, terminated, margin


def pendulum(state, actions):
    env = PendulumEnv()
    env.state = state
    _, reward, *_ = env.step(actions[None])
    never = np.zeros(len(actions), bool)
    return env.state, reward, never, np.full(len(actions), -np.inf)


def acrobot(state, actions):
    env, h = AcrobotEnv(), AcrobotEnv.dt
    torque = actions - 1.0

    def slope(y):
        return np.stack(env._dsdt(np.concatenate([y, torque[None]]))[:4])

    k1 = slope(state)
    k2 = slope(state + h / 2 * k1)
    k3 = slope(state + h / 2 * k2)
    k4 = slope(state + h * k3)
    new = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    new[:2] -= 2 * np.pi * np.round(new[:2] / (2 * np.pi))
    new[2] = new[2].clip(-env.MAX_VEL_1, env.MAX_VEL_1)
    new[3] = new[3].clip(-env.MAX_VEL_2, env.MAX_VEL_2)
    margin = -np.cos(new[0]) - np.cos(new[1] + new[0]) - 1.0
    return new, np.where(margin > 0, 0.0, -1.0), margin > 0, margin


def roll_car(state, push, goal):
    position, velocity = state
    velocity = (velocity + push - 0.0025 * np.cos(3 * position)).clip(-0.07, 0.07)
    position = (position + velocity).clip(-1.2, 0.6)
    velocity = np.where((position == -1.2) & (velocity < 0), 0.0, velocity)
    margin = np.minimum(position - goal, np.where(velocity >= 0, np.inf, -np.inf))
    return np.stack([position, velocity]), margin >= 0, margin


def mountain_car(state, actions):
    new, terminated, margin = roll_car(state, (actions - 1) * 0.001, 0.5)
    return new, np.full(len(actions), -1.0), terminated, margin


def mountain_car_continuous(state, actions):
    actions = actions.astype(np.float64)
    new, terminated, margin = roll_car(state, actions.clip(-1, 1) * 0.0015, 0.45)
    return new, 100.0 * terminated - 0.1 * actions**2, terminated, margin


def spread(env_id, state, actions, expected, draws=2):
    """How far one float32 rounding of the state moves observation and reward, [S, M] and [M]."""
    rng = np.random.default_rng(0)
    obs, reward = observe(env_id, expected[0]), expected[1]
    by_obs = 4 * EPS * (1 + abs(obs))
    by_reward = 4 * EPS * (1 + abs(reward))
    for _ in range(draws):
        moved = state + EPS * (1 + abs(state)) * rng.choice([-1.0, 1.0], state.shape)
        new, new_reward, terminated, _ = oracle(env_id, moved, actions)
        same = terminated == expected[2]
        by_obs += 4 * abs(observe(env_id, new) - obs)
        by_reward += np.where(same, 4 * abs(new_reward - reward), np.inf)
    # A random sign may happen to cancel: neighbours in the batch tell the usual spread.
    usual = np.sort(by_obs, axis=1)[:, by_obs.shape[1] // 2 :].mean(1, keepdims=True)
    return np.maximum(by_obs, usual), by_reward


@every_id
def test_the_oracle_over_arrays_is_gymnasiums_step(env_id):
    rng = np.random.default_rng(1)
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    tensor_env = make_tensor_env(env_id, 400, dtype=torch.float64)
    obs, _ = tensor_env.reset(seed=1)
    for _ in range(300):
        actions = mixed_actions(env_id, tensor_env, obs, rng)
        rows = tensor_env.state_dict()["state"].numpy()
        obs, *_ = tensor_env.step(actions)
    state = physics(env_id, rows)
    flat = actions.numpy().reshape(-1)
    new, reward, terminated, _ = oracle(env_id, state, flat)
    for i in range(400):
        env.state = state[:, i].copy()
        env.steps_beyond_terminated = None
        got = env.step(int(flat[i]) if env_id in DISCRETE else actions[i].numpy())
        # Its state is float32 in MountainCarContinuous alone.
        exact = 1e-13 if env_id != "MountainCarContinuous-v0" else 2e-7
        np.testing.assert_allclose(new[:, i], env.state, rtol=exact, atol=exact)
        assert reward[i] == pytest.approx(got[1], rel=exact, abs=exact)
        assert terminated[i] == got[2]


@every_id
@both_dtypes
def test_a_million_transitions_are_gymnasiums(env_id, dtype):
    # A million in the default dtype, and 200,000 in float64 against tighter bounds.
    exact = dtype == torch.float64
    width, steps = 1000, 200 if exact else 1000
    env = make_tensor_env(env_id, width, dtype=dtype)
    rng = np.random.default_rng(2)
    obs, _ = env.reset(seed=3)
    put(env, env.state_dict()["state"], torch.arange(width) % env.max_episode_steps)
    columns = {name: [] for name in ("rows", "actions", "final", "rewards", "terminated", "after")}
    for _ in range(steps):
        actions = mixed_actions(env_id, env, obs, rng)
        rows = env.state_dict()["state"].numpy()
        obs, rewards, terminated, truncated, info = env.step(actions)
        counted = rows[-1] + 1
        np.testing.assert_array_equal(truncated.numpy(), counted >= env.max_episode_steps)
        done = (terminated | truncated).numpy()
        after = env.state_dict()["state"].numpy()
        np.testing.assert_array_equal(after[-1], np.where(done, 0, counted))
        # What was not reset is what the next action is for.
        torch.testing.assert_close(obs[~done], info["final_obs"][~done], rtol=0, atol=0)
        after[:, done] = np.nan
        values = rows, actions, info["final_obs"].T, rewards, terminated, after
        for name, value in zip(columns, values, strict=True):
            columns[name].append(np.array(value))
    joined = {
        name: np.concatenate(column, -1) for name, column in columns.items() if name != "actions"
    }
    actions = np.concatenate([a.reshape(-1) for a in columns["actions"]])
    state = physics(env_id, joined["rows"])
    new, reward, terminated, margin = expected = oracle(env_id, state, actions)
    assert (joined["terminated"] != terminated).sum() <= (0 if exact else 20)
    assert terminated.any() == (env_id != "Pendulum-v1")
    unsure = joined["terminated"] != terminated
    final, rewards = joined["final"].astype(np.float64), joined["rewards"]
    if exact:
        np.testing.assert_allclose(rewards, reward, rtol=1e-12, atol=1e-12)
        known = ~np.isnan(joined["after"][0])
        got = physics(env_id, joined["after"])[:, known]
        error = abs(got - new[:, known])
        if env_id in ("Pendulum-v1", "Acrobot-v1"):
            error[:2] = np.minimum(error[:2], abs(error[:2] - 2 * np.pi))  # -pi is pi
            error[0] = np.minimum(error[0] % (2 * np.pi), -error[0] % (2 * np.pi))
        assert error.max() < 1e-12
        assert abs(final - observe(env_id, new)).max() < 2e-6
    else:
        assert (abs(margin[unsure]) < 1e-4).all()
        obs_bound, reward_bound = spread(env_id, state, actions, expected)
        reward_bound[unsure] = np.inf
        obs_error = abs(final - observe(env_id, new))
        assert (obs_error <= obs_bound).all(), (obs_error / obs_bound).max()
        assert (abs(rewards - reward) <= reward_bound).all()
        if env_id != "Acrobot-v1":
            assert obs_error.max() < 2e-6


# Variables of Gymnasium's `state`, well beyond what episodes reach.
BOXES = {
    "CartPole-v1": [4.8, 10.0, 0.42, 10.0],
    "Pendulum-v1": [math.pi, 8.0],
    "Acrobot-v1": [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
    "MountainCar-v0": [1.2, 0.07],
    "MountainCarContinuous-v0": [1.2, 0.07],
}


@every_id
@both_dtypes
def test_a_step_from_anywhere_is_gymnasiums(env_id, dtype):
    width = 20_000
    env = make_tensor_env(env_id, width, dtype=dtype)
    rng = np.random.default_rng(21)
    box = np.array(BOXES[env_id])[:, None]
    state = rng.uniform(-1, 1, (len(box), width)) * box
    state[:, : width // 10] = rng.choice([-1.0, 0.0, 1.0], (len(box), width // 10)) * box
    if env_id.startswith("MountainCar"):
        state[0] = state[0].clip(-1.2, 0.6)
    put(env, rows_of(env_id, state))
    rows = env.state_dict()["state"].numpy()
    actions = random_actions(env, rng)
    _, rewards, terminated, _, info = env.step(actions)
    state, actions = physics(env_id, rows), actions.numpy().reshape(-1)
    new, reward, over, margin = expected = oracle(env_id, state, actions)
    unsure = terminated.numpy() != over
    obs_error = abs(info["final_obs"].T.numpy() - observe(env_id, new))
    obs_bound, reward_bound = spread(env_id, state, actions, expected, draws=6)
    # A car in float32 is a rounding beyond the wall, or on the other side of standing still.
    near = (abs(margin) < 1e-5) | (abs(new[-1]) < 1e-7)
    assert (near | ~unsure)[np.isfinite(margin)].all() and unsure.mean() < 1e-3
    if dtype == torch.float64:
        obs_bound = 2e-6 + 0 * obs_error
        assert not unsure.any()
        # At 9 pi rad/s a step of the acrobot magnifies roundings a few thousand times.
        exact = 1e-9 if env_id == "Acrobot-v1" else 1e-12
        np.testing.assert_allclose(rewards, reward, rtol=exact, atol=exact)
    else:
        reward_bound[unsure] = np.inf
        assert (abs(rewards.numpy() - reward) <= reward_bound).all()
    assert (obs_error <= obs_bound)[:, ~unsure].all(), (obs_error / obs_bound).max()


@every_id
@both_dtypes
def test_whole_episodes_beside_gymnasiums_single_environment(env_id, dtype):
    # Through gym.make, so with Gymnasium's time limit, put at 40 to see several in few steps.
    width, limit = 3, 40
    rng = np.random.default_rng(4)
    env = make_tensor_env(env_id, width, dtype=dtype, max_episode_steps=limit)
    singles = [gym.make(env_id, max_episode_steps=limit) for _ in range(width)]
    for single in singles:
        single.reset(seed=0)
    obs, _ = env.reset(seed=5)
    ends = 0
    for _ in range(250):
        actions = mixed_actions(env_id, env, obs, rng)
        state = physics(env_id, env.state_dict()["state"].numpy())
        obs, rewards, terminated, truncated, info = env.step(actions)
        for i, single in enumerate(singles):
            single.unwrapped.state = state[:, i].copy()
            action = int(actions[i]) if env_id in DISCRETE else actions[i].numpy()
            last, reward, over, cut, _ = single.step(action)
            np.testing.assert_allclose(info["final_obs"][i], last, rtol=2e-6, atol=2e-6)
            assert rewards[i].item() == pytest.approx(reward, rel=2e-6, abs=2e-6)
            assert (bool(terminated[i]), bool(truncated[i])) == (over, cut)
            if over or cut:
                single.reset()
                ends += 1
                assert not torch.equal(obs[i], info["final_obs"][i])
    assert ends >= 250 // limit * width


NEAR_THE_END = {
    "CartPole-v1": ([2.395, 2.0, 0.0, 0.0], 1),
    "Acrobot-v1": ([2.0, 0.3, 3.0, 0.0], 1),
    "MountainCar-v0": ([0.49, 0.06], 2),
    "MountainCarContinuous-v0": ([0.44, 0.06], 1.0),
}


@pytest.mark.parametrize("env_id", NEAR_THE_END)
@pytest.mark.parametrize("before_limit", [2, 1, 0])
def test_both_flags_at_the_limit_as_under_gymnasiums_time_limit(env_id, before_limit):
    limit = 6
    state, action = NEAR_THE_END[env_id]
    env = make_tensor_env(env_id, 2, max_episode_steps=limit)
    env.reset(seed=0)
    rows = np.repeat(rows_of(env_id, np.array(state))[:, None], 2, axis=1)
    put(env, rows, torch.tensor([limit - 1 - before_limit, 0]))
    single = gym.make(env_id, max_episode_steps=limit)
    single.reset(seed=0)
    single._elapsed_steps = limit - 1 - before_limit
    single.unwrapped.state = np.array(state)
    discrete = env_id in DISCRETE
    actions = torch.full((2,), action) if discrete else torch.full((2, 1), action)
    _, _, terminated, truncated, info = env.step(actions)
    _, _, over, cut, _ = single.step(action if discrete else np.array([action], np.float32))
    assert over, "the case must terminate"
    assert (terminated.tolist(), truncated.tolist()) == ([over, over], [cut, False])
    assert cut == (before_limit == 0)
    assert info["_final_obs"].tolist() == [True, True]
    assert env.state_dict()["state"][-1].tolist() == [0, 0]


@pytest.mark.parametrize(("variable", "limit"), [(0, 2.4), (2, 12 * 2 * math.pi / 360)])
def test_cart_pole_thresholds_split_neighbouring_floats(variable, limit):
    # float32(2.4) is above 2.4, so it is beyond the threshold, though it equals it in float32.
    nearest = np.float32(limit)
    values = [np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(9))]
    state = np.zeros((4, 6))
    state[variable] = np.array([*values, *(-v for v in values)], np.float64)
    env = TensorCartPole(6)
    put(env, rows_of("CartPole-v1", state))
    terminated = env.step(torch.zeros(6, dtype=torch.int64))[2]
    expected = cartpole(state, np.zeros(6, np.int64))[2]
    assert terminated.tolist() == expected.tolist()
    assert 0 < expected.sum() < 6


@pytest.mark.parametrize("speed", [8.0, -8.0, 0.0])
@pytest.mark.parametrize("angle", [math.pi, -math.pi, math.pi - 1e-7, -math.pi + 1e-7, 0.0])
@pytest.mark.parametrize("torque", [-1e30, -2.0, 0.0, 3.0, math.inf])
def test_pendulum_at_its_bounds(angle, speed, torque):
    env = TensorPendulum(1)
    put(env, rows_of("Pendulum-v1", np.array([angle, speed]))[:, None])
    single = gym.make("Pendulum-v1").unwrapped
    single.reset(seed=0)
    single.state = np.array([angle, speed])
    action = np.array([torque], np.float32)
    last, reward, *_ = single.step(action)
    _, rewards, _, _, info = env.step(torch.from_numpy(action)[None])
    np.testing.assert_allclose(info["final_obs"][0], last, atol=1e-6)
    assert rewards.item() == pytest.approx(reward, abs=1e-5)


@every_id
def test_spaces_and_interface_are_gymnasiums(env_id):
    env, theirs = make_tensor_env(env_id, 3), gym.make_vec(env_id, 3, vectorization_mode="sync")
    for name in (
        "single_observation_space",
        "single_action_space",
        "observation_space",
        "action_space",
    ):
        assert getattr(env, name) == getattr(theirs, name), name
    assert isinstance(env, VectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.max_episode_steps == gym.spec(env_id).max_episode_steps
    obs, info = env.reset(seed=1)
    assert (obs.shape, obs.dtype, info) == (env.observation_space.shape, torch.float32, {})
    assert obs.is_contiguous()
    obs, rewards, terminated, truncated, info = env.step(
        random_actions(env, np.random.default_rng(0))
    )
    assert obs.dtype == info["final_obs"].dtype == torch.float32
    assert rewards.shape == (3,) and rewards.dtype == torch.float32
    assert terminated.shape == truncated.shape == (3,)
    assert terminated.dtype == truncated.dtype == torch.bool
    env.close()


# --- resets -------------------------------------------------------------------------------------


RESET_BOUNDS = {
    "CartPole-v1": [(-0.05, 0.05)] * 4,
    "Pendulum-v1": [(-math.pi, math.pi), (-1.0, 1.0)],
    "Acrobot-v1": [(-0.1, 0.1)] * 4,
    "MountainCar-v0": [(-0.6, -0.4), (0.0, 0.0)],
    "MountainCarContinuous-v0": [(-0.6, -0.4), (0.0, 0.0)],
}


@every_id
@pytest.mark.parametrize("within_step", [False, True])
def test_resets_have_gymnasiums_law(env_id, within_step):
    env = make_tensor_env(env_id, 40_000, max_episode_steps=1)
    obs, _ = env.reset(seed=6)
    if within_step:
        obs, *_ = env.step(random_actions(env, np.random.default_rng(0)))
    state = physics(env_id, env.state_dict()["state"].numpy())
    single = gym.make(env_id).unwrapped
    theirs = []
    for seed in range(300):
        single.reset(seed=seed)
        theirs.append(single.state)
    theirs = np.array(theirs).T
    np.testing.assert_allclose(obs.T, observe(env_id, state), atol=1e-6)
    for ours, their, (low, high) in zip(state, theirs, RESET_BOUNDS[env_id], strict=True):
        slack = 1e-6 * max(1, abs(low))
        for sample, gap in ((ours, 2e-3), (their, 0.1)):
            assert low - slack <= sample.min() <= low + gap * (high - low) + slack
            assert high - gap * (high - low) - slack <= sample.max() <= high + slack
        if high == low:
            continue
        unit = (ours - low) / (high - low)
        # Uniform: mean 1/2, variance 1/12, distribution function the identity; each within 5 sigma.
        error = 5 / math.sqrt(len(unit))
        assert abs(unit.mean() - 0.5) < error * math.sqrt(1 / 12)
        assert abs(unit.var() - 1 / 12) < error * math.sqrt(1 / 180)
        grid = np.linspace(0, 1, 21)
        assert abs(np.searchsorted(np.sort(unit), grid) / len(unit) - grid).max() < error / 2
        assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) < error
    moving = [
        row for row, (low, high) in zip(state, RESET_BOUNDS[env_id], strict=True) if high > low
    ]
    if len(moving) > 1:
        assert abs(np.corrcoef(moving) - np.eye(len(moving))).max() < 5 / math.sqrt(40_000)


def test_no_cart_pole_ends_before_new_initial_states_are_drawn():
    sequences = torch.tensor(list(itertools.product([0, 1], repeat=SHORTEST_EPISODE)))
    corners = np.array(list(itertools.product([-0.05, 0.05], repeat=4)))
    rng = np.random.default_rng(7)
    starts = np.concatenate([corners, rng.uniform(-0.05, 0.05, (64, 4))])
    env = TensorCartPole(len(starts) * len(sequences), dtype=torch.float64)
    put(env, rows_of("CartPole-v1", np.repeat(starts, len(sequences), 0).T))
    actions = sequences.repeat(len(starts), 1)
    for t in range(SHORTEST_EPISODE - 1):
        assert not env.step(actions[:, t].contiguous())[2].any()
    # The bound is reached: one step fewer between draws would be needless, one more wrong.
    assert env.step(actions[:, -1].contiguous())[2].any()


@every_id
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 11, None])
def test_no_initial_state_is_used_twice(env_id, limit):
    env = make_tensor_env(env_id, 5, max_episode_steps=limit, dtype=torch.float64)
    discrete = env_id in DISCRETE
    push = torch.zeros(5, dtype=torch.int64) if discrete else torch.zeros(5, 1)
    obs, _ = env.reset(seed=8)
    seen = [obs.clone()]
    for t in range(60):
        if t == 31:
            seen.append(env.reset()[0].clone())
        if t == 45:
            env.begin_sequence()
        obs, _, _, _, info = env.step(push)
        seen.append(obs[info["_final_obs"]])
    starts = torch.cat(seen)
    assert len(starts.unique(dim=0)) == len(starts)
    if limit is not None or env_id == "CartPole-v1":
        assert len(starts) > 10


@every_id
@pytest.mark.parametrize("num_envs", [1, 3, 1000])
def test_a_seed_fixes_everything(env_id, num_envs):
    def run(env, seed):
        rng = np.random.default_rng(9)
        rows = [env.reset(seed=seed)[0].clone()]
        for _ in range(25):
            obs, rewards, terminated, truncated, info = env.step(random_actions(env, rng))
            rows.append(torch.cat([obs, info["final_obs"]], 1))
            rows.append(torch.stack([rewards, terminated, truncated]))
        return rows

    make = lambda: make_tensor_env(env_id, num_envs, max_episode_steps=10)  # noqa: E731
    env = make()
    one, two = run(env, 1), run(make(), 1)
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], run(make(), 2)[0])
    # A new start from the same seed forgets all that was; no seed goes on; unseeded ones differ.
    assert all(map(torch.equal, one, run(env, 1)))
    assert not torch.equal(one[0], run(env, None)[0])
    assert not torch.equal(run(make(), None)[0], run(make(), None)[0])


# --- what a step costs, and what it leaves alone ---------------------------------------------------


SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "_to_copy", "equal")


def storages(value, found=None, seen=None):
    """Addresses of every tensor's memory reachable from an object's attributes."""
    found = set() if found is None else found
    if isinstance(value, torch.Tensor):
        found.add(value.untyped_storage().data_ptr())
    elif isinstance(value, dict):
        for item in value.values():
            storages(item, found)
    elif isinstance(value, tuple | list):
        for item in value:
            storages(item, found)
    return found


class Recorder(TorchDispatchMode):
    """Records every operation, and replays them on the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls, self.results = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.results.append(result)
        return result

    def names(self):
        return [func.name().removeprefix("aten::").split(".")[0] for func, _, _ in self.calls]

    def replay(self):
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


# Each is a launch on a GPU and a microsecond on a CPU: a change here is a change of speed.
OPERATIONS = {
    "CartPole-v1": 18,
    "Pendulum-v1": 16,
    "Acrobot-v1": 89,
    "MountainCar-v0": 16,
    "MountainCarContinuous-v0": 19,
}


@every_id
def test_a_step_allocates_nothing_and_never_waits(env_id):
    env = make_tensor_env(env_id, 16, max_episode_steps=5)
    env.reset(seed=10)
    actions = random_actions(env, np.random.default_rng(0))
    own = storages(vars(env))
    counts = []
    for _ in range(12):
        with Recorder() as recorder:
            env.step(actions)
        assert not set(SYNCS) & set(recorder.names())
        for result in recorder.results:
            assert storages(result) <= own
        counts.append(len(recorder.calls))
    assert min(counts) == OPERATIONS[env_id]
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(12):
            env.step(actions)
    allocated = [e for e in profile.key_averages() if e.self_cpu_memory_usage > 0]
    assert not allocated, [(e.key, e.self_cpu_memory_usage) for e in allocated]


@every_id
@pytest.mark.parametrize("steps", [8, 13])
def test_recorded_steps_replay_as_they_would_run(env_id, steps):
    envs = [make_tensor_env(env_id, 6, max_episode_steps=9) for _ in range(2)]
    actions = random_actions(envs[0], np.random.default_rng(11))
    kept = []
    for env in envs:
        env.reset(seed=12)
        env.step(actions)
        env.begin_sequence()
        rows = kept.append([]) or kept[-1]
        recorder = Recorder()
        for sequence in range(3):
            if sequence == 0 or env is envs[0]:
                env.begin_sequence()
                with recorder:
                    for _ in range(steps):
                        env.step(actions)
            else:
                recorder.replay()
            rows.append(env.state_dict()["state"])
        # After the replays, plain steps go on from where they stand.
        rows += [env.step(actions)[0].clone() for _ in range(10)]
        recorder.calls.clear()
    assert all(map(torch.equal, *kept))


@every_id
@both_dtypes
def test_returned_tensors_may_be_written(env_id, dtype):
    envs = [make_tensor_env(env_id, 4, max_episode_steps=6, dtype=dtype) for _ in range(2)]
    rng = np.random.default_rng(13)
    for env in envs:
        env.reset(seed=14)[0].fill_(7.0) if env is envs[1] else env.reset(seed=14)
    for _ in range(14):
        actions = random_actions(envs[0], rng)
        results = []
        for env in envs:
            obs, rewards, terminated, truncated, info = env.step(actions)
            columns = (obs, rewards, terminated, truncated, *info.values())
            results.append([column.clone() for column in columns])
            if env is envs[1]:
                for column in columns:
                    column.fill_(1)
        assert all(map(torch.equal, *results))


@every_id
def test_long_runs_stay_finite_and_in_bounds(env_id):
    env = make_tensor_env(env_id, 64)
    rng = np.random.default_rng(15)
    obs, _ = env.reset(seed=16)
    low, high = (
        torch.from_numpy(b)
        for b in (env.single_observation_space.low, env.single_observation_space.high)
    )
    for t in range(3000):
        if t % 500 < 250:
            actions = mixed_actions(env_id, env, obs, rng)
        obs, rewards, _, _, info = env.step(actions)
        assert rewards.isfinite().all() and info["final_obs"].isfinite().all()
        assert ((obs >= low) & (obs <= high)).all()
    if env_id == "Pendulum-v1":
        cos, sin = env.state_dict()["state"][:2].double()
        assert (cos**2 + sin**2 - 1).abs().max() < 1e-6


def test_states_beyond_float32_end_with_their_episode():
    env = TensorCartPole(4)
    rows = torch.zeros(5, 4)
    rows[0, :2] = torch.tensor([3e38, -3e38])
    rows[3, 2:] = torch.tensor([3e38, -3e38])
    put(env, rows)
    _, _, terminated, _, _ = env.step(torch.tensor([0, 1, 0, 1]))
    assert terminated.all()
    assert env.state_dict()["state"].isfinite().all()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0"])
def test_an_action_that_is_nan_stays_in_its_environment_and_episode(env_id):
    env = make_tensor_env(env_id, 3, max_episode_steps=4)
    env.reset(seed=17)
    actions = torch.zeros(3, 1)
    actions[1] = math.nan
    obs, rewards, *_ = env.step(actions)
    assert obs.isfinite().all(1).tolist() == [True, False, True]
    assert rewards.isfinite().tolist() == [True, False, True]
    for _ in range(3):
        obs, *_ = env.step(torch.zeros(3, 1))
    assert obs.isfinite().all() and env.step(torch.zeros(3, 1))[1].isfinite().all()


def test_modes_and_gradients_of_the_caller_do_not_matter():
    def run():
        env = TensorPendulum(4, max_episode_steps=5)
        rng = np.random.default_rng(18)
        env.reset(seed=19)
        return env, [env.step(random_actions(env, rng))[1].clone() for _ in range(7)]

    plain, expected = run()
    with torch.inference_mode():
        env, rewards = run()
    assert all(map(torch.equal, expected, rewards))
    # Made in inference mode, stepped outside of it, with actions that carry a gradient.
    last = torch.full((4, 1), 0.5, requires_grad=True)
    assert torch.equal(env.step(last * 1)[1], plain.step(last.detach())[1])
    with torch.no_grad():
        env.step(last)


# --- saving ---------------------------------------------------------------------------------------


@every_id
@both_dtypes
def test_a_saved_environment_goes_on_bitwise(env_id, dtype):
    def go(env, steps, seed):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(steps):
            obs, rewards, terminated, truncated, info = env.step(random_actions(env, rng))
            flags = torch.stack([terminated, truncated])
            rows += [obs.clone(), rewards.clone(), flags, info["final_obs"].clone()]
        return rows

    make = lambda: make_tensor_env(env_id, 5, max_episode_steps=6, dtype=dtype)  # noqa: E731
    env, other = make(), make()
    env.reset(seed=20)
    go(env, 10, 1)
    state, tensors = capture_state(env)
    kept = copy.deepcopy((state, tensors))
    expected = go(env, 20, 2)
    other.reset(seed=99)
    restore_state(other, *kept)
    assert all(map(torch.equal, expected, go(other, 20, 2)))
    # Capturing copied: what the environment did since did not reach it.
    assert all(torch.equal(tensors[name], kept[1][name]) for name in tensors)
    twins = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    expected = go(env, 9, 3)
    assert all(all(map(torch.equal, expected, go(twin, 9, 3))) for twin in twins)


def test_a_state_that_does_not_fit_is_refused():
    env = TensorCartPole(3)
    env.reset(seed=0)
    others = {
        "env_id = 'Pendulum-v1'; expected 'CartPole-v1'": TensorPendulum(3),
        "max_episode_steps = 9; expected 500": TensorCartPole(3, max_episode_steps=9),
        r"shape \(5, 4\) and dtype torch.float32; expected \(5, 3\)": TensorCartPole(4),
        "dtype torch.float64; expected .*torch.float32": TensorCartPole(3, dtype=torch.float64),
    }
    for message, other in others.items():
        before = env.state_dict()["state"]
        with pytest.raises(ValueError, match=message):
            env.load_state_dict(other.state_dict())
        assert torch.equal(before, env.state_dict()["state"])


def test_a_state_from_another_kind_of_device_goes_on_with_new_draws():
    env, other = TensorCartPole(3), TensorCartPole(3)
    env.reset(seed=0)
    saved = env.state_dict() | {"generator": torch.zeros(16, dtype=torch.uint8), "since_draw": 3}
    other.reset(seed=1)
    other.load_state_dict(saved)
    assert torch.equal(other.state_dict()["state"], env.state_dict()["state"])
    assert other.state_dict()["since_draw"] == 0
    other.step(torch.zeros(3, dtype=torch.int64))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "actions", "error", "message"),
    [
        (
            TensorCartPole,
            np.zeros(3, int),
            TypeError,
            "is a ndarray; expected a tensor of torch.int64",
        ),
        (TensorCartPole, [0, 1, 0], TypeError, "is a list; expected a tensor"),
        (
            TensorCartPole,
            torch.zeros(3),
            TypeError,
            "dtype torch.float32; expected torch.int64 or torch.int32",
        ),
        (TensorCartPole, torch.zeros(3, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (
            TensorCartPole,
            torch.zeros(3, 1).long(),
            ValueError,
            r"shape \(3, 1\); expected .* = \(3,\)",
        ),
        (TensorCartPole, torch.zeros(4).long(), ValueError, r"shape \(4,\)"),
        (TensorCartPole, torch.zeros(3, device="meta").long(), ValueError, "on meta; expected cpu"),
        (TensorCartPole, torch.tensor([0, 2, 1]), ValueError, r"lie in \[0, 2\]; expected 0 to 1"),
        (TensorAcrobot, torch.tensor([0, -1, 1]), ValueError, r"lie in \[-1, 1\]; expected 0 to 2"),
        (
            TensorMountainCar,
            torch.tensor([3, 0, 1]),
            ValueError,
            r"lie in \[0, 3\]; expected 0 to 2",
        ),
        (TensorPendulum, torch.zeros(3), ValueError, r"shape \(3,\); expected .* = \(3, 1\)"),
        (
            TensorPendulum,
            torch.zeros(3, 1).long(),
            TypeError,
            "dtype torch.int64; expected torch.float32",
        ),
        (TensorPendulum, torch.zeros(3, 1).half(), TypeError, "dtype torch.float16"),
    ],
)
def test_bad_actions_are_named(cls, actions, error, message):
    env = cls(3)
    env.reset(seed=0)
    before = env.state_dict()["state"]
    with pytest.raises(error, match=f"^{cls.__name__}.step: actions .*{message}"):
        env.step(actions)
    assert torch.equal(before, env.state_dict()["state"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_envs": 0}, ValueError, "num_envs = 0; expected at least 1"),
        ({"num_envs": -3}, ValueError, "num_envs = -3; expected at least 1"),
        ({"num_envs": 2.0}, TypeError, "num_envs = 2.0; expected an integer"),
        ({"num_envs": True}, TypeError, "num_envs = True; expected an integer"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps = 0; expected 1 to 16777216"),
        ({"max_episode_steps": 1 << 25}, ValueError, "max_episode_steps = 33554432; expected 1 to"),
        ({"dtype": torch.float16}, ValueError, "dtype = torch.float16; expected torch.float32 or"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=f"^TensorCartPole: {message}"):
        TensorCartPole(**{"num_envs": 2, **settings})


def test_bad_resets_are_named_and_steps_before_one():
    env = TensorCartPole(2)
    with pytest.raises(RuntimeError, match="step before reset"):
        env.step(torch.zeros(2, dtype=torch.int64))
    for seed, error in ((-1, ValueError), ([1, 2], TypeError), (1.5, TypeError)):
        with pytest.raises(error, match=r"reset: seed = .*; expected"):
            env.reset(seed=seed)
    with pytest.raises(ValueError, match=r"reset: options = .*; expected none"):
        env.reset(options={"low": 0.0})
    assert env.reset(seed=np.int64(3), options={})[0].shape == (2, 4)


# --- in training ----------------------------------------------------------------------------------


@every_id
def test_ids_are_made_as_tensor_environments(env_id):
    envs = make_environments(env_id, 5, "tensor", "cpu")
    assert type(envs.env) is TENSOR_ENVS[env_id]
    assert (envs.num_envs, envs.mode, envs.env_id) == (5, AutoresetMode.SAME_STEP, env_id)
    assert envs.device == torch.device("cpu")
    assert make_environments(env_id, None, "tensor", "cpu").num_envs == 8
    # Truncated episodes' last observations come without a warning or an approximation.
    envs.reset(0)
    step = envs.step(random_actions(envs.env, np.random.default_rng(0)))
    assert envs.on_device and step.final_obs.shape == step.obs.shape and step.final_index is None
    assert not envs.approximate_truncation


def test_ids_without_a_tensor_version_are_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"'FrozenLake-v1' has no tensor version; .*CartPole-v1, Pend"
    ):
        make_environments("FrozenLake-v1", 2, "tensor")
    with pytest.raises(
        ValueError, match="the callable returned a TimeLimit; expected a tensor env"
    ):
        make_environments(lambda: gym.make("CartPole-v1"), 2, "tensor")
    assert make_environments(lambda: TensorCartPole(3), 3, "tensor").num_envs == 3


def test_cart_pole_is_learnt_on_tensor_environments():
    env = TensorCartPole(32)
    model = PPO(env, num_steps=64, num_minibatches=8, learning_rate=1e-3, seed=3)
    assert (model.num_envs, model.env_id) == (32, "CartPole-v1")
    model.learn(60_000)
    assert model.metrics["rollout/ep_rew_mean"] > 100
    # What was learnt holds on Gymnasium's own environment.
    assert evaluate(model, "CartPole-v1", episodes=8).returns.mean() > 100


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_is_the_uninterrupted_one(env_id, tmp_path):
    settings = {"vectorization": "tensor", "num_envs": 16, "num_steps": 20, "device": "cpu"}

    def parameters(model):
        return torch.cat([p.detach().reshape(-1) for p in model.policy.parameters()])

    whole = PPO(env_id, **settings).learn(16 * 20 * 6)
    first = PPO(env_id, **settings)
    first.learn(16 * 20 * 6, callback=lambda model: model.iteration < 3)
    first.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint").resume()
    assert loaded.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters(loaded), parameters(whole))
    assert list(loaded.episodes.returns) == list(whole.episodes.returns)
