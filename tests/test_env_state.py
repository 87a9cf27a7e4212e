"""A captured environment goes on exactly as the original; what cannot be captured is not guessed."""

import functools
import inspect
import json
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.toy_text import TaxiEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from ppo_fast.control import env_state
from ppo_fast.control.env_state import capture_state, restore_state

CLASSIC = [
    "Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1",
]  # fmt: skip
TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
TOY_TEXT = ["Blackjack-v1", "CliffWalking-v1", "FrozenLake-v1", TAXI]
MUJOCO = [
    "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5",
    "Walker2d-v5",
]  # fmt: skip
WRAPPERS = {
    "TimeLimit": lambda env: wrappers.TimeLimit(env, 7),
    "RecordEpisodeStatistics": lambda env: wrappers.RecordEpisodeStatistics(env, 3),
    "ClipReward": lambda env: wrappers.ClipReward(env, -0.5, 0.5),
    "RescaleAction": lambda env: wrappers.RescaleAction(env, np.float32(-1), np.float32(1)),
    "FlattenObservation": wrappers.FlattenObservation,
}
OTHER_WRAPPERS = {
    "NormalizeObservation": wrappers.NormalizeObservation,
    "NormalizeReward": wrappers.NormalizeReward,
    "FrameStackObservation": lambda env: wrappers.FrameStackObservation(env, 2),
    "StickyAction": lambda env: wrappers.StickyAction(env, 0.5),
    "TransformReward": lambda env: wrappers.TransformReward(env, lambda reward: reward + 1),
    "user's": gym.Wrapper,
}


def trajectory(env, actions):
    """Everything an environment says under `actions`, starting new episodes where one ends."""
    said = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        said.append((obs, reward, terminated, truncated, info))
        if np.ndim(terminated) == 0 and (terminated or truncated):
            said.append(env.reset())
    return said


def same(a, b, key=""):
    if key == "t":  # wall time, in RecordEpisodeStatistics
        return True
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k], k) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return same(a.tolist(), b.tolist())
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def assert_goes_on_alike(make, before=30, after=60, until=lambda env: True):
    """Capture in the middle of an episode, through JSON, and restore into another environment."""
    env, other = make(), make()
    env.action_space.seed(0)
    env.reset(seed=3)
    trajectory(env, [env.action_space.sample() for _ in range(before)])
    while not until(env):
        trajectory(env, [env.action_space.sample()])
    state, tensors = capture_state(env)
    actions = [env.action_space.sample() for _ in range(after)]
    expected = trajectory(env, actions)

    other.reset(seed=99)
    restore_state(other, json.loads(json.dumps(state)), tensors)
    assert same(trajectory(other, actions), expected)
    env.close()
    other.close()


@pytest.mark.parametrize("env_id", CLASSIC + TOY_TEXT)
def test_gymnasiums_own_environments_go_on_exactly(env_id):
    assert_goes_on_alike(lambda: gym.make(env_id))


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujoco_environments_go_on_exactly(env_id):
    pytest.importorskip("mujoco")
    assert_goes_on_alike(lambda: gym.make(env_id), before=25, after=30)


def test_a_taxi_passenger_changes_his_mind_once_also_across_a_restore():
    if "fickle_passenger" not in inspect.signature(TaxiEnv).parameters:
        pytest.skip("this Gymnasium's taxi passengers are firm")

    make = functools.partial(gym.make, TAXI, fickle_passenger=True, fickle_probability=1.0)
    assert_goes_on_alike(make, until=lambda env: not env.unwrapped.fickle_step)


def test_the_native_vector_cartpole_goes_on_exactly():
    assert_goes_on_alike(lambda: gym.make_vec("CartPole-v1", num_envs=5))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", TAXI])
def test_a_sync_vector_environment_goes_on_exactly(env_id, mode):
    def make():
        return SyncVectorEnv([lambda: gym.make(env_id)] * 3, autoreset_mode=mode)

    assert_goes_on_alike(make)


def test_a_sync_vector_environment_goes_on_exactly_between_an_end_and_its_reset():
    assert_goes_on_alike(
        lambda: SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3),
        until=lambda env: env._autoreset_envs.any(),
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_stateless_and_counting_wrappers_go_on_exactly(name):
    assert_goes_on_alike(lambda: WRAPPERS[name](gym.make("Pendulum-v1")))


@pytest.mark.parametrize("name", OTHER_WRAPPERS)
def test_wrappers_with_a_state_of_their_own_are_not_captured(name):
    env = OTHER_WRAPPERS[name](gym.make("Pendulum-v1"))
    env.reset(seed=0)
    assert capture_state(env) is None


class Subclass(CartPoleEnv):
    pass


def test_unknown_environments_are_not_captured():
    class Custom(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(2)

    assert capture_state(Custom()) is None
    assert capture_state(Subclass()) is None  # it may hold more than CartPole does
    assert capture_state(SyncVectorEnv([lambda: gym.make("CartPole-v1"), Subclass])) is None
    workers = AsyncVectorEnv([lambda: gym.make("CartPole-v1")])
    assert capture_state(workers) is None
    workers.close()
    vector = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=2))
    assert capture_state(vector) is None


