"""A run that is saved, killed or interrupted goes on as if nothing had happened."""

import csv
import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from chain import Chain, ChainPolicy, NativeChain, TensorChain
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from ppo_fast import PPO, evaluate
from ppo_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_fast.cli import main
from ppo_fast.control.saving import live_tensors
from ppo_fast.logger import read_metrics

safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "num_envs": 4, "num_steps": 16, "num_minibatches": 4, "update_epochs": 2, "seed": 3,
    "anneal_clip": True, "anneal_ent": True, "hidden_sizes": (16,),
}  # fmt: skip
ITERATION = 4 * 16


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr("ppo_fast.plots.plot_learning_curves", lambda *args: None)


def state_of(model):
    """Everything training reads, but the environments."""
    return {
        **{name: tensor.clone() for name, tensor in live_tensors(model).items()},
        "generator": model.generator.get_state(),
        "kl": torch.tensor(model.kl_controller.coef),
        "episodes": torch.tensor([*model.episodes.returns, *model.episodes.lengths]),
        "running": torch.from_numpy(model.episodes.running_returns.copy()),
        "steps": torch.tensor([model.num_timesteps, model.iteration, model.learn_done]),
    }


def assert_same_state(model, other):
    expected, got = state_of(model), state_of(other)
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def timeless(metrics):
    return {
        key: repr(value)
        for key, value in metrics.items()
        if not key.endswith("_seconds") and key != "time/sps"
    }


class Recorder:
    """A callback that keeps every iteration's metrics, and saves after one of them."""

    def __init__(self, save_at=None, path=None, stop_at=None):
        self.rows, self.save_at, self.path, self.stop_at = [], save_at, path, stop_at

    def __call__(self, model):
        self.rows.append(timeless(model.metrics))
        if model.iteration == self.save_at:
            model.save(self.path)
        return model.iteration != self.stop_at


def assert_continues_exactly(path, make, *, load_env=False, iterations=6, at=3, **settings):
    """`make` returns what PPO is given; `load_env`: whether load has to be given one too."""
    settings = {**SMALL, **settings}
    if not isinstance(make(), str | type):
        settings["num_envs"] = None
    whole, half = PPO(make(), **settings), Recorder(at, path)
    whole.learn(iterations * ITERATION, half)

    resumed, rest = PPO.load(path, env=make() if load_env else None), Recorder()
    assert resumed.iteration == at
    resumed.resume(rest)
    assert rest.rows == half.rows[at:]
    assert_same_state(whole, resumed)
    return whole, resumed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "saved.safetensors"


class SavableChain(Chain):
    """A user's environment that offers its state."""

    def state_dict(self):
        return {"episode": self.episode, "position": self.position, "steps": self.steps}

    def load_state_dict(self, state):
        vars(self).update(state)


class SavableNativeChain(NativeChain):
    def state_dict(self):
        chains = [[c.episode, c.position, c.steps] for c in self.chains]
        return {"over": self.over, "chains": chains}

    def load_state_dict(self, state):
        self.over = state["over"]
        for chain, saved in zip(self.chains, state["chains"], strict=True):
            chain.episode, chain.position, chain.steps = saved


class SavableTensorChain(TensorChain):
    """Also draws noise from torch's global generator."""

    def step(self, actions):
        obs, rewards, terminated, truncated, info = super().step(actions)
        return obs, rewards + torch.rand(self.num_envs), terminated, truncated, info

    def state_dict(self):
        return {"episode": self.episode, "position": self.position, "steps": self.steps}

    def load_state_dict(self, state):
        vars(self).update(state)


# The continuation is bitwise equal.


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(path, env_id, at):
    _, resumed = assert_continues_exactly(path, lambda: env_id, at=at)
    assert resumed.learn_done >= 6 * ITERATION - 60  # rows that are no transitions do not count


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Acrobot-v1", "CartPole-v1"])
def test_normalisation_statistics_resume_exactly(path, env_id):
    whole, _ = assert_continues_exactly(path, lambda: env_id, norm_obs=True, norm_reward=True)
    assert whole.obs_normalizers[""].moments.count > 5 * ITERATION


