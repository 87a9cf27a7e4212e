"""Every kind of environment is taken, means the same, and fails in plain words."""

import gc
import os
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from ppo_fast import PPO
from ppo_fast.control.collect import Collector
from ppo_fast.control.make_envs import EnvPoolEnv, make_environments
from ppo_fast.control.tensor_envs import TensorEnv
from ppo_fast.distributions import distribution_for

MODES = list(AutoresetMode)
SMALL = {"num_steps": 8, "num_minibatches": 1, "update_epochs": 1}


class Flexible(gym.Env):
    """Counts its steps in an observation of any space; whoever makes it may spoil one of them."""

    action_space = spaces.Discrete(2)

    def __init__(self, observe=None, space=None, limit=3, spoil=None):
        self.observe = observe or (lambda t: np.full(2, t, np.float32))
        self.observation_space = space or spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.limit, self.spoil = limit, spoil
        self.total = 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observe(0), {}

    def step(self, action):
        self.t += 1
        self.total += 1
        result = (self.observe(self.t), 1.0, False, self.t >= self.limit, {})
        return self.spoil(self, result) if self.spoil else result


class Masked(Flexible):
    """Only action t % 2 is legal after t steps, and nothing after the last."""

    def legal(self):
        return np.array([self.t % 2 == 0, self.t % 2 == 1]) & (self.t < self.limit)

    def step(self, action):
        assert action == self.t % 2, "an illegal action"
        return super().step(action)


class MaskedByMethod(Masked):
    def action_masks(self):
        return self.legal()


class MaskedByInfo(Masked):
    def reset(self, *, seed=None, options=None):
        return super().reset()[0], {"action_mask": self.legal().astype(np.int8)}

    def step(self, action):
        return *super().step(action)[:4], {"action_mask": self.legal().astype(np.int8)}


def collector_for(env, steps=8, num_envs=None, policy=None):
    envs = make_environments(env, num_envs, "auto")
    distribution = distribution_for(envs.action_space)
    generator = torch.Generator().manual_seed(0)
    policy = policy or PPO(env, num_envs=num_envs, **SMALL).policy
    collector = Collector(
        envs, policy, distribution, steps, torch.device("cpu"), generator, {}, None
    )
    collector.start(0)
    return collector


# What is taken


def test_an_id_with_a_native_vector_form_gets_it():
    envs = make_environments("CartPole-v1", 3, "native")
    assert isinstance(envs.env, CartPoleVectorEnv) and envs.num_envs == 3
    assert envs.mode == AutoresetMode.NEXT_STEP and envs.env_id == "CartPole-v1"


@pytest.mark.parametrize(
    ("vectorization", "kind"), [("sync", SyncVectorEnv), ("async", AsyncVectorEnv)]
)
def test_vectorization_overrides_the_native_form(vectorization, kind):
    envs = make_environments("CartPole-v1", 2, vectorization)
    assert isinstance(envs.env, kind) and envs.mode == AutoresetMode.SAME_STEP
    assert envs.reset(0).shape == (2, 4)
    envs.close()


def test_an_id_with_a_form_in_torch_gets_that_first():
    envs = make_environments("Acrobot-v1", 3, "auto")
    assert isinstance(envs.env, TensorEnv) and envs.env_id == "Acrobot-v1"
    assert isinstance(make_environments("FrozenLake-v1", 3, "auto").env, SyncVectorEnv)


def test_an_id_without_a_native_form_steps_in_this_process_and_resets_in_the_same_step():
    envs = make_environments("Acrobot-v1", None, "native")
    assert isinstance(envs.env, SyncVectorEnv) and envs.mode == AutoresetMode.SAME_STEP
    assert envs.num_envs == 8


def test_ids_keep_their_time_limit():
    for vectorization in ("auto", "native", "sync"):
        envs = make_environments("CartPole-v1", 1, vectorization)
        limits = (
            [envs.env.max_episode_steps]
            if vectorization != "sync"
            else [env.spec.max_episode_steps for env in envs.env.envs]
        )
        assert limits == [500]


