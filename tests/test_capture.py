"""Phases are recorded once and replayed; rehearsed on a CPU (rehearsal.py)."""

import logging

import pytest
import torch
from rehearsal import Recorder
from torch import nn

from ppo_fast import PPO, capture
from ppo_fast.capture import Phase, may_read, rehearsal
from ppo_fast.control.tensor_envs import TensorCartPole, TensorPendulum

CPU = torch.device("cpu")
ITERATIONS = 6


class Own(nn.Module):
    """A policy of the user's own; with `reads`, one that no graph can hold."""

    def __init__(self, reads=False):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 16), nn.Linear(16, 3)
        self.reads = reads

    def forward(self, obs):
        out = self.heads(self.body(obs).relu())
        if self.reads and out.sum().item() == 0:
            raise AssertionError
        return out[:, :2], out[:, 2]


def train(env, policy=None, iterations=ITERATIONS, callback=None, **settings):
    torch.manual_seed(0)
    model = PPO(env, policy, num_steps=16, num_minibatches=2, update_epochs=2, seed=1, **settings)
    model.learn(iterations * 16 * model.num_envs, callback)
    parameters = torch.cat([p.detach().reshape(-1) for p in model.policy.parameters()])
    return parameters, model


CASES = {
    "explicit": (TensorCartPole, None, {}),
    "gaussian, normalised": (TensorPendulum, None, {"norm_obs": True, "norm_reward": True}),
    "target KL": (TensorCartPole, None, {"target_kl": 0.002, "learning_rate": 0.01}),
    "adaptive rate": (TensorCartPole, None, {"adaptive_lr_kl": 0.01}),
    "batch whitening": (TensorCartPole, None, {"norm_adv": "batch"}),
    "two hidden sizes and silu": (TensorCartPole, None, {"activation": "silu"}),
    "a module of one's own": (TensorCartPole, Own, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_training_is_the_eager_one(name, monkeypatch):
    env, policy, settings = CASES[name]
    # Every scalar that may change does: a replay that had frozen one would drift off.
    schedules = {"clip_coef": lambda left: 0.1 + 0.2 * left, "ent_coef": lambda left: 0.02 * left}
    if "adaptive_lr_kl" not in settings:
        schedules["learning_rate"] = lambda left: 0.005 * left
    if "learning_rate" in settings:
        schedules.pop("learning_rate")
    settings = {**settings, **schedules}
    metrics = []

    def keep(model):
        numbers = {k: v for k, v in model.metrics.items() if not k.startswith("time/")}
        metrics.append({k: v for k, v in numbers.items() if v == v})

    recorder = Recorder()
    with rehearsal(recorder):
        replayed, _ = train(env(6), policy and policy(), callback=keep, **settings)
    assert len(recorder.phases) == 2  # the rollout and the update, each once
    assert recorder.replays == 2 * (ITERATIONS - capture.EAGER_RUNS - 1)
    monkeypatch.setattr(capture, "EAGER_RUNS", 10**9)
    with rehearsal(Recorder()):
        eager, _ = train(env(6), policy and policy(), callback=keep, **settings)
    assert torch.equal(replayed, eager)
    assert metrics[:ITERATIONS] == metrics[ITERATIONS:]


def test_a_step_of_a_rollout_allocates_nothing():
    counts = []
    for steps in (8, 40):
        recorder = Recorder()
        with rehearsal(recorder):
            PPO(TensorCartPole(6), num_steps=steps, num_minibatches=2).learn(3 * steps * 6)
        rollout, _ = recorder.allocations
        counts.append((recorder.phases[0], rollout))
    assert counts[0][1] == counts[1][1] < 60
    # Beside the draws of initial states, every 8 steps: a step is so many operations.
    assert 32 * 30 > counts[1][0] - counts[0][0] > 32 * 20


def test_the_devices_way_learns_what_the_cpus_does():
    own, _ = train(TensorCartPole(6))
    with rehearsal(Recorder()):
        devices, _ = train(TensorCartPole(6))
    torch.testing.assert_close(devices, own, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_recorded_runs_eagerly_and_says_why_once(caplog):
    with caplog.at_level(logging.WARNING, "ppo_fast"), rehearsal(Recorder()):
        found, model = train(TensorCartPole(6), Own(reads=True))
    warnings = [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert len(warnings) == 2
    assert all("read as a Python number" in warning for warning in warnings)
    assert not model._phase.recorded
    own, _ = train(TensorCartPole(6), Own())
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_environments_on_the_host_have_only_their_update_recorded():
    recorder = Recorder()
    with rehearsal(recorder):
        train("CartPole-v1", num_envs=4, vectorization="sync")
    assert len(recorder.phases) == 1


def test_on_a_cpu_a_phase_is_its_function():
    phase = Phase("p", lambda: 3, CPU)
    assert [phase() for _ in range(5)] == [3] * 5
    assert not phase.recorded
    assert may_read(CPU)
    with rehearsal(Recorder()):
        assert not may_read(CPU)


def test_the_stand_in_refuses_what_a_graph_refuses():
    x = torch.arange(4.0)
    for fault in (
        lambda: x.sum().item(),
        lambda: bool(x[0]),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.tensor(2.0) * x,
    ):
        with pytest.raises(RuntimeError, match=r"read|depends|made of"):
            Recorder()(fault, ())


def test_a_replay_reads_tensors_and_not_numbers():
    x, number = torch.ones(3), [2.0]
    scale = torch.tensor(2.0)
    replay, (by_tensor, by_number) = Recorder()(lambda: (x * scale, x * number[0]), ())
    scale.fill_(5)
    number[0] = 5.0
    replay()
    assert by_tensor.tolist() == [5] * 3
    assert by_number.tolist() == [2] * 3