@pytest.mark.parametrize("env_id", [*CLASSIC, *TOY_TEXT, "vector"])
def test_an_episode_changes_nothing_that_is_not_captured(env_id):
    vector = env_id == "vector"
    env = gym.make_vec("CartPole-v1", num_envs=4) if vector else gym.make(env_id)
    env.action_space.seed(0)
    env.reset(seed=0)
    inner = env.unwrapped

    def attributes():
        packed, tensors = {}, {}
        for name, value in vars(inner).items():
            try:
                packed[name] = env_state._pack(value, name, tensors)
            except TypeError:
                packed[name] = repr(type(value))
        return packed, tensors

    before, before_tensors = attributes()
    trajectory(env, [env.action_space.sample() for _ in range(120)])
    after, after_tensors = attributes()
    changed = {name for name in after if after[name] != before.get(name)}
    changed |= {
        name.partition(".")[0]
        for name, tensor in after_tensors.items()
        if name not in before_tensors or not torch.equal(tensor, before_tensors[name])
    }
    assert changed <= set(env_state._episode_state(inner))


def test_constants_stay_those_of_the_environment_restored_into():
    env, heavier = gym.make("Pendulum-v1", g=9.81), gym.make("Pendulum-v1", g=20.0)
    env.reset(seed=0)
    heavier.reset(seed=1)
    restore_state(heavier, *capture_state(env))
    assert heavier.unwrapped.g == 20.0
    assert np.array_equal(heavier.unwrapped.state, env.unwrapped.state)


class Stateful:
    """An environment of the user's own; only what the two methods need."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_state_dict_comes_back_with_every_type():
    generator = np.random.Generator(np.random.MT19937(5))
    generator.random(3)
    state = {
        "none": None, "flag": True, "integer": 1 << 90, "float": 0.1, "text": "a",
        "nan": float("inf"), "float32": np.float32(0.1), "float64": np.float64(0.1),
        "bool": np.bool_(True), "array": np.arange(6.0).reshape(2, 3)[:, ::-1],
        "scalar array": np.array(3), "tensor": torch.arange(3), "list": [1, (2.0, "b"), []],
        "queue": deque([1, np.float64(2)], maxlen=4), "nested": {"x": {"y": torch.zeros(0)}},
        "a.b": np.zeros(2), "a": {"b": np.ones(2)}, "tensor.": {"tensor": 1, "items": 2},
    }  # fmt: skip
    other = Stateful()
    packed, tensors = capture_state(Stateful({**state, "generator": generator}))
    restore_state(other, json.loads(json.dumps(packed)), tensors)
    restored = other.state.pop("generator")
    assert same(other.state, state)
    assert other.state["queue"].maxlen == 4
    assert restored.bit_generator.__class__ is np.random.MT19937
    assert restored.random() == generator.random()


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_bit_generator_continues(kind):
    generator, other = np.random.Generator(getattr(np.random, kind)(1)), Stateful()
    generator.integers(10, dtype=np.int32)  # leaves half a word behind
    packed, tensors = capture_state(Stateful({"g": generator}))
    restore_state(other, json.loads(json.dumps(packed)), tensors)
    assert np.array_equal(
        other.state["g"].integers(1000, size=50), generator.integers(1000, size=50)
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "env_state.x is a object"),
        ({1: 2}, "env_state.x is a dict"),
        (np.array([object()]), "array of object"),
        (np.zeros(2, ">f8"), "array of >f8"),
        (np.array(["a"]), "array of <U1"),
        (np.longdouble(1), "longdouble"),
        (torch.zeros(2).to_sparse(), "is a Tensor"),
    ],
)
def test_a_state_dict_that_cannot_be_stored_is_named_and_left_out(value, what):
    with pytest.warns(UserWarning, match=f"{what}.*state_dict\\(\\) may hold"):
        assert capture_state(Stateful({"x": value})) is None


def test_a_state_of_another_kind_is_refused():
    def of(make):
        env = make()
        env.reset(seed=0)
        return env

    makers = {
        "pendulum": lambda: gym.make("Pendulum-v1"),
        "cartpole": lambda: gym.make("CartPole-v1"),
        "bare": lambda: gym.make("CartPole-v1").unwrapped,
        "native": lambda: gym.make_vec("CartPole-v1", num_envs=2),
        "two": lambda: SyncVectorEnv([makers["cartpole"]] * 2),
        "three": lambda: SyncVectorEnv([makers["cartpole"]] * 3),
        "same step": lambda: SyncVectorEnv(
            [makers["cartpole"]] * 2, autoreset_mode=AutoresetMode.SAME_STEP
        ),
    }
    states = {name: capture_state(of(make)) for name, make in makers.items()}
    for name, make in makers.items():
        for other, captured in states.items():
            if name != other:
                with pytest.raises(ValueError, match="resume with"):
                    restore_state(of(make), *captured)