def test_an_id_may_name_the_module_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "registers_chain.py").write_text(
        "import gymnasium\ngymnasium.register('Chain-v0', 'chain:Chain')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    envs = make_environments("registers_chain:Chain-v0", 2, "auto")
    assert envs.num_envs == 2 and envs.env_id == "registers_chain:Chain-v0"
    gym.registry.pop("Chain-v0")


def test_an_instance_is_one_environment():
    env = gym.make("Pendulum-v1")
    envs = make_environments(env, None, "auto")
    assert envs.num_envs == 1 and envs.env.envs[0] is env


@pytest.mark.parametrize("make", [Chain, lambda: Chain(), lambda: gym.make("Acrobot-v1")])
def test_a_class_or_callable_is_called_for_every_environment(make):
    envs = make_environments(make, 3, "auto")
    assert len({id(env) for env in envs.env.envs}) == 3


def test_a_callable_may_return_a_vector_or_a_tensor_environment():
    assert isinstance(make_environments(lambda: NativeChain(5), None, "auto").env, NativeChain)
    assert make_environments(lambda: TensorChain(5), 5, "auto").num_envs == 5


def test_a_vector_environment_is_taken_as_it_is():
    vector = SyncVectorEnv([Chain] * 2, autoreset_mode=AutoresetMode.DISABLED)
    envs = make_environments(vector, None, "auto")
    assert envs.env is vector and envs.mode == AutoresetMode.DISABLED


def test_a_vector_environment_that_names_no_mode_is_gymnasiums_default():
    vector = NativeChain(2)
    vector.metadata = {}
    with pytest.warns(UserWarning, match="names no 'autoreset_mode'"):
        assert make_environments(vector, None, "auto").mode == AutoresetMode.NEXT_STEP


def test_a_tensor_environment_resets_in_the_same_step():
    envs = make_environments(TensorChain(2), None, "auto")
    assert isinstance(envs.reset(0), torch.Tensor) and envs.on_device
    assert envs.mode == AutoresetMode.SAME_STEP


def test_rsl_rl_sizes_become_spaces():
    class Robot:
        num_envs, num_actions = 4, 3

        def get_observations(self):
            return {"policy": torch.zeros(4, 5), "critic": torch.zeros(4, 9)}

        def reset(self):
            return self.get_observations(), {}

        def step(self, actions):
            assert actions.shape == (4, 3)
            none = torch.zeros(4)
            return self.get_observations(), none, none.long(), {"time_outs": none.bool()}

    model = PPO(Robot(), **SMALL).learn(32)
    assert list(model.leaves) == ["policy"] and model.leaves["policy"].shape == (5,)
    assert model.action_space.shape == (3,) and model.num_timesteps == 32


def test_rsl_rls_time_outs_count_at_an_episodes_end_alone():
    class Eager(TensorChain):
        def step(self, actions):
            obs, rewards, dones, info = super().step(actions)
            return obs, rewards, dones, {**info, "time_outs": torch.ones(self.num_envs)}

    rollout = collector_for(Eager(2, style="rsl_rl"), 20, policy=ChainPolicy()).collect()
    assert rollout.truncated.any() and not rollout.truncated.all()
    assert not rollout.terminated.any()


def test_envpool_equals_gymnasium_in_the_rows_of_an_episodes_end():
    envpool = pytest.importorskip("envpool")
    pool = envpool.make_gymnasium("CartPole-v1", num_envs=3, seed=1, max_episode_steps=12)
    envs = make_environments(pool, None, "auto")
    assert isinstance(envs.env, EnvPoolEnv) and envs.mode == AutoresetMode.NEXT_STEP
    collector = collector_for(pool, 60)
    rollout = collector.collect()
    done = rollout.terminated | rollout.truncated
    assert rollout.truncated.any() and done.any()
    assert torch.equal(rollout.mask[1:], ~done[:-1])
    spurious = rollout.inputs[1:][~rollout.mask]
    assert (spurious.abs() <= 0.05).all() and (rollout.rewards[~rollout.mask] == 0).all()
    envs.close()


def test_envpool_trains_on_box_actions():
    envpool = pytest.importorskip("envpool")
    pool = envpool.make_gymnasium("Pendulum-v1", num_envs=2, seed=1)
    assert PPO(pool, **SMALL).learn(16).num_timesteps == 16


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_ales_own_vector_environment_trains_in_both_of_its_modes(mode):
    ale_py = pytest.importorskip("ale_py")
    env = ale_py.vector_env.AtariVectorEnv(
        "pong",
        num_envs=2,
        img_height=36,
        img_width=36,
        autoreset_mode=mode,
        max_num_frames_per_episode=40,
    )
    model = PPO(env, num_steps=24, num_minibatches=2, update_epochs=1).learn(40)
    rollout = model.collector.rollout
    assert rollout.inputs.dtype == torch.uint8 and rollout.truncated.any()
    assert not model.envs.approximate_truncation
    assert rollout.all_valid == (mode == AutoresetMode.SAME_STEP)
    cut = rollout.truncated & ~rollout.terminated
    assert (rollout.bootstrap_values[cut] != 0).all()
    assert model.metrics["train/first_ratio_deviation"] < 1e-5
    model.close()


def test_ale_ids_need_no_import_by_the_user():
    pytest.importorskip("ale_py")
    envs = make_environments("ALE/Pong-v5", 2, "auto")
    assert type(envs.env).__name__ == "AtariVectorEnv"
    envs.close()


# What the rows are


SPACES = {
    "dict": (
        spaces.Dict({"camera": spaces.Box(0, 255, (7, 7, 3), np.uint8), "n": spaces.Discrete(9)}),
        lambda t: {"camera": np.full((7, 7, 3), t, np.uint8), "n": np.int64(t)},
    ),
    "tuple": (
        spaces.Tuple((spaces.Box(-9, 9, (), np.float32), spaces.MultiBinary(2))),
        lambda t: (np.float32(t), np.array([t % 2, 1], np.int8)),
    ),
    "image": (
        spaces.Box(0, 255, (8, 8, 1), np.uint8),
        lambda t: np.full((8, 8, 1), t, np.uint8),
    ),
    "discrete": (spaces.Discrete(9), lambda t: np.int64(t)),
    "multi-discrete": (spaces.MultiDiscrete([9, 2]), lambda t: np.array([t, t % 2])),
}


@pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("name", SPACES)
def test_truncated_rows_bootstrap_from_the_last_observation_in_every_mode(name, vector):
    space, observe = SPACES[name]
    model = PPO(lambda: Flexible(observe, space), **SMALL)
    last = model.predict_values(observe(4))
    for mode in MODES:
        env = vector([lambda: Flexible(observe, space, limit=4)] * 2, autoreset_mode=mode)
        rollout = collector_for(env, 9, policy=model.policy).collect()
        bootstraps = rollout.bootstrap_values[rollout.truncated]
        assert len(bootstraps) in (2, 4)
        np.testing.assert_allclose(bootstraps, last, rtol=1e-4, err_msg=str(mode))
        env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_tensors_around_a_numpy_vector_environment_change_nothing(mode):
    class InTensors(gym.vector.VectorWrapper):
        """As gymnasium.wrappers.vector.NumpyToTorch: infos may keep arrays of objects."""

        def reset(self, *, seed=None, options=None):
            obs, info = self.env.reset(seed=seed, options=options)
            return torch.from_numpy(obs), info

        def step(self, actions):
            *arrays, info = self.env.step(actions.numpy())
            return *(torch.from_numpy(array) for array in arrays), info

    def rollout_of(wrap):
        env = wrap(SyncVectorEnv([Chain] * 2, autoreset_mode=mode))
        return collector_for(env, 30, policy=ChainPolicy()).collect()

    plain, wrapped = rollout_of(lambda env: env), rollout_of(InTensors)
    assert (plain.truncated & ~plain.terminated).any()
    for field in ("inputs", "rewards", "terminated", "truncated", "mask", "bootstrap_values"):
        torch.testing.assert_close(getattr(wrapped, field), getattr(plain, field))


class Reusing(Flexible):
    """Returns one and the same array, whose contents change."""

    def __init__(self):
        super().__init__(lambda t: self.array)
        self.array = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        self.array[:] = 0
        return super().reset()

    def step(self, action):
        self.array += 1
        return super().step(action)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_environments_may_reuse_their_observations_array(mode):
    model = PPO(Flexible, **SMALL)
    last = model.predict_values(np.full(2, 3.0, np.float32))
    vector = SyncVectorEnv([Reusing] * 2, autoreset_mode=mode)
    workers = make_environments(Reusing, 2, "async").env
    for env in (vector, workers):
        rollout = collector_for(env, policy=model.policy).collect()
        assert rollout.truncated.any()
        np.testing.assert_allclose(rollout.bootstrap_values[rollout.truncated], last, rtol=1e-5)
    workers.close()


def test_an_array_that_reset_has_overwritten_is_noticed():
    env = SyncVectorEnv([Flexible, Reusing], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=r"environment 1 returns its observations in one array"):
        PPO(env, **SMALL).learn(16)


def test_both_ends_at_once_is_a_termination():
    def both(env, result):
        return (*result[:2], result[3], result[3], {})

    collector = collector_for(lambda: Flexible(spoil=both), num_envs=2)
    rollout = collector.collect()
    assert (rollout.terminated & rollout.truncated).any()
    assert rollout.bootstrap_values.eq(0).all()


def test_flags_of_other_dtypes_are_flags():
    class Floats(NativeChain):
        def step(self, actions):
            obs, rewards, terminated, truncated, info = super().step(actions)
            return obs, rewards, terminated.astype(np.float32), truncated.astype(int), info

    plain = collector_for(NativeChain(2), 20, policy=ChainPolicy()).collect()
    rollout = collector_for(Floats(2), 20, policy=ChainPolicy()).collect()
    assert torch.equal(rollout.terminated, plain.terminated) and plain.terminated.any()
    assert torch.equal(rollout.truncated, plain.truncated) and plain.truncated.any()
    assert torch.equal(rollout.mask, plain.mask)


@pytest.mark.parametrize("masked", [MaskedByInfo, MaskedByMethod])
@pytest.mark.parametrize("mode", MODES)
def test_action_masks_fit_the_observation_in_every_mode(masked, mode):
    """The environment itself asserts that every action is legal."""
    makers = [lambda: masked(limit=3), lambda: masked(limit=4)]
    collector = collector_for(SyncVectorEnv(makers, autoreset_mode=mode), 40)
    rollout = collector.collect()
    assert rollout.action_mask is not None and not rollout.action_mask.all()
    assert rollout.action_mask.gather(-1, rollout.actions.unsqueeze(-1)).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_environment_that_tells_no_mask_may_do_anything(mode):
    env = SyncVectorEnv([lambda: MaskedByInfo(limit=4), Flexible], autoreset_mode=mode)
    rollout = collector_for(env, 20).collect()
    assert rollout.action_mask[:, 1].all() and not rollout.action_mask[:, 0].all()


def test_a_vector_wrapper_hides_no_action_masks():
    env = SyncVectorEnv([lambda: MaskedByMethod()] * 2)
    collector = collector_for(gym.wrappers.vector.RecordEpisodeStatistics(env), 10)
    assert not collector.collect().action_mask.all()


def test_an_action_mask_told_only_by_steps_is_used():
    class Late(Flexible):
        def step(self, action):
            assert self.t == 0 or action == self.t % 2
            result = super().step(action)[:4]
            return *result, {"action_mask": np.array([self.t % 2 == 0, self.t % 2 == 1])}

    # 32 steps: a row that tells nothing meets one of the rollout before that told something.
    collector = collector_for(lambda: Late(limit=5), 32, num_envs=2)
    for _ in range(2):
        rollout = collector.collect()
        assert rollout.action_mask is not None
        firsts = rollout.inputs[:-1, :, 0] == 0
        assert rollout.action_mask[firsts].all() and not rollout.action_mask[~firsts].all(-1).any()


def test_a_resumed_run_begins_with_the_masks_it_stopped_with(tmp_path):
    model = PPO("Taxi-v4", **SMALL).learn(100)
    model.save(tmp_path / "taxi.safetensors")
    loaded = PPO.load(tmp_path / "taxi.safetensors")
    loaded._start()
    masks = model.envs.action_masks()
    np.testing.assert_array_equal(loaded.envs.action_masks(), masks)
    fresh = PPO("Taxi-v4", **SMALL)
    fresh._start()
    assert not masks.all() and (fresh.envs.action_masks() != masks).any()


class Haunted(NativeChain):
    """Rewards NaN in the rows that are no transitions."""

    def step(self, actions):
        over = self.over
        obs, rewards, *rest = super().step(actions)
        return obs, np.where(over, np.nan, rewards), *rest


@pytest.mark.parametrize("config", [{}, {"norm_reward": True}])
def test_rewards_of_rows_that_are_no_transitions_are_not_read(config):
    def train(env):
        return PPO(env, num_steps=32, num_minibatches=2, **config).learn(100)

    haunted, plain = train(Haunted(2)), train(NativeChain(2))
    assert haunted.metrics["rollout/ep_rew_mean"] == plain.metrics["rollout/ep_rew_mean"]
    for a, b in zip(haunted.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(a, b)


# What is refused, and how


def test_unknown_ids_are_named_and_resembling_ones_suggested():
    with pytest.raises(ValueError, match=r"'CartPol-v1' is unknown to Gymnasium.*CartPole"):
        PPO("CartPol-v1")
    with pytest.raises(ValueError, match=r"LunarLander-v2") as error:
        PPO("LunarLander-v2")
    assert "pip install" not in str(error.value)
    with pytest.raises(ValueError, match=r"module that does not import.*no_such_module"):
        PPO("no_such_module:Thing-v0")


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [("HalfCheetah-v5", "mujoco", "mujoco"), ("LunarLander-v3", "Box2D", "box2d")],
)
def test_a_missing_package_names_its_extra(monkeypatch, env_id, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if "gymnasium.envs." + extra in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"'{env_id}' needs a package.*ppo-fast\[{extra}\]"):
        make_environments(env_id, 1, "auto")


def test_missing_atari_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    for env_id in [env_id for env_id in gym.registry if env_id.startswith("ALE/")]:
        monkeypatch.delitem(gym.registry, env_id)
    with pytest.raises(ValueError, match=r"'ALE/Pong-v5' is unknown.*ppo-fast\[atari\]"):
        make_environments("ALE/Pong-v5", 1, "auto")


@pytest.mark.parametrize("env", [NativeChain(3), Chain(), TensorChain(3)])
def test_num_envs_that_contradicts_the_environment_is_refused(env):
    with pytest.raises(ValueError, match=r"num_envs = 4, but the environment given has [13]"):
        PPO(env, num_envs=4)


@pytest.mark.parametrize("env", [42, None, object(), [Chain]])
def test_what_is_no_environment_is_refused(env):
    with pytest.raises(TypeError, match="expected a Gymnasium id, an Env, a callable"):
        PPO(env)


def test_what_has_no_spaces_is_refused():
    class Bare:
        num_envs = 2

        def reset(self):
            return None

        def step(self, actions):
            return None

    with pytest.raises(TypeError, match="no single_observation_space"):
        PPO(Bare())


def test_a_callable_that_returns_one_environment_again_and_again_is_refused():
    env = Chain()
    with pytest.raises(ValueError, match="returned the same environment twice"):
        PPO(lambda: env, num_envs=2)


def test_spaces_without_support_are_refused():
    class Words(Flexible):
        observation_space = spaces.Text(5)

        def __init__(self):
            pass

    class Graphs(Chain):
        action_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))

    with pytest.raises(ValueError, match=r"observation space Text.*expected Box, Discrete"):
        PPO(Words)
    with pytest.raises(ValueError, match=r"action space Tuple.*expected Discrete, Multi"):
        PPO(Graphs)