def test_mujoco_resumes_exactly(path):
    pytest.importorskip("mujoco")
    assert_continues_exactly(path, lambda: "HalfCheetah-v5", norm_obs=True, norm_reward=True)


def test_action_masks_of_the_first_step_resume_exactly(path):
    taxi = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
    _, resumed = assert_continues_exactly(path, lambda: taxi, num_steps=16)
    assert resumed.collector.rollout.action_mask is not None


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: SavableChain, {}),
        (lambda: SavableTensorChain(4), {}),
        (lambda: SavableTensorChain(4), {"norm_obs": True, "norm_reward": True}),
        (lambda: SavableNativeChain(4), {"norm_obs": True, "norm_reward": True}),
        (lambda: SyncVectorEnv([SavableChain] * 4), {"norm_obs": True}),
    ],
    ids=["callable", "tensor", "tensor, normalised", "native", "sync, next step"],
)
def test_environments_with_a_state_dict_resume_exactly(path, make, settings):
    for at in (2, 3, 4):
        assert_continues_exactly(path, make, load_env=True, at=at, **settings)


def test_a_row_that_is_no_transition_is_ignored_after_a_resume_too(path):
    ended = []

    def note(model):
        ended.append(model.collector._ignored.any())

    PPO(SavableNativeChain(4), **{**SMALL, "num_envs": None}).learn(6 * ITERATION, note)
    at = ended.index(True) + 1
    assert_continues_exactly(path, lambda: SavableNativeChain(4), load_env=True, at=at)


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptive_lr_kl": 0.01},
        {"target_kl": 1e-4},
        {"kl_coef": 0.2, "kl_target": 0.01, "kl_controller": "paper"},
        {"kl_coef": 0.2, "kl_target": 1e-4, "kl_controller": "proportional", "norm_adv": "batch"},
    ],
)
def test_what_adapts_resumes_exactly(path, settings):
    assert_continues_exactly(path, lambda: "CartPole-v1", **settings)


def test_schedules_given_as_functions_resume_exactly_once_given_again(path):
    def schedule(remaining):
        return 1e-3 * remaining**2

    whole, half = PPO("CartPole-v1", learning_rate=schedule, **SMALL), Recorder(3, path)
    whole.learn(6 * ITERATION, half)
    for go_on in (PPO.resume, lambda model: model.learn(ITERATION)):
        with pytest.raises(ValueError, match=r"functions for learning_rate.*PPO.load\(path, learn"):
            go_on(PPO.load(path))
    forgotten = PPO.load(path)
    forgotten.save(path.with_name("again"))
    with pytest.raises(ValueError, match="functions for learning_rate"):
        PPO.load(path.with_name("again")).resume()
    resumed = PPO.load(path, learning_rate=schedule).resume()
    assert_same_state(whole, resumed)
    constant = PPO.load(path, learning_rate=1e-5, anneal_lr=False).resume()
    assert constant.metrics["train/learning_rate"] == pytest.approx(1e-5)


def test_a_policy_of_the_users_own_resumes_exactly(path):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, obs):
            self.calls += 1
            out = self.body(obs)
            return out[:, :2], out[:, 2]

    whole, half = PPO("CartPole-v1", policy=Policy(), **SMALL), Recorder(3, path)
    whole.learn(6 * ITERATION, half)
    resumed = PPO.load(path, policy=Policy()).resume()
    assert_same_state(whole, resumed)
    assert resumed.policy.calls == whole.policy.calls > 0


def test_saving_and_learning_in_several_calls_change_nothing(path):
    saving, plain = PPO("CartPole-v1", **SMALL), PPO("CartPole-v1", **SMALL)
    saving.learn(2 * ITERATION, lambda model: model.save(path))
    saving.learn(2 * ITERATION, lambda model: model.save(path))
    plain.learn(2 * ITERATION).learn(2 * ITERATION)
    assert_same_state(saving, plain)
    loaded = PPO.load(path)
    assert_same_state(saving, loaded)
    assert_same_state(plain.learn(2 * ITERATION), loaded.learn(2 * ITERATION))


