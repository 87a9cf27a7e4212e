"""The learner's benchmark: its gradients, counts and tables; sizes are tiny, times mean nothing."""

import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ppo_fast import capture

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by name, with its results going to `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
    return importlib.import_module


@pytest.fixture
def learner(script):
    return script("bench_learner")


@pytest.fixture
def arms(script):
    return script("learner_arms")


def tiny(learner, name):
    (case,) = (case for case in learner.CASES if case.name == name)
    return learner.tiny_case(case)


@pytest.mark.parametrize("name", ["puffer", "cartpole", "locomotion"])
def test_every_arm_has_the_gradient_of_float64(learner, name):
    problem = tiny(learner, name).problem
    start = learner.start_of(problem)
    exact = learner.true_gradient(start, problem.config)
    assert exact.dtype == torch.float64
    # Each layer takes part: an error in one of them would show.
    policy = start.policy
    offset = 0
    for parameter in policy.parameters():
        part = exact[offset : offset + parameter.numel()]
        assert float(part.norm()) > 1e-3 * float(exact.norm())
        offset += parameter.numel()
    assert offset == exact.numel()
    for arm in (*learner.EVERY, learner.COMPILED):
        found = learner.arm_of(start, problem.config, arm).gradient()
        assert learner.relative_error(found, exact) < 1e-5, arm


def test_a_wrong_gradient_is_told_from_a_right_one(learner):
    exact = torch.ones(4, dtype=torch.float64)
    assert learner.relative_error(torch.ones(4), exact) == 0
    assert learner.relative_error(torch.zeros(4), exact) == 1
    assert math.isnan(learner.relative_error(torch.full((4,), math.nan), exact))
    with pytest.raises(ValueError, match="has 3 entries; expected 4"):
        learner.relative_error(torch.ones(3), exact)


def test_arms_train_on_copies_of_the_same_weights(learner):
    problem = tiny(learner, "cartpole").problem
    start = learner.start_of(problem)
    before = [p.detach().clone() for p in start.policy.parameters()]
    ends = []
    for name in ("ppo_fast fp32, eager", "autograd, eager", learner.EAGER):
        arm = learner.arm_of(start, problem.config, name)
        exact = arm.gradient()
        arm.update()
        ends.append(arm.gradient())
        assert not torch.equal(ends[-1], exact)
    for parameter, old in zip(start.policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    # The same permutations, the same optimizer: 16 steps later they are still at one place.
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=2e-3, atol=2e-5)


def test_flops_are_those_of_the_products(learner):
    problem = learner.CARTPOLE
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += 2 * inputs[0].shape[0] * module.in_features * module.out_features

    start = learner.start_of(problem._replace(num_envs=4, num_steps=2))
    nets = (start.policy.actor_net, start.policy.critic_net)
    for module in start.policy.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    start.policy(start.batch.inputs)
    forward = counted
    first = sum(2 * 8 * net[0].in_features * net[0].out_features for net in nets)
    small = problem._replace(num_envs=4, num_steps=2, epochs=1)
    assert small.flops == 3 * forward - first
    # The note's figure for this network, 52,000 a row.
    assert problem.flops / problem.rows / problem.epochs == pytest.approx(52e3, rel=0.02)
    assert learner.PUFFER.flops / learner.PUFFER.rows / 4 == pytest.approx(265e3, rel=0.02)
    row = learner.PUFFER.bytes / learner.PUFFER.rows / learner.PUFFER.epochs
    assert row == 4 * (60 + 8 + 4) + 8


def test_covered_is_the_length_of_a_union(learner):
    assert learner.covered([]) == 0
    assert learner.covered([(5, 7), (0, 2), (1, 3), (1.5, 1.7), (7, 8)]) == 6


def test_a_case_has_a_row_for_every_arm_whatever_comes_of_it(learner, monkeypatch):
    case = tiny(learner, "cartpole")._replace(arms=(learner.OURS, learner.EAGER, "autograd"))
    limits = {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    ours, eager, unknown = learner.run_case(case, limits, 2, None)
    assert (ours["status"], eager["status"]) == ("timed", "timed")
    assert unknown["status"].startswith("failed: ValueError")
    assert eager["times ours"] == eager["median_ms"] / ours["median_ms"]
    assert ours["min_ms"] <= ours["median_ms"] <= ours["max_ms"]
    assert ours["minibatch_us"] == pytest.approx(ours["median_ms"] * 1e3 / 16)
    assert ours["matrix_fraction"] == pytest.approx(
        case.problem.flops / (ours["median_ms"] * 1e-3) / 1e9
    )
    assert ours["note"] == "the reference, fp32; a CPU has no graphs"
    rows = learner.run_case(case, limits, 2, time.monotonic() - 1)
    assert {row["status"] for row in rows} == {learner.OUT_OF_TIME}


@pytest.mark.parametrize("arm", ["fp16, graphs", "fp32, eager"])
def test_training_is_timed_after_its_warm_up(learner, arm):
    before = capture.EAGER_RUNS
    row = learner.train(arm, learner.Training(4, 16, 60.0, before + 3))
    assert before == capture.EAGER_RUNS
    assert row["iterations"] == before + 3
    assert row["steps"] == (before + 3) * 4 * 16
    assert row["sps_min"] <= row["sps_median"] <= row["sps_max"]
    stopped = learner.train(arm, learner.Training(4, 16, 0.0, 100))
    assert stopped["iterations"] == before + 2


def test_results_are_written_after_each_case_and_tabulated(
    learner, script, tmp_path, monkeypatch, capsys
):
    (case,) = (case for case in learner.CASES if case.name == "cartpole")
    monkeypatch.setattr(learner, "CASES", [case] * 4)
    monkeypatch.setattr(learner, "TRAINED_ENVS", (4096,))
    written = []

    def keep(name, rows, folder, **more):
        written.append(len(rows))
        return original(name, rows, folder, **more)

    original = learner.write_results
    monkeypatch.setattr(learner, "write_results", keep)
    folder = tmp_path / "out"
    learner.main(["--tiny", "--json", "--rounds", "1", "--out", str(folder)])
    assert written == sorted(written)
    assert len(set(written)) > 4
    said = capsys.readouterr().out
    assert "ours: references on a CPU, in fp32" in said
    assert "cartpole: 16 x 8, 4-8-8-2 categorical, 16 minibatches" in said
    (file,) = folder.glob("learner-*.json")
    record = json.loads(file.read_text())
    assert record["tiny"] is True
    assert len(record["rows"]) == written[-1]

    report = script("report")
    record["machine"]["gpu"] = "Made-up GPU"
    rows = record["rows"]
    rows[0] |= {"busy": 0.93, "published_ms": 78.6, "median_ms": 7.0}
    lines = report.learner(record)
    table = [line for line in lines if line.startswith("| 16 x 8, 4-8-8-2")]
    assert len(table) == 1  # the same problem four times over
    assert table[0].startswith("| 16 x 8, 4-8-8-2 categorical | 7.0 (")
    assert "| 93% |" in table[0]
    assert "| 78.6 |" in table[0]
    header = next(line for line in lines if line.startswith("| learner step"))
    assert header.count("|") == table[0].count("|")
    assert any("training on tensor CartPole" in line for line in lines)
    assert lines[-2].endswith(f"commit {record['machine']['commit']}.")
    for row in rows:
        row["status"] = "failed: it"
    assert report.learner(record) == []


def test_no_time_runs_nothing(learner, tmp_path, capsys):
    learner.main(["--tiny", "--seconds", "0", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("learner-*.json")
    record = json.loads(file.read_text())
    assert record["rows"] == []
    assert len(record["not_run"]) == len(learner.CASES) + len(learner.TRAINED_ENVS)
    assert "not run, out of time: learner step, puffer" in capsys.readouterr().out


def test_a_failed_arm_fails_the_script(learner, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "TRAINED_ENVS", ())
    (case,) = (case for case in learner.CASES if case.name == "cartpole")
    monkeypatch.setattr(learner, "CASES", [case._replace(arms=("autograd",))] * 4)
    with pytest.raises(SystemExit, match="cartpole, autograd: failed"):
        learner.main(["--tiny", "--out", str(tmp_path)])


def test_make_gpu_ends_in_time_whatever_hangs(script, monkeypatch, capsys):
    gpu = script("gpu")
    clock, commands = [0.0], []

    def run(command, env, seconds):
        assert seconds > 0
        commands.append((Path(command[-1]).name, command))
        clock[0] += seconds  # it had to be stopped
        return None, []

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made-up GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 1
    assert clock[0] <= 9 * 60
    ran = [" ".join(command) for _, command in commands]
    assert ["tests/gpu" in ran[0], "bench_kernels.py" in ran[1], "bench_learner.py" in ran[2]] == [
        *[True] * 3
    ]
    said = capsys.readouterr().out
    assert "bench_learner.py was stopped; what it had measured is in no file" in said
    assert "control: not run: no time was left" in said


def test_make_gpu_trains_against_peers_where_time_is_left(script, monkeypatch, capsys):
    gpu = script("gpu")
    ran = []

    def run(command, env, seconds):
        ran.append(" ".join(command))
        return 0, ["it ran"]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made-up GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--only", "gae"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 0
    assert "--only gae" in ran[1]
    assert "--only" not in ran[2]
    assert "bench_control.py --device cuda --case cartpole-tensor pendulum-tensor" in ran[3]
    assert "control: complete" in capsys.readouterr().out


def test_a_stopped_learner_still_shows_its_tables(script, learner, tmp_path, capsys):
    folder = tmp_path / "out"
    learner.main(["--tiny", "--rounds", "1", "--only", "cartpole", "--out", str(folder)])
    (file,) = folder.glob("*.json")
    capsys.readouterr()
    script("gpu").show_unfinished("bench_learner", ["begun", f"results: {file}"])
    said = capsys.readouterr().out
    assert "cartpole: 16 x 8, 4-8-8-2 categorical, 16 minibatches" in said
    assert f"bench_learner.py was stopped; what it had measured is in {file}" in said