def run_spoiled(change, num_envs=2, **config):
    """Train on environments of which the last is spoiled at its fifth step."""
    made = []

    def make():
        made.append(None)
        spoil = change if len(made) == num_envs else None
        return Flexible(spoil=lambda env, r: spoil(r) if spoil and env.total == 5 else r)

    return PPO(make, num_envs=num_envs, **{**SMALL, **config}).learn(100)


def test_a_step_of_three_values_is_refused():
    class Old(NativeChain):
        def step(self, actions):
            return super().step(actions)[:3]

    with pytest.raises(ValueError, match="step returned 3 values; expected"):
        PPO(Old(2), **SMALL).learn(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r[0][:1], *r[1:]), r"observation has shape \(1, 1\); expected.*\(2, 1\)"),
        (lambda r: (r[0][:, :, None], *r[1:]), r"observation has shape \(2, 1, 1\)"),
        (lambda r: (r[0], r[1][:, None], *r[2:]), r"rewards of shape \(2, 1\); expected.*\(2,\)"),
        (lambda r: (*r[:2], r[2][:1], *r[3:]), r"terminated of shape \(1,\)"),
        (lambda r: (*r[:3], r[3].any(), r[4]), r"truncated of shape \(\)"),
    ],
)
@pytest.mark.parametrize("base", [NativeChain, TensorChain])
def test_shapes_other_than_promised_are_refused_and_not_broadcast(base, change, message):
    class Misshapen(base):
        def step(self, actions):
            return change(super().step(actions))

    with pytest.raises(ValueError, match=message):
        PPO(Misshapen(2), **SMALL).learn(16)