def test_a_checkpoint_of_a_checkpoint_is_the_same(path, tmp_path):
    for env_id, settings in (("CartPole-v1", {}), ("Pendulum-v1", {"norm_reward": True})):
        PPO(env_id, **SMALL, **settings).learn(3 * ITERATION, Recorder(2, path))
        torch.rand(7)  # moves the global generator, which is not the run's any more
        PPO.load(path).save(tmp_path / "again")
        (tensors, meta), (again, meta_again) = (
            load_checkpoint(path),
            load_checkpoint(tmp_path / "again"),
        )
        assert meta == meta_again
        assert set(tensors) == set(again)
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_predictions_are_the_same_after_a_load_without_environment(path):
    model = PPO("Pendulum-v1", norm_obs=True, **SMALL).learn(2 * ITERATION)
    model.save(path)
    observations = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    loaded = PPO.load(path)
    assert loaded.envs is None
    assert np.array_equal(loaded.predict(observations)[0], model.predict(observations)[0])
    sampled = [m.predict(observations, deterministic=False)[0] for m in (model, loaded)]
    assert np.array_equal(*sampled)
    values = [m.predict_values(observations) for m in (model, loaded)]
    assert np.array_equal(*values)


# Environments whose state cannot be saved.


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_without_environment_state_a_resumed_run_starts_new_episodes_and_says_so(
    path, caplog, vectorization
):
    make = Chain if vectorization == "sync" else "CartPole-v1"
    settings = {**SMALL, "vectorization": vectorization, "norm_reward": True}
    model = PPO(make, **settings)
    model.learn(4 * ITERATION, Recorder(2, path, stop_at=2))
    model.close()
    assert model.episodes.running_lengths.any()
    resumed = PPO.load(path, env=make)
    with caplog.at_level(logging.INFO, "ppo_fast"):
        resumed.resume(lambda m: m.iteration < 3)
    assert "state was not saved: training goes on with new episodes" in caplog.text
    assert resumed.num_timesteps == 3 * ITERATION
    # No finished episode mixes steps from before and after.
    assert max(resumed.episodes.lengths) <= (4 if make is Chain else 16 * 3)
    resumed.close()


def test_a_resumed_run_does_not_replay_its_first_episodes(path):
    seeds = []

    class Seeded(Chain):
        def reset(self, *, seed=None, options=None):
            if seed is not None:
                seeds.append(seed)
            return super().reset(seed=seed, options=options)

    PPO(Seeded, **SMALL).learn(4 * ITERATION, Recorder(2, path, stop_at=2))
    assert len(seeds) == 4
    PPO.load(path, env=Seeded).resume(lambda model: False)
    assert len(set(seeds)) == 8


def test_a_state_that_cannot_be_stored_costs_the_state_but_not_the_checkpoint(path):
    class Odd(SavableChain):
        def state_dict(self):
            return {"episode": object()}

    with pytest.warns(UserWarning, match="state is not saved"):
        PPO(Odd, **SMALL).learn(2 * ITERATION).save(path)
    assert PPO.load(path, env=Odd).learn(ITERATION).num_timesteps == 3 * ITERATION


# Runs in folders.


def cli(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "ppo_fast", *map(str, arguments)],
        capture_output=True, text=True, check=False, **environment(), **options,
    )  # fmt: skip


