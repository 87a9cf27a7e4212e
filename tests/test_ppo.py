"""The trainer: what it counts, schedules, reports and learns, and that a plain loop agrees."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from ppo_fast import PPO, ControlConfig

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}


class Toy(gym.Env):
    """Any spaces; the reward is 1 for action 0, or near 0."""

    def __init__(self, observation_space=None, action_space=None, limit=9):
        self.observation_space = observation_space or spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = action_space or spaces.Discrete(2)
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        reward = 1.0 - float(np.abs(action).mean())
        return self.observation_space.sample(), reward, False, self.t >= self.limit, {}


# Counting and stopping


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: SyncVectorEnv([Chain] * 2, autoreset_mode=AutoresetMode.SAME_STEP), True),
        (lambda: SyncVectorEnv([Chain] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), False),
        (lambda: NativeChain(2), False),
        (lambda: TensorChain(2), True),
    ],
)
def test_learn_counts_transitions_and_no_resets_and_rounds_up(make, exact):
    rows = []

    def callback(model):
        rows.append(int(model.collector.rollout.mask.sum()))

    model = PPO(make(), num_steps=16, num_minibatches=1).learn(100, callback)
    assert model.num_timesteps == sum(rows) >= 100 > sum(rows[:-1])
    assert all(count == 32 for count in rows) == exact
    assert model.metrics["time/total_timesteps"] == model.num_timesteps
    finished = model.episodes.finished
    model.learn(1)
    assert model.num_timesteps == sum(rows) + int(model.collector.rollout.mask.sum())
    assert model.episodes.finished >= finished  # episodes go on over calls


def test_a_callback_sees_every_iteration_and_false_ends_the_call():
    seen = []

    def callback(model):
        seen.append((model.iteration, model.num_timesteps, model.metrics["time/iterations"]))
        return len(seen) < 3

    model = PPO(Toy, **SMALL).learn(10_000, callback)
    assert seen == [(1, 32, 1), (2, 64, 2), (3, 96, 3)]
    model.resume(lambda model: model.iteration < 5)
    assert model.iteration == 5


def test_nothing_to_do_is_refused():
    model = PPO(Toy, **SMALL)
    with pytest.raises(ValueError, match="total_timesteps = 0; expected at least 1"):
        model.learn(0)
    model.learn(32)
    with pytest.raises(ValueError, match="the last call of learn was finished"):
        model.resume()


def test_a_return_reached_ends_the_call():
    model = PPO(Toy, stop_return=-100.0, stats_window=5, **SMALL).learn(10_000)
    assert model.num_timesteps == 64  # of the first rollout's two episodes no window is full


# Schedules


def over_a_call(config, keys, total=320, calls=1):
    rows = []

    def callback(model):
        rows.append([model.metrics[key] for key in keys])

    model = PPO(Toy, **{**SMALL, **config})
    for _ in range(calls):
        model.learn(total, callback)
    return model, np.array(rows)


KEYS = ("train/learning_rate", "train/clip_range")


def test_linear_schedules_run_from_the_first_value_towards_0_over_every_call():
    config = {"learning_rate": 1e-2, "anneal_lr": True, "anneal_clip": True, "clip_coef": 0.4}
    _, rows = over_a_call(config, KEYS, calls=2)
    remaining = np.tile(1 - np.arange(10) / 10, 2)
    np.testing.assert_allclose(rows[:, 0], 1e-2 * remaining, rtol=1e-6)
    np.testing.assert_allclose(rows[:, 1], 0.4 * remaining, rtol=1e-6)


def test_constant_schedules_stay():
    _, rows = over_a_call({"learning_rate": 1e-2, "anneal_lr": False}, KEYS)
    np.testing.assert_allclose(rows, np.tile([1e-2, 0.2], (10, 1)), rtol=1e-6)


def test_functions_of_the_remaining_progress_are_schedules():
    config = {
        "learning_rate": lambda remaining: 1e-3 + remaining**2,
        "clip_coef": lambda remaining: 0.1 + remaining,
        "clip_coef_high": 0.55,
        "ent_coef": lambda remaining: 7 * remaining,
    }
    highs, entropies = [], []

    class Watching(PPO):
        def _anneal(self):
            super()._anneal()
            highs.append(float(self._clip_coef_high))
            entropies.append(float(self._ent_coef))

    rows = []
    model = Watching(Toy, **{**SMALL, **config})
    model.learn(320, lambda m: rows.append([m.metrics[key] for key in KEYS]))
    remaining = 1 - np.arange(10) / 10
    np.testing.assert_allclose(np.array(rows)[:, 0], 1e-3 + remaining**2, rtol=1e-6)
    np.testing.assert_allclose(np.array(rows)[:, 1], 0.1 + remaining, rtol=1e-6)
    np.testing.assert_allclose(highs, 0.5 * (0.1 + remaining), rtol=1e-6)  # in proportion
    np.testing.assert_allclose(entropies, 7 * remaining, rtol=1e-6)
    assert model.config.learning_rate == pytest.approx(1.001)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_schedule_that_leaves_the_numbers_is_refused(bad):
    model = PPO(Toy, learning_rate=lambda p: 1.0 if p == 1 else bad, **SMALL)
    with pytest.raises(ValueError, match=r"learning_rate\(0.5\) = .*; expected a number >= 0"):
        model.learn(64)
    assert all(p.isfinite().all() for p in model.policy.parameters())


def test_the_adaptive_learning_rate_replaces_the_schedule():
    _, rows = over_a_call({"learning_rate": 1e-4, "adaptive_lr_kl": 0.05}, KEYS)
    assert rows[-1, 0] > 1e-3 and (np.diff(rows[:, 0]) != 0).any()


# KL


def test_target_kl_stops_updates_and_is_reported():
    keys = ("train/stopped_by_target_kl", "train/optimizer_steps", "train/approx_kl")
    config = {"target_kl": 1e-3, "learning_rate": 3e-2, "update_epochs": 8, "anneal_lr": False}
    _, rows = over_a_call(config, keys)
    assert rows[:, 0].max() == 1
    stopped = rows[:, 0] == 1
    assert (rows[stopped, 1] < 16).all() and (rows[:, 2] <= 1e-3).all()


@pytest.mark.parametrize("rule", ["paper", "proportional"])
def test_an_adaptive_kl_penalty_moves_and_is_logged(rule):
    config = {
        "kl_coef": 1.0,
        "kl_controller": rule,
        "kl_target": 1e-3,
        "kl_horizon": 100,
        "learning_rate": 1e-1,
        "anneal_lr": False,
    }
    used, logged = [], []

    def callback(model):
        used.append(float(model._kl_coef))
        logged.append(model.metrics["train/kl_coef"])

    PPO(Toy, **{**SMALL, **config}).learn(320, callback)
    assert len(set(logged)) > 3 and max(logged) > 1
    np.testing.assert_allclose(used, [1.0, *logged[:-1]], rtol=1e-6)


def test_a_kl_penalty_keeps_the_policy_nearer():
    def kl(coef):
        config = {"kl_coef": coef, "learning_rate": 3e-2, "update_epochs": 8, "anneal_lr": False}
        return over_a_call(config, ("train/approx_kl",))[1].mean()

    assert kl(100.0) < 0.5 * kl(0.0)
    assert "train/kl_coef" not in PPO(Toy, **SMALL).learn(32).metrics


# Prediction


SET_UPS = {
    "discrete": ({}, {}),
    "continuous": ({"action_space": spaces.Box(-1, 1, (2,), np.float32)}, {}),
    "squashed": ({"action_space": spaces.Box(-1, 3, (2,), np.float32)}, {"squash": True}),
    "multi-discrete": ({"action_space": spaces.MultiDiscrete([2, 4])}, {}),
    "multi-binary": ({"action_space": spaces.MultiBinary(3)}, {}),
    "image": ({"observation_space": spaces.Box(0, 255, (12, 12, 1), np.uint8)}, {}),
    "dict": (
        {
            "observation_space": spaces.Dict(
                {"a": spaces.Box(-1, 1, (2,)), "b": spaces.Tuple((spaces.Discrete(3),) * 2)}
            )
        },
        {},
    ),
    "normalised": ({}, {"norm_obs": True, "norm_reward": True}),
}


def make(name, **config):
    envs, settings = SET_UPS[name]
    return PPO(lambda: Toy(**envs), **{**SMALL, **settings, **config})


def batch_of(space, rows):
    space.seed(0)
    if isinstance(space, spaces.Dict):
        return {key: batch_of(child, rows) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(batch_of(child, rows) for child in space.spaces)
    return np.stack([space.sample() for _ in range(rows)])


@pytest.mark.parametrize("name", SET_UPS)
def test_prediction_takes_one_observation_or_a_batch(name):
    model = make(name)
    space = model.observation_space
    for deterministic in (True, False):
        action, state = model.predict(space.sample(), deterministic)
        assert state is None and model.action_space.contains(action)
        actions, _ = model.predict(batch_of(space, 5), deterministic)
        assert actions.shape == (5, *model.action_space.shape)
        assert all(model.action_space.contains(action) for action in actions)
    assert model.predict_values(space.sample()).shape == ()
    assert model.predict_values(batch_of(space, 5)).shape == (5,)


def test_prediction_of_a_batch_is_that_of_its_rows():
    model = make("discrete")
    with torch.no_grad():
        model.policy.actor_net[-1].weight.mul_(100)  # no ties that rounding could break
    obs = batch_of(model.observation_space, 20)
    np.testing.assert_array_equal(model.predict(obs)[0], [model.predict(row)[0] for row in obs])
    values = [model.predict_values(row) for row in obs]
    np.testing.assert_allclose(model.predict_values(obs), values, rtol=1e-5)


def test_a_predicted_discrete_action_is_a_number_that_can_be_a_key():
    action, _ = make("discrete").predict(np.zeros(3, np.float32))
    assert {0: "left", 1: "right"}[action]


def test_tensors_come_back_for_tensors():
    model = make("dict")
    obs = {"a": torch.zeros(4, 2), "b": (torch.zeros(4).long(),) * 2}
    assert isinstance(model.predict(obs)[0], torch.Tensor)
    assert isinstance(model.predict_values(obs), torch.Tensor)


def test_deterministic_prediction_is_the_mode_and_the_other_draws():
    model = make("discrete")
    obs = np.zeros((500, 3), np.float32)
    assert len(set(model.predict(obs)[0].tolist())) == 1
    drawn = model.predict(obs, deterministic=False)[0]
    probability = model.policy.actor(torch.zeros(1, 3)).softmax(-1)[0, 1].item()
    assert drawn.mean() == pytest.approx(probability, abs=0.1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_prediction_obeys_masks(deterministic):
    model = make("multi-discrete")
    legal = np.array([False, True, False, False, True, True])
    action, _ = model.predict(np.zeros(3, np.float32), deterministic, legal)
    assert action[0] == 1 and action[1] in (2, 3)
    masks = np.stack([legal, np.array([True, False, True, False, False, False])])
    actions, _ = model.predict(np.zeros((2, 3), np.float32), deterministic, masks)
    assert actions[1].tolist() == [0, 0]


def test_bad_masks_and_observations_are_refused():
    model = make("discrete")
    obs = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"action mask has shape \(1, 2\); expected .*\(4, 2\)"):
        model.predict(obs, action_masks=[True, False])
    with pytest.raises(ValueError, match="forbids every choice"):
        model.predict(obs[0], action_masks=[False, False])
    with pytest.raises(ValueError, match=r"shape \(4, 4\); expected \(3,\), or a batch \[M, 3\]"):
        model.predict(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="actions are continuous"):
        make("continuous").predict(obs[0], action_masks=[True, True])


# What is reported


def test_metrics_are_finite_floats_under_the_usual_names():
    metrics = make("continuous").learn(256).metrics
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert set(metrics) == {
        "rollout/ep_rew_mean",
        "rollout/ep_len_mean",
        "rollout/episodes",
        *(
            f"train/{name}"
            for name in (
                *("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl"),
                *("clip_fraction", "dual_clip_fraction", "value_clip_fraction", "ratio_mean"),
                *("ratio_deviation", "explained_variance", "learning_rate", "clip_range"),
                *("grad_norm", "optimizer_steps", "skipped_steps", "stopped_by_target_kl"),
                *("first_ratio_deviation", "std"),
            )
        ),
        *(
            f"time/{name}"
            for name in (
                *("iterations", "total_timesteps", "sps", "rollout_seconds", "gae_seconds"),
                *("update_seconds", "log_seconds", "inference_seconds", "environment_seconds"),
                "storing_seconds",
            )
        ),
    }


@pytest.mark.parametrize("name", SET_UPS)
def test_the_first_minibatch_of_every_update_has_ratio_one(name):
    deviations = []
    model = make(name, learning_rate=1e-2)
    model.learn(128, lambda m: deviations.append(m.metrics["train/first_ratio_deviation"]))
    assert len(deviations) == 4 and max(deviations) < 1e-5
    assert model.metrics["train/ratio_deviation"] > 1e-4


class Guarded(Toy):
    """Every action is legal at some time; an illegal one fails."""

    def __init__(self, informs, action_space=None):
        super().__init__(action_space=action_space or spaces.Discrete(4))
        self.informs = informs

    def legal(self):
        heads = np.atleast_1d(
            getattr(self.action_space, "nvec", getattr(self.action_space, "n", 0))
        )
        return np.concatenate([np.arange(n) % 2 == self.t % 2 for n in heads])

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, self.info()

    def info(self):
        return {"action_mask": self.legal()} if self.informs else {}

    def step(self, action):
        assert (np.atleast_1d(action) % 2 == self.t % 2).all(), "an illegal action"
        return *super().step(action)[:4], self.info()


class GuardedByMethod(Guarded):
    def action_masks(self):
        return self.legal()


@pytest.mark.parametrize("env", [lambda: Guarded(True), lambda: GuardedByMethod(False)])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_masks_hold_over_a_whole_training_run(env, mode):
    vector = SyncVectorEnv([env] * 2, autoreset_mode=mode)
    deviations = []
    model = PPO(vector, learning_rate=1e-2, **SMALL)
    model.learn(512, lambda m: deviations.append(m.metrics["train/first_ratio_deviation"]))
    assert max(deviations) < 1e-5
    assert 0 < model.metrics["train/entropy"] <= math.log(2) + 1e-6  # two of four are legal


def test_masks_hold_over_the_heads_of_a_multi_discrete_action():
    space = spaces.MultiDiscrete([2, 4])
    model = PPO(lambda: Guarded(True, space), **SMALL).learn(256)
    assert model.metrics["train/entropy"] <= math.log(2) + 1e-6  # the first head has no choice


# Learning


def parameters_after(seed, **config):
    model = PPO(Toy, seed=seed, **{**SMALL, **config}).learn(96)
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def test_the_same_seed_gives_the_same_parameters_bit_for_bit_and_another_gives_others():
    first, again, other = (parameters_after(seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_threads_and_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    threads = torch.get_num_threads()
    states = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    inside = []
    PPO("CartPole-v1", torch_threads=2, **SMALL).learn(
        64, lambda model: inside.append(torch.get_num_threads())
    )
    assert set(inside) == {2} and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    with pytest.raises(ZeroDivisionError):
        PPO(Toy, torch_threads=2, **SMALL).learn(64, lambda model: 1 / 0)
    assert torch.get_num_threads() == threads


def test_the_global_random_state_does_not_change_a_run():
    torch.manual_seed(1)
    first = parameters_after(3)
    torch.manual_seed(2)
    assert torch.equal(first, parameters_after(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["discrete", "continuous", "squashed", "multi-binary", "dict"])
def test_the_action_that_pays_is_learnt(name):
    model = make(name, learning_rate=3e-2, num_steps=64, update_epochs=8, ent_coef=0.0, seed=2)
    model.learn(4000)
    start = make(name, num_steps=64).learn(128).metrics["rollout/ep_rew_mean"]
    assert model.metrics["rollout/ep_rew_mean"] > start + 0.5 * (9 - start)


class Broken(nn.Module):
    """NaN where the observation asks for it."""

    def __init__(self, where, continuous=False):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.where, self.continuous = where, continuous

    def forward(self, obs):
        out = self.net(obs)
        out = torch.where(self.where(obs)[:, None], torch.nan, out)
        if self.continuous:
            return (out[:, :2], torch.zeros(2)), out[:, 2]
        return out[:, :2], out[:, 2]


def test_a_policy_of_nans_ends_the_run_and_is_left_as_it_was():
    broken = []
    policy = Broken(lambda obs: obs[:, 0] < (9 if broken else -9))
    model = PPO(Toy, policy, **SMALL).learn(64)  # Adam has momentum now
    broken.append(True)
    before = policy.net.weight.clone()
    with pytest.raises(FloatingPointError, match="iteration 3: no minibatch had a finite loss"):
        model.learn(64)
    assert torch.equal(policy.net.weight, before)


def test_rows_that_are_no_transitions_do_not_move_the_policy():
    def parameters(spoil):
        model = PPO(NativeChain(2), num_steps=32, num_minibatches=2)
        model._start()
        collect = model.collector.collect

        def spoiled():
            rollout = collect()
            spurious = ~rollout.mask
            assert spurious.any()
            if spoil:
                rollout.inputs[:-1][spurious] = 50.0
                rollout.log_probs[spurious] = -30.0
                rollout.actions[spurious] = 0
            return rollout

        model.collector.collect = spoiled
        model.learn(60)
        return torch.cat([p.detach().flatten() for p in model.policy.parameters()])

    assert torch.equal(parameters(False), parameters(True))


def test_a_continuous_policy_of_nans_is_not_blamed_on_the_environment():
    box = spaces.Box(-1, 1, (2,), np.float32)

    class Trusting(Toy):
        def step(self, action):
            self.t += 1
            return self.observation_space.sample(), float(action.sum()), False, self.t > 5, {}

    policy = Broken(lambda obs: obs[:, 0] < 9, continuous=True)
    with pytest.raises(FloatingPointError, match="the policy chose NaN or infinite actions"):
        PPO(lambda: Trusting(action_space=box), policy, **SMALL).learn(64)


def test_a_minibatch_without_a_finite_gradient_is_skipped_and_leaves_the_metrics_whole():
    config = {**SMALL, "num_minibatches": 8, "norm_adv": "none"}
    policy = Broken(lambda obs: obs[:, 0] == 7.0)

    model = PPO(Toy, policy, **config).learn(32)
    collect = model.collector.collect

    def spoiled():
        rollout = collect()
        rollout.inputs[3, 1, 0] = 7.0
        return rollout

    model.collector.collect = spoiled
    model.learn(32)
    assert model.metrics["train/skipped_steps"] == 2  # once in each epoch
    assert model.metrics["train/optimizer_steps"] == 14
    assert all(math.isfinite(value) for value in model.metrics.values())


def test_a_policy_of_the_users_own_is_trained_in_place():
    policy = Broken(lambda obs: obs[:, 0] > 9)
    before = policy.net.weight.clone()
    model = PPO(Toy, policy, **SMALL).learn(64)
    assert model.policy is policy and not torch.equal(policy.net.weight, before)


def test_a_config_and_overrides_go_together():
    config = ControlConfig(num_envs=2, num_steps=8, num_minibatches=2, gamma=0.5)
    model = PPO(Toy, config=config, gamma=0.25)
    assert model.config.gamma == 0.25 and model.config.num_steps == 8 and config.gamma == 0.5


def test_the_chain_policy_can_be_trained_without_a_gradient_to_most_of_its_outputs():
    model = PPO(Chain, ChainPolicy(), num_envs=2, num_steps=16, num_minibatches=1).learn(64)
    assert math.isfinite(model.metrics["train/policy_loss"])


# A plain loop


def plain_update(policy, rollout, order, config, continuous):
    """One PPO update in the manner of CleanRL: python GAE, torch.distributions, Adam."""
    steps, width = rollout["rewards"].shape
    advantages = torch.zeros(steps, width)
    for n in range(width):
        running = 0.0
        for t in reversed(range(steps)):
            done = bool(rollout["terminated"][t, n] or rollout["truncated"][t, n])
            if rollout["terminated"][t, n]:
                following = 0.0
            elif rollout["truncated"][t, n]:
                following = rollout["last_values"][t, n]
            else:
                following = rollout["values"][t + 1, n]
            delta = rollout["rewards"][t, n] + config.gamma * following - rollout["values"][t, n]
            running = delta + config.gamma * config.gae_lambda * (0.0 if done else running)
            advantages[t, n] = running
    returns = advantages + rollout["values"][:-1]
    flat = {
        "obs": rollout["obs"][:-1].flatten(0, 1),
        "actions": rollout["actions"].flatten(0, 1),
        "log_probs": rollout["log_probs"].flatten(),
        "values": rollout["values"][:-1].flatten(),
        "advantages": advantages.flatten(),
        "returns": returns.flatten(),
    }
    adam = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=config.adam_eps)
    for permutation in order:
        for index in permutation.chunk(config.num_minibatches):
            mb = {name: column[index] for name, column in flat.items()}
            parameters, values = policy(mb["obs"])
            if continuous:
                mean, log_std = parameters
                distribution = torch.distributions.Independent(
                    torch.distributions.Normal(mean, log_std.exp().expand_as(mean)), 1
                )
            else:
                distribution = torch.distributions.Categorical(logits=parameters)
            ratio = (distribution.log_prob(mb["actions"]) - mb["log_probs"]).exp()
            a = mb["advantages"]
            a = (a - a.mean()) / (a.std() + 1e-8)
            clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
            policy_loss = torch.max(-a * ratio, -a * clipped).mean()
            moved = mb["values"] + (values - mb["values"]).clamp(
                -config.vf_clip_coef, config.vf_clip_coef
            )
            squares = torch.max((values - mb["returns"]) ** 2, (moved - mb["returns"]) ** 2)
            loss = policy_loss - config.ent_coef * distribution.entropy().mean()
            loss = loss + config.vf_coef * 0.5 * squares.mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            adam.step()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"])
def test_one_iteration_equals_a_plain_loop_on_the_same_rollout(env_id):
    continuous = env_id == "Pendulum-v1"
    config = {"num_envs": 3, "num_steps": 256, "learning_rate": 1e-3, "anneal_lr": False}
    env = gym.make_vec(
        env_id,
        3,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        max_episode_steps=60,
    )
    model = PPO(env, **config)
    twin = PPO(env, **config).policy
    # Far enough from the start that ratios are clipped and values matter.
    with torch.no_grad():
        for ours, theirs in zip(model.policy.parameters(), twin.parameters(), strict=True):
            noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
            ours.add_(noise, alpha=0.1)
            theirs.copy_(ours)
    model._start()
    env.reset(seed=1)
    finals, step = {}, env.step

    def stepped(actions):
        result = step(actions)
        finals[len(finals)] = result[4].get("final_obs")
        return result

    env.step = stepped
    generator = torch.Generator()
    rollout = {}
    collector = model.collector
    collect = collector.collect

    def keeping():
        r = collect()
        generator.set_state(model.generator.get_state())
        values = model.policy(r.inputs.flatten(0, 1))[1].view(257, 3).detach()
        last = torch.zeros(256, 3)
        for t, n in r.truncated.nonzero().tolist():
            last[t, n] = model.policy(torch.tensor(finals[t][n])[None])[1].item()
        rollout.update(
            obs=r.inputs.clone(), actions=r.actions.clone(), rewards=r.rewards.clone(),
            terminated=r.terminated.clone(), truncated=r.truncated.clone(),
            log_probs=r.log_probs.clone(), values=values, last_values=last,
        )  # fmt: skip
        return r

    collector.collect = keeping
    model.learn(1)
    assert (rollout["terminated"] | rollout["truncated"]).any()
    order = [torch.randperm(768, generator=generator) for _ in range(4)]
    plain_update(twin, rollout, order, model.config, continuous)
    assert model.metrics["train/clip_fraction"] > 0
    moved = 0.0
    for (name, ours), theirs in zip(
        model.policy.named_parameters(), twin.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, msg=name)
        moved = max(moved, float(ours.detach().abs().max()))
    assert moved > 0


def test_initial_weights_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    weights = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weights.append(PPO("CartPole-v1", hidden_sizes=(256, 256)).policy.state_dict())
    torch.set_num_threads(before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