def test_a_first_observation_of_another_shape_or_dtype_is_refused():
    class Wide(NativeChain):
        def reset(self, **options):
            return np.zeros((self.num_envs, 3), np.float32), {}

    class Fractions(NativeChain):
        def __init__(self):
            super().__init__(2)
            self.single_observation_space = spaces.Box(0, 255, (1,), np.uint8)

    class Nameless(NativeChain):
        def reset(self, **options):
            return {"a": np.zeros((2, 1))}, {}

    with pytest.raises(ValueError, match=r"observation has shape \(2, 3\); expected.*\(2, 1\)"):
        PPO(Wide(2), **SMALL).learn(16)
    with pytest.raises(ValueError, match="observation has dtype float32; expected uint8"):
        PPO(Fractions(), **SMALL).learn(16)
    with pytest.raises(
        ValueError, match=r"observation is missing; the environment returned \['a'\]"
    ):
        PPO(Nameless(2), **SMALL).learn(16)


@pytest.mark.parametrize("config", [{}, {"norm_obs": True, "norm_reward": True}])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_observation_names_environment_and_step(bad, config):
    def change(r):
        return np.array([0, bad], np.float32), *r[1:]

    with pytest.raises(
        ValueError, match=r"environment 1 returned observation = .* at step 4 of the"
    ):
        run_spoiled(change, **config)


