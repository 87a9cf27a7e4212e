"""bfloat16 where it is asked for, float32 everywhere else."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ppo_fast import PPO
from ppo_fast.control.loss import AutogradLoss, ExplicitLoss
from ppo_fast.control.precision import Autocast
from ppo_fast.control.sync_envs import SyncEnvs
from ppo_fast.control.tensor_envs import TensorCartPole

SMALL = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "seed": 1}


class Images:
    """Four environments of 12 x 12 images whose brightness is the action rewarded."""

    num_envs = 4
    single_observation_space = spaces.Box(0, 255, (12, 12, 1), np.uint8)
    single_action_space = spaces.Discrete(2)
    observation_space, action_space = None, None
    metadata = {"autoreset_mode": "SameStep"}

    def reset(self, seed=None):
        self.rng = np.random.default_rng(seed)
        return self.draw(), {}

    def draw(self):
        self.bright = self.rng.random(4) < 0.5
        obs = self.rng.integers(0, 60, (4, 12, 12, 1), dtype=np.uint8)
        obs[self.bright] += 150
        return obs

    def step(self, actions):
        rewards = (actions == self.bright).astype(np.float32)
        no = np.zeros(4, bool)
        return self.draw(), rewards, ~no, no, {}


def test_bfloat16_trains_in_float32_parameters_with_ratio_one():
    model = PPO(Images(), precision="bf16", **SMALL).learn(16 * 4)
    assert isinstance(model._loss, AutogradLoss)
    assert all(p.dtype == torch.float32 for p in model.policy.parameters())
    assert model.collector.rollout.values.dtype == torch.float32
    assert model.metrics["train/first_ratio_deviation"] < 0.05  # bf16 of other batch sizes
    assert np.isfinite(list(model.metrics.values())[-1])


def test_bfloat16_learns_what_float32_does():
    reached = []
    for precision in ("fp32", "bf16"):
        model = PPO(Images(), precision=precision, learning_rate=1e-3, **SMALL)
        model.learn(16 * 4 * 25)
        reached.append(np.mean(model.episodes.returns))
    assert min(reached) > 0.9


def test_products_really_run_in_bfloat16():
    model = PPO(TensorCartPole(4), precision="bf16", **SMALL)
    assert isinstance(model.evaluator, Autocast)
    seen = []
    model.policy.actor_net[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    model.learn(16 * 4)
    assert set(seen) == {torch.bfloat16}
    assert not isinstance(model._loss, ExplicitLoss)
    assert model.predict_values(np.zeros(4, np.float32)).dtype == np.float32


def test_float16_is_refused_where_no_kernel_takes_it():
    with pytest.raises(ValueError, match=r"precision = 'fp16' is for .*, but the policy is on cpu"):
        PPO(TensorCartPole(4), precision="fp16")
    with pytest.raises(ValueError, match="encoder has parameters"):
        PPO(Images(), precision="fp16")
    with pytest.raises(ValueError, match="precision = 'half'; expected one of fp32, bf16, fp16"):
        PPO(TensorCartPole(4), precision="half")


def test_a_shared_trunk_is_trained_by_the_op():
    model = PPO(TensorCartPole(4), shared_sizes=[16], hidden_sizes=(8,), **SMALL)
    before = model.policy.trunk[0].weight.detach().clone()
    model.learn(16 * 4 * 2)
    assert isinstance(model._loss, ExplicitLoss)
    assert model._loss.spec.shared_sizes == (16,)
    assert not torch.equal(before, model.policy.trunk[0].weight)
    names = dict(model.policy.named_parameters())
    assert names["trunk.0.weight"].shape == (16, 4) and names["actor_net.0.weight"].shape == (8, 16)


def test_environments_one_after_another_refuse_misshapen_observations():
    import gymnasium as gym

    class Shrinks(gym.Env):
        observation_space = spaces.Box(-1, 1, (3,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 0.0, False, False, {}

    envs = SyncEnvs([Shrinks])
    envs.reset()
    with pytest.raises(ValueError, match=r"environment 0 returned an observation of shape \(1,\)"):
        envs.step(np.zeros(1, int))


def test_convolutions_run_once_a_step_and_score_it():
    model = PPO(Images(), **SMALL)
    rows = []
    hook = model.policy.encoder.register_forward_hook(lambda *a: rows.append(len(a[2])))
    model.learn(16 * 4)
    hook.remove()
    # 16 steps of 4 rows and the row after them, then two epochs of two minibatches of 32.
    assert rows == [4] * 17 + [32] * 4
    model.collector.collect()
    r = model.collector.rollout
    obs = r.inputs[:-1].flatten(0, 1)
    with torch.no_grad():
        logits, values = model.policy(obs)
    log_probs = logits.log_softmax(-1).gather(-1, r.actions.view(-1, 1)).squeeze(-1)
    torch.testing.assert_close(r.values[:-1].flatten(), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r.log_probs.flatten(), log_probs, rtol=1e-4, atol=1e-5)