def environment():
    return {"env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}


FLAGS = [
    "--num-envs", "4", "--num-steps", "16", "--num-minibatches", "4", "--update-epochs", "2",
    "--save-every", "4", "--total-timesteps", str(10 * ITERATION), "--no-progress-bar",
]  # fmt: skip

KILLED_AFTER_ROW_7 = """
    import os, signal, sys
    from ppo_fast.cli import main
    from ppo_fast.logger import RunLogger

    log, rows = RunLogger.log, []

    def log_and_die(self, step, metrics):
        log(self, step, metrics)
        rows.append(step)
        if len(rows) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLogger.log = log_and_die
    main(sys.argv[1:])
"""


def test_a_run_killed_by_sigkill_resumes_to_the_same_end(tmp_path, monkeypatch):
    flags = [*FLAGS, "--norm-obs", "--norm-reward"]
    code = textwrap.dedent(KILLED_AFTER_ROW_7)
    killed = subprocess.run(
        [sys.executable, "-c", code, "train", "CartPole-v1", "--run-dir", "killed", *flags],
        cwd=tmp_path, capture_output=True, check=False, **environment(),
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Rows 5 to 7 came after the last checkpoint.
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.safetensors")[1]["iteration"] == 4
    assert len(read_metrics(tmp_path / "killed")["step"]) == 7

    resumed = cli("train", "--resume", "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming killed at" in resumed.stdout
    monkeypatch.chdir(tmp_path)
    main(["train", "CartPole-v1", "--run-dir", "whole", *flags])

    def end(name):
        tensors, meta = load_checkpoint(tmp_path / name / "checkpoint.safetensors")
        tensors.pop("global_rng")  # differs from process to process; CartPole does not draw from it
        meta["config"].pop("run_dir")
        meta["metrics"] = timeless(meta["metrics"])
        rows = read_metrics(tmp_path / name)
        return tensors, meta, timeless(rows)

    (tensors, meta, rows), (expected, expected_meta, expected_rows) = end("killed"), end("whole")
    assert meta == expected_meta
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert rows == expected_rows
    steps = read_metrics(tmp_path / "killed")["step"]
    assert len(steps) == len(set(steps)) == meta["iteration"] >= 10


def test_a_run_folder_can_be_resumed_from_its_first_moment(tmp_path):
    settings = {**SMALL, "save_every": 1000}

    class KilledError(Exception):
        pass

    def kill(model):
        raise KilledError

    whole = PPO("Acrobot-v1", **SMALL).learn(3 * ITERATION)
    with pytest.raises(KilledError):
        PPO("Acrobot-v1", run_dir=str(tmp_path / "run"), **settings).learn(3 * ITERATION, kill)
    resumed = PPO.load(tmp_path / "run")
    assert resumed.num_timesteps == 0
    resumed.resume()
    assert_same_state(whole, resumed)
    assert len(read_metrics(tmp_path / "run")["step"]) == 3


def test_a_run_goes_on_in_its_folder_wherever_that_has_moved(tmp_path):
    PPO("Acrobot-v1", run_dir=str(tmp_path / "old"), **SMALL).learn(2 * ITERATION)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    before = read_metrics(tmp_path / "old")
    PPO.load(tmp_path / "new" / "checkpoint.safetensors").learn(2 * ITERATION)
    assert len(read_metrics(tmp_path / "new")["step"]) == 4
    assert repr(read_metrics(tmp_path / "old")) == repr(before)


def test_a_checkpoint_outside_a_run_folder_writes_nothing_over_the_run(tmp_path, path):
    run = str(tmp_path / "run")
    PPO("Acrobot-v1", run_dir=run, **SMALL).learn(3 * ITERATION, Recorder(1, path))
    early = PPO.load(path)
    assert early.config.run_dir is None
    early.learn(ITERATION)
    assert len(read_metrics(run)["step"]) == 3
    with pytest.raises(FileExistsError, match="holds a finished or interrupted run"):
        PPO.load(path, run_dir=run).learn(ITERATION)
    PPO.load(path, run_dir=str(tmp_path / "other")).learn(ITERATION)
    assert len(read_metrics(tmp_path / "other")["step"]) == 1


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    run = tmp_path / "run"
    PPO("CartPole-v1", run_dir=str(run), **SMALL).learn(ITERATION)
    before = (run / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=f"ppo-fast train --resume {run}"):
        PPO("CartPole-v1", run_dir=str(run), **SMALL).learn(ITERATION)
    assert (run / "checkpoint.safetensors").read_bytes() == before
    (run / "checkpoint.safetensors").unlink()
    with pytest.raises(FileExistsError, match="metrics of a run without a checkpoint"):
        PPO("CartPole-v1", run_dir=str(run), **SMALL).learn(ITERATION)


def test_a_finished_run_says_that_there_is_nothing_to_resume(path):
    PPO("CartPole-v1", **SMALL).learn(ITERATION).save(path)
    with pytest.raises(ValueError, match=r"was finished \(.*call learn"):
        PPO.load(path).resume()


# Ctrl-C and SIGTERM.


def raises_signal(number, times=1, at=2):
    def callback(model):
        if model.iteration == at:
            for _ in range(times):
                signal.raise_signal(number)

    return callback


@pytest.mark.parametrize(
    ("number", "times", "raised"),
    [
        (signal.SIGINT, 1, KeyboardInterrupt),
        (signal.SIGTERM, 1, SystemExit),
        (signal.SIGTERM, 3, SystemExit),  # impatient schedulers repeat themselves
    ],
)
def test_a_signal_saves_after_the_iteration_and_says_where(tmp_path, capsys, number, times, raised):
    handler = signal.getsignal(number)
    whole = PPO("CartPole-v1", **SMALL).learn(4 * ITERATION)
    run = str(tmp_path / "run")
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        PPO("CartPole-v1", run_dir=run, **SMALL).learn(4 * ITERATION, raises_signal(number, times))
    assert caught.type is raised
    if raised is SystemExit:
        assert caught.value.code == 143
    said = capsys.readouterr().out
    assert f"{number.name}: saved {run}/checkpoint.safetensors" in said
    assert f"ppo-fast train --resume {run} goes on" in said
    assert signal.getsignal(number) is handler
    resumed = PPO.load(run)
    assert resumed.iteration == 2
    assert_same_state(whole, resumed.resume())


def test_an_interrupt_without_run_folder_saves_into_the_working_directory(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = PPO("CartPole-v1", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        model.learn(4 * ITERATION, raises_signal(signal.SIGINT))
    file = tmp_path / "CartPole-v1-interrupted.safetensors"
    said = capsys.readouterr().out
    assert f"SIGINT: saved {file} after" in said
    assert f"PPO.load('{file}').resume() goes on" in said
    # The interrupted object can go on itself, and so can the file.
    loaded = PPO.load(file)
    assert loaded.config.run_dir is None
    assert_same_state(model.resume(), loaded.resume())


def test_a_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(tmp_path):
    class Impatient(SavableChain):
        def step(self, action):
            if self.episode == 40:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().step(action)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        PPO(Impatient, run_dir=str(run), save_every=2, **SMALL).learn(50 * ITERATION)
    loaded = PPO.load(run, env=SavableChain)
    assert loaded.iteration % 2 == 0
    assert loaded.iteration <= len(read_metrics(run)["step"])
    assert loaded.resume(lambda model: False).iteration == loaded.iteration


@pytest.mark.parametrize(
    ("number", "worker", "raised"),
    [
        (signal.SIGINT, KeyboardInterrupt(), KeyboardInterrupt),
        (signal.SIGTERM, EOFError("a worker is gone"), SystemExit),
    ],
)
def test_a_signal_that_ends_worker_processes_first_still_saves(
    tmp_path, capsys, number, worker, raised
):
    class Workers(SavableChain):
        """As a vector environment says that its workers took the signal."""

        def step(self, action):
            if self.episode == 40:
                signal.raise_signal(number)
                raise worker
            return super().step(action)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        PPO(Workers, run_dir=str(tmp_path), save_every=99, **SMALL).learn(50 * ITERATION)
    assert caught.type is raised
    assert f"{number.name}: saved {tmp_path}" in capsys.readouterr().out
    loaded = PPO.load(tmp_path, env=SavableChain)
    assert loaded.iteration == len(read_metrics(tmp_path)["step"]) > 0
    loaded.resume(lambda model: False)


def start(folder, *arguments):
    """Start `ppo-fast train` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_fast", "train", *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **environment(),
    )  # fmt: skip


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def rows_in(run):
    file = run / "metrics.csv"
    return sum(1 for _ in csv.reader(file.open())) - 1 if file.exists() else 0


def test_ctrl_c_reaches_worker_processes_too_and_still_saves(tmp_path):
    flags = ["--vectorization", "async", *FLAGS, "--total-timesteps", "1000000"]
    process = start(tmp_path, "CartPole-v1", "--run-dir", "run", *flags)
    wait_for(lambda: rows_in(tmp_path / "run") >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, (out, err)
    assert "SIGINT: saved run/checkpoint.safetensors after" in out
    assert "finishing this iteration" in err
    resumed = PPO.load(tmp_path / "run")
    iteration = resumed.iteration
    assert iteration >= 2
    assert resumed.resume(lambda model: False).iteration == iteration + 1
    resumed.close()


def catches(pid, number):
    """Whether a process has a handler for a signal; Python has none for SIGTERM by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_sigterm_and_a_second_ctrl_c_end_the_command_with_their_codes(tmp_path):
    processes = {
        name: start(tmp_path, "CartPole-v1", "--run-dir", name, *FLAGS, "--total-timesteps", 10**6, *more)
        for name, more in {"term": ["--vectorization", "async"], "twice": ["--num-steps", 50_000]}.items()
    }  # fmt: skip
    term, twice = processes["term"], processes["twice"]
    wait_for(lambda: rows_in(tmp_path / "term") >= 1, term)
    os.killpg(term.pid, signal.SIGTERM)  # as schedulers do; it takes the worker processes first
    out, err = term.communicate(timeout=30)
    assert term.returncode == 143, (out, err)
    assert "SIGTERM: saved term/checkpoint.safetensors" in out

    wait_for(lambda: catches(twice.pid, signal.SIGTERM), twice)
    os.kill(twice.pid, signal.SIGINT)
    assert twice.stderr.readline().startswith("gradients are written out")
    assert twice.stderr.readline() == "\n"
    assert "Ctrl-C again stops at once" in twice.stderr.readline()
    os.kill(twice.pid, signal.SIGINT)
    out, err = twice.communicate(timeout=30)
    assert twice.returncode == 130, (out, err)
    assert "saved" not in out
    assert PPO.load(tmp_path / "twice").num_timesteps == 0


# What cannot be loaded says why.


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    file = tmp_path_factory.mktemp("loaded") / "cartpole.safetensors"
    PPO("CartPole-v1", vectorization="native", **SMALL).learn(2 * ITERATION).save(file)
    return file


def test_a_checkpoint_of_another_environment_names_both_spaces(cartpole):
    with pytest.raises(
        ValueError, match=r"CartPole-v1 with observation_space Box.*\(4,\).* has Box.*\(3,\)"
    ):
        PPO.load(cartpole, env="Pendulum-v1")
    other = SyncVectorEnv([lambda: gym.wrappers.TransformAction(
        gym.make("CartPole-v1"), lambda a: a % 2, gym.spaces.Discrete(3))] * 2)  # fmt: skip
    with pytest.raises(ValueError, match=r"action_space Discrete\(2\);.* has Discrete\(3\)"):
        PPO.load(cartpole, env=other)


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        ({"hidden_sizes": (32,)}, ValueError, "expected shape .*policy or a setting differs"),
        ({"hidden_sizes": (16, 16)}, ValueError, "policy or a setting differs"),
        ({"hidden_sizes": ()}, ValueError, "which the policy has not"),
        ({"policy": ChainPolicy()}, ValueError, "which the policy has not"),
        ({"norm_obs": True}, ValueError, "nothing for 'obs_normalizer..*setting differs"),
        ({"learning_rat": 1e-4}, TypeError, "unknown setting learning_rat; ControlConfig has"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate = -1.0; expected"),
        ({"num_minibatches": 5}, ValueError, "not divisible by num_minibatches = 5"),
        ({"num_envs": 3, "num_steps": 15}, ValueError, "not divisible by num_minibatches"),
    ],
)
def test_a_load_with_other_settings_works_or_says_why_not(cartpole, overrides, error, text):
    with pytest.raises(error, match=text):
        PPO.load(cartpole, **overrides)


def test_a_policy_of_the_users_own_has_to_be_given_again(path):
    PPO(Chain, policy=ChainPolicy(), **SMALL).save(path)
    with pytest.raises(ValueError, match=r"policy of class ChainPolicy.*policy=MyPolicy\(\)"):
        PPO.load(path)
    PPO.load(path, policy=ChainPolicy())


def test_settings_may_change_at_a_load(cartpole):
    changed = PPO.load(cartpole, learning_rate=1e-5, anneal_lr=False, num_steps=8, seed=9)
    changed.learn(ITERATION)
    assert changed.metrics["train/learning_rate"] == pytest.approx(1e-5)
    adaptive = PPO.load(cartpole, learning_rate=2e-5, adaptive_lr_kl=1e9, update_epochs=1)
    adaptive.learn(ITERATION, lambda model: False)
    assert adaptive.metrics["train/learning_rate"] == pytest.approx(2e-5 * 1.5**3)


@pytest.mark.parametrize(
    "load",
    [
        lambda file: PPO.load(file, num_envs=2),
        lambda file: PPO.load(file, env="CartPole-v1", num_envs=2),
        lambda file: PPO.load(file, env=lambda: gym.make("CartPole-v1"), num_envs=2),
        lambda file: PPO.load(file, env=gym.make_vec("CartPole-v1", num_envs=2)),
    ],
    ids=["no env", "id", "callable", "vector"],
)
def test_a_checkpoint_goes_on_with_another_number_of_environments(cartpole, path, load):
    model = load(cartpole)
    steps = model.num_timesteps
    model.learn(2 * 16, lambda m: m.save(path))
    assert model.num_envs == 2
    assert 16 <= model.num_timesteps - steps <= 2 * 2 * 16
    again = PPO.load(path)
    assert again.num_envs == again.config.num_envs == 2
    if model.from_id:
        fresh = load(cartpole)
        fresh.save(path)
        assert not any(name.startswith("env_state") for name in load_checkpoint(path)[0])


def test_a_single_environment_can_be_trained_on_after_a_load(cartpole):
    model = PPO.load(cartpole, env=gym.make("CartPole-v1"))
    assert model.num_envs == 1
    model.learn(16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("FrozenLake-v1", is_slippery=False),
        lambda: gym.make_vec("CartPole-v1", num_envs=4, max_episode_steps=7),
        lambda: SyncVectorEnv([lambda: gym.make("CartPole-v1", max_episode_steps=7)] * 4),
    ],
)
def test_an_environment_an_id_does_not_make_again_is_asked_for(path, make):
    PPO(make(), num_steps=16).learn(16).save(path)
    with pytest.raises(ValueError, match=r"given as an object.*PPO.load\(path, env=...\)"):
        PPO.load(path).learn(16)
    with pytest.raises(ValueError, match="pass env="):
        evaluate(PPO.load(path))
    PPO.load(path, env=make()).learn(16)


def test_restoring_into_another_kind_of_environment_is_refused(cartpole):
    model = PPO.load(cartpole, env=SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4))
    with pytest.raises(ValueError, match=r"CartPoleVectorEnv and does not fit .*SyncVectorEnv"):
        model.resume() if model.learn_done < model.learn_total else model.learn(ITERATION)


def test_files_that_are_no_checkpoints_of_ours_are_named(cartpole, tmp_path):
    file = tmp_path / "file"
    whole = cartpole.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{file}.*truncated, corrupt"):
            PPO.load(file)
    file.write_bytes(os.urandom(5000))
    with pytest.raises(CheckpointError, match=f"{file}.*not a checkpoint"):
        PPO.load(file)
    torch.save({"weights": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=f"{file}.*not a checkpoint"):
        PPO.load(file)
    safetensors.save_file({"w": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="that ppo_fast did not write"):
        PPO.load(file)
    save_checkpoint(file, {}, {"kind": "llm"})
    with pytest.raises(ValueError, match="of kind 'llm'; expected 'control'"):
        PPO.load(file)
    with pytest.raises(CheckpointError, match="no such file"):
        PPO.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder.*it holds none"):
        PPO.load(tmp_path / "empty")


def test_loading_runs_no_code_from_the_file(cartpole, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for module, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    PPO.load(cartpole).learn(ITERATION)


def test_the_environment_state_in_a_checkpoint_can_only_be_data(cartpole, tmp_path):
    tensors, meta = load_checkpoint(cartpole)
    text = json.dumps(meta)
    assert '"generator": "PCG64"' in text
    save_checkpoint(tmp_path / "evil", tensors, json.loads(text.replace("PCG64", "__import__")))
    with pytest.raises(KeyError, match="__import__"):
        PPO.load(tmp_path / "evil").learn(ITERATION)


# Failures while a run is under way.


def test_a_full_disk_ends_the_run_with_the_first_checkpoint_intact(tmp_path, monkeypatch):
    run, fsync, calls = tmp_path / "run", os.fsync, []

    def full(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if sum("checkpoint" in name for name in calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    model = PPO("CartPole-v1", run_dir=str(run), save_every=2, **SMALL)
    with pytest.raises(
        CheckpointError, match=r"checkpoint.safetensors cannot be written: no space"
    ):
        model.learn(20 * ITERATION)
    monkeypatch.undo()
    assert model.iteration == 4
    loaded = PPO.load(run)
    assert loaded.iteration == 2
    assert sorted(f.name for f in run.iterdir() if "tmp" in f.name) == []
    assert_same_state(PPO("CartPole-v1", **SMALL).learn(20 * ITERATION), loaded.resume())


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run_dir .*file/run cannot be made: Not a directory"):
        PPO("CartPole-v1", run_dir=str(tmp_path / "file" / "run"), **SMALL).learn(ITERATION)


class Breaks(SavableChain):
    """Raises, or returns what is not finite, in its 40th episode."""

    how = "raise"

    def step(self, action):
        if self.episode >= 40 and self.how == "raise":
            raise RuntimeError("the robot fell off the table")
        obs, reward, terminated, truncated, info = super().step(action)
        if self.episode >= 40:
            obs = np.array([np.inf if self.how == "inf" else np.nan], np.float32)
        return obs, reward, terminated, truncated, info


def test_an_environment_that_raises_ends_the_run_after_saving(tmp_path, caplog):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="fell off the table"):
        PPO(Breaks, run_dir=str(run), **SMALL).learn(100 * ITERATION)
    assert "training stopped by an error; saved" in caplog.text
    loaded = PPO.load(run, env=SavableChain)
    assert loaded.iteration == len(read_metrics(run)["step"]) > 0
    loaded.resume(lambda model: False)


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_observations_that_are_not_finite_never_reach_a_checkpoint(tmp_path, monkeypatch, how):
    monkeypatch.setattr(Breaks, "how", how)
    run = tmp_path / "run"
    model = PPO(Breaks, run_dir=str(run), norm_obs=True, save_every=2, **SMALL)
    with pytest.raises(ValueError, match=r"observation|infinite"):
        model.learn(100 * ITERATION)
    loaded = PPO.load(run, env=SavableChain)
    assert loaded.iteration > 0
    assert all(tensor.isfinite().all() for tensor in live_tensors(loaded).values())


def test_an_error_of_the_environment_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise CheckpointError("no space")

    model = PPO(Breaks, run_dir=str(tmp_path / "run"), save_every=1000, **SMALL)

    def break_writer(m):
        monkeypatch.setattr("ppo_fast.control.saving.save_checkpoint", full)

    with pytest.raises(RuntimeError, match="fell off the table"):
        model.learn(100 * ITERATION, break_writer)
    assert "saving failed: no space" in caplog.text


def test_autoreset_modes_are_not_confused(path):
    vector = SyncVectorEnv([SavableChain] * 4, autoreset_mode=AutoresetMode.NEXT_STEP)
    PPO(vector, num_steps=16).learn(2 * ITERATION).save(path)
    with pytest.raises(ValueError, match=r"SyncVectorEnv \(NextStep\) and does not fit"):
        PPO.load(path, env=SavableChain).learn(ITERATION)