@pytest.mark.parametrize("config", [{}, {"norm_obs": True, "norm_reward": True}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_reward_names_environment_and_step(bad, config):
    with pytest.raises(ValueError, match=f"environment 1 returned reward = {bad} at step 4 of the"):
        run_spoiled(lambda r: (r[0], bad, *r[2:]), **config)


@pytest.mark.parametrize("config", [{}, {"norm_obs": True}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_last_observation_of_a_truncated_episode_is_found(bad, config):
    def change(r):
        return np.array([0, bad], np.float32), 1.0, False, True, {}

    with pytest.raises(ValueError, match=r"environment 1 returned last observation .* at step 4"):
        run_spoiled(change, **config)


def test_a_bad_observation_from_reset_is_found():
    with pytest.raises(
        ValueError, match=r"environment 0 returned observation = \[nan.* from reset"
    ):
        PPO(lambda: Flexible(lambda t: np.full(2, np.nan, np.float32)), **SMALL).learn(8)


def test_a_bad_observation_leaves_no_trace_in_what_is_saved(tmp_path):
    run = tmp_path / "run"

    def change(r):
        return np.array([0, np.inf], np.float32), *r[1:]

    with pytest.raises(ValueError, match="environment 1"):
        run_spoiled(change, norm_obs=True, num_steps=2, run_dir=str(run))
    loaded = PPO.load(run)
    assert loaded.num_timesteps == 8
    assert loaded.obs_normalizers[""].moments.mean.isfinite().all()


def test_an_action_mask_without_a_legal_action_names_environment_and_step():
    def forbid(env, result):
        return *result[:4], {"action_mask": np.array([env.t != 2] * 2)}

    with pytest.raises(ValueError, match="environment 0 forbids every action at step 2"):
        PPO(lambda: Flexible(limit=9, spoil=forbid), **SMALL).learn(16)


def test_action_masks_of_another_width_or_for_continuous_actions_are_refused():
    def narrow(env, result):
        return *result[:4], {"action_mask": np.ones(3, bool)}

    with pytest.raises(ValueError, match=r"action mask has shape \(8, 3\); expected.*\(8, 2\)"):
        PPO(lambda: Flexible(spoil=narrow), **SMALL).learn(16)

    class Pushed(Flexible):
        action_space = spaces.Box(-1, 1, (2,))

    with pytest.raises(ValueError, match="action masks, but its actions are continuous"):
        PPO(lambda: Pushed(spoil=narrow), **SMALL).learn(16)


# What fails on the way: the traceback comes out, and what was learnt is on disk


class Crashing(Flexible):
    """Raises, or ends its process, at its 20th step."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def step(self, action):
        if self.total == 19:
            if self.how == "exit":
                os._exit(3)
            raise KeyError("the simulator broke")
        return super().step(action)


@pytest.mark.parametrize(
    ("vectorization", "how", "error", "message"),
    [
        ("sync", "raise", KeyError, "the simulator broke"),
        ("async", "raise", KeyError, "the simulator broke"),
        ("async", "exit", RuntimeError, "worker process of environment 1 ended with exit code 3"),
    ],
)
def test_a_failing_environment_ends_the_run_and_leaves_a_checkpoint(
    tmp_path, vectorization, how, error, message
):
    run = tmp_path / "run"
    vector = AsyncVectorEnv if vectorization == "async" else SyncVectorEnv
    env = vector([Flexible, lambda: Crashing(how)], autoreset_mode=AutoresetMode.SAME_STEP)
    model = PPO(env, run_dir=str(run), **SMALL)
    with pytest.raises(error, match=message):
        model.learn(1000)
    loaded = PPO.load(run)
    assert loaded.num_timesteps == 32
    actions, _ = loaded.predict(np.zeros((3, 2), np.float32))
    assert actions.shape == (3,)
    model.close()


def test_a_run_after_a_failure_begins_new_episodes():
    failures = []

    class Once(Flexible):
        def step(self, action):
            if self.total == 4 and not failures:
                failures.append(None)
                raise RuntimeError("once")
            return super().step(action)

    model = PPO(Once, num_envs=2, **{**SMALL, "num_steps": 6})
    with pytest.raises(RuntimeError, match="once"):
        model.learn(12)
    model.learn(12)
    assert model.num_timesteps == 12 and (model.collector.rollout.inputs[0] == 0).all()
    assert list(model.episodes.lengths) == [3, 3, 3, 3]


def test_a_dead_workers_environment_is_forgotten_without_a_second_traceback(monkeypatch):
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    model = PPO(AsyncVectorEnv([Flexible, lambda: Crashing("exit")]), **SMALL)
    with pytest.raises(RuntimeError, match="exit code 3"):
        model.learn(1000)
    model.close()
    del model
    gc.collect()
    assert noise == []


def test_workers_leave_ctrl_c_to_the_training_process():
    envs = make_environments(lambda: Flexible(), 2, "async")
    collector = collector_for(envs.env, 4)
    for process in envs.env.processes:
        os.kill(process.pid, 2)
    collector.collect()
    assert all(process.is_alive() for process in envs.env.processes)
    envs.close()
