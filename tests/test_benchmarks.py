"""The benchmark scripts run, and write what they promise; sizes are tiny, figures mean nothing."""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_fast.cli import main as cli

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by name, with its results going to `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)

    def load(name):
        if not (BENCHMARKS / f"{name}.py").exists():
            pytest.skip(f"no benchmarks/{name}.py")
        return importlib.import_module(name)

    return load


def read(folder, pattern):
    (file,) = folder.glob(pattern)
    record = json.loads(file.read_text())
    assert record["machine"]["cpu"]
    return file, record["rows"]


def test_learn_writes_rows_table_and_picture_and_trains_nothing_twice(
    script, tmp_path, monkeypatch, capsys
):
    learn = script("learn")
    monkeypatch.setattr(learn, "code_version", lambda: "1")  # the source may be under edit
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{learn.BEGIN}\nold table\n{learn.END}\nafter\n")
    monkeypatch.setitem(learn.TARGETS, "CartPole-v1", learn.Target(512, 5, 475.0))
    arguments = ["--env", "CartPole-v1", "--seeds", "1", "--jobs", "1", "--readme", str(readme)]
    learn.main(arguments)
    file, (row,) = read(tmp_path, "learn-*.json")
    assert (row["env"], row["seed"], row["timesteps"]) == ("CartPole-v1", 1, 512)
    assert row["steps"] >= 512
    assert row["passed"] is False
    assert 8 < row["eval_return"] <= 500
    assert row["curve"][-1][0] == row["steps"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = readme.read_text()
    assert page.startswith(f"before\n{learn.BEGIN}\n| environment |")
    assert page.endswith(f"]({file.with_suffix('.png').name})\n{learn.END}\nafter\n")
    assert "| CartPole-v1 | 512 | 475 | 0 of 1 seeds |" in page
    assert "old table" not in page

    capsys.readouterr()
    learn.main(arguments)
    assert "1 of 1 runs are in" in capsys.readouterr().out
    assert read(tmp_path, "learn-*.json") == (file, [row])


def test_learn_keeps_finished_rows_when_a_run_fails(script, tmp_path, monkeypatch, capsys):
    learn = script("learn")
    row = dict.fromkeys(["train_return", "gate", "passed", "gate_steps", "gate_seconds"])
    row |= {"env": "Acrobot-v1", "seed": 1, "timesteps": 9, "steps": 9, "seconds": 1.0, "sps": 9.0}
    row |= {"eval_return": -500.0, "eval_std": 0.0, "curve": [], "code": learn.code_version()}
    row["config"] = learn.settings("Acrobot-v1", 1)

    def run_jobs(jobs, workers, done):
        done(row)
        return ["Acrobot-v1 seed 2: it broke"]

    monkeypatch.setattr(learn, "run_jobs", run_jobs)
    monkeypatch.setitem(learn.TARGETS, "Acrobot-v1", learn.Target(9, 2, -100.0))
    with pytest.raises(SystemExit, match="Acrobot-v1 seed 2: it broke"):
        learn.main(["--env", "Acrobot-v1", "--readme", str(tmp_path / "none.md")])
    assert read(tmp_path, "learn-*.json")[1] == [row]
    out = capsys.readouterr().out
    assert "none.md has no <!-- learn:begin -->" in out
    assert "| Acrobot-v1 | 9 |" in out


@pytest.mark.parametrize("op", ["gae", "log_probs"])
def test_bench_of_an_op_runs(script, tmp_path, monkeypatch, capsys, op):
    bench = script(f"bench_{op}")
    sizes = {"gae": ((16, 2),), "log_probs": ("8x5",)}
    monkeypatch.setattr(bench, "SHAPES", sizes[op])
    monkeypatch.setattr(sys, "argv", [bench.__name__, "--rounds", "1", "--json"])
    bench.main()
    _, rows = read(tmp_path, f"{op}-*.json")
    assert all(row["median_us"] > 0 for row in rows if "median_us" in row)
    assert len(rows) >= 4


LIMITS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11, "l2_bytes": None}


def test_bench_kernels_checks_and_times_every_op(script, tmp_path, capsys):
    bench = script("bench_kernels")
    only = ["whiten", "mean_nll"]
    bench.main(["--tiny", "--rounds", "1", "--out", str(tmp_path), "--only", *only])
    file, rows = read(tmp_path, "kernels-*.json")
    timed = [row for row in rows if row["status"] == "timed"]
    assert {row["op"] for row in timed} == {"masked_whiten", "mean_nll_from_hidden"}
    for row in timed:
        assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"]
        assert row["bytes"] > 0
        assert row["flops"] > 0
        assert row["copy_fraction"] > 0
        assert max(row["error"].values()) < 1e-4
    assert sum(row["arm"] == "ppo_fast" for row in timed) == 3
    record = json.loads(file.read_text())
    assert record["ceilings"]["copy_bytes_per_s"] > 0
    assert "not_run" in record
    out = capsys.readouterr().out
    assert "| masked_whiten" in out
    assert f"wrote {file}" in out


def test_a_tiny_run_leaves_nothing_among_the_results(script, tmp_path, capsys):
    script("bench_kernels").main(["--json", "--rounds", "1", "--only", "no such op"])
    assert not list(tmp_path.glob("*.json"))
    assert "wrote " in capsys.readouterr().out


def test_cases_that_time_does_not_reach_are_named(script, tmp_path, capsys):
    bench = script("bench_kernels")
    bench.main(["--out", str(tmp_path), "--only", "whiten", "--seconds", "0"])
    file, rows = read(tmp_path, "kernels-*.json")
    assert rows == []
    assert json.loads(file.read_text())["not_run"] == ["masked_whiten 300, mask forward"]
    assert "not run, out of time: masked_whiten" in capsys.readouterr().out


def case_of(op):
    return next(case for case in importlib.import_module("cases").cases(True) if case.label == op)


def test_a_wrong_arm_is_said_to_be_wrong_and_not_timed(script, monkeypatch):
    bench, case = script("bench_kernels"), None
    case = case_of("masked_whiten")

    def off(inputs, upstream):
        return lambda: {"whitened": case.op.reference(**inputs) * 1.001}

    def unwritten(inputs, upstream):
        return lambda: {"whitened": torch.empty_like(inputs["x"])}

    def broken(inputs, upstream):
        raise RuntimeError("no such device")

    arms = {"off": off, "unwritten": unwritten, "broken": broken}
    ours = [(bench.OURS, lambda: bench.our_arm(case))]
    monkeypatch.setattr(
        bench, "arms_of", lambda case: [*ours, *((n, lambda a=a: a) for n, a in arms.items())]
    )
    rows = {row["arm"]: row for row in bench.run_case(case, LIMITS, 1)}
    assert rows["off"]["status"] == "wrong: whitened is off by 0.001"
    assert rows["unwritten"]["status"] == "wrong: whitened is off by nan"
    assert rows["broken"]["status"].startswith("failed: RuntimeError: no such device (")
    assert [row["arm"] for row in rows.values() if "median_us" in row] == [bench.OURS]


def test_a_peer_that_does_not_import_is_reported(script, monkeypatch):
    bench = script("bench_kernels")
    # An adapter of a package that is there, but is not what the adapter expects.
    monkeypatch.setattr(bench, "KERNEL_PEERS", {"liger": "json", "trl": "no_such_package"})
    rows = {row["arm"]: row for row in bench.run_case(case_of("masked_whiten"), LIMITS, 1)}
    assert rows["json"]["status"].startswith("failed: ModuleNotFoundError: No module named")
    assert bench.absent_peers() == ["no_such_package"]
    assert "no_such_package" not in rows


def test_samples_are_judged_by_what_is_said_about_them(script):
    bench = script("bench_kernels")
    case = case_of("sample_from_logits")
    inputs, upstream = bench.new_inputs(case)
    exact = bench.truth(case, inputs, upstream)
    got = bench.native(case, case.op, "reference")(inputs, upstream)()
    assert bench.faults(got, bench.errors(case, got, exact, inputs)) == ""
    got["log_probs"] = got["log_probs"] - 0.1
    assert "log_probs" in bench.faults(got, bench.errors(case, got, exact, inputs))


@pytest.mark.parametrize("tiny", [True, False])
def test_every_op_has_cases(script, tiny):
    script("bench_kernels")
    found = importlib.import_module("cases").cases(tiny)
    named = [(case.label, case.name, case.passes) for case in found]
    assert len(set(named)) == len(named)
    ops = {"gae", "gae_packed", "log_probs_from_logits", "ppo_loss", "ppo_loss_from_logits"}
    ops |= {"ppo_loss_from_gaussian", "kl_from_logits", "masked_whiten", "sample_from_logits"}
    assert ops < {case.label for case in found}
    assert [case.priority for case in found] == sorted(case.priority for case in found)


def test_bytes_are_counted_as_the_records_count_them(script):
    bench = script("bench_kernels")

    def moved(case):
        inputs, upstream = bench.new_inputs(case)
        return case.bytes(
            inputs, bench._as_returned(case, inputs, bench.truth(case, inputs, upstream))
        )

    N, T = 5, 40
    assert moved(case_of("gae")) == 17 * T * N + 4 * N
    assert moved(case_of("ppo_loss")) == 33 * 200 + 4
    M, V = 4, 300  # float32, with the gradient: two reads of the logits, one write
    assert moved(case_of("log_probs_from_logits")) == 3 * 4 * M * V + 8 * M + 4 * M


@pytest.mark.parametrize(("working_set", "sets"), [(10**9, 1), (50 * 10**6, 5), (10**6, 64)])
def test_buffers_rotate_beyond_the_cache(script, working_set, sets):
    script("bench_kernels")
    timing = importlib.import_module("timing")
    assert timing.number_of_sets(working_set, 60 * 10**6) == sets
    assert timing.number_of_sets(working_set, None) == 1


class StandIn:
    """For the parts of torch.cuda that timing.py uses: events by a clock that each call advances."""

    def __init__(self, monkeypatch, captures=True):
        self.clock, self.graph_calls, self.captures = 0.0, [], captures
        stand_in = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = stand_in.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for call in stand_in.graph_calls:
                    call()

        class Capture:
            def __init__(self, graph):
                pass

            def __enter__(self):
                if not stand_in.captures:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                stand_in.capturing = True

            def __exit__(self, *error):
                stand_in.capturing = False

        class Stream:
            def wait_stream(self, other):
                pass

        self.capturing = False
        names = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream}
        names |= {"current_stream": Stream, "synchronize": lambda: None}
        names |= {"stream": lambda side: contextlib.nullcontext(), "is_available": lambda: True}
        names |= {"reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 10**6}
        names |= {"max_memory_allocated": lambda: 4 * 10**6}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, seconds):
        def call():
            if self.capturing:
                self.graph_calls.append(call)
            else:
                self.clock += seconds

        return call


def test_device_time_comes_from_replaying_a_graph(script, monkeypatch):
    script("bench_kernels")
    timing = importlib.import_module("timing")
    device = StandIn(monkeypatch)
    found = timing.measure({"arm": [device.call(10e-6), device.call(30e-6)]}, rounds=3)["arm"]
    assert found.method == "graph"
    assert found.timing.median == pytest.approx(20e-6)
    # Long enough that launching the graph weighs nothing.
    assert found.timing.calls_per_round * 20e-6 >= timing.GRAPH_SECONDS
    assert len(device.graph_calls) == found.timing.calls_per_round
    assert found.peak_mb == 3


def test_what_no_graph_captures_is_timed_by_events_and_says_why(script, monkeypatch):
    script("bench_kernels")
    device = StandIn(monkeypatch, captures=False)
    timing = importlib.import_module("timing")
    found = timing.measure({"arm": [device.call(10e-6), device.call(30e-6)]}, rounds=3)["arm"]
    assert found.method.startswith("events (RuntimeError: operation not permitted when stream is")
    assert "more" not in found.method
    assert found.timing.median == pytest.approx(20e-6)


def kernel_row(arm, median, **more):
    row = {"op": "gae", "case": "8192x1024", "pass": "forward", "arm": arm, "status": "timed"}
    row |= {"median_us": median, "bytes": 17 << 23, "flops": 8 << 23, "times ppo_fast": median / 40}
    return row | {"copy_fraction": 0.8, "matrix_fraction": 0.001, **more}


@pytest.fixture
def report(script, tmp_path, monkeypatch):
    """The report script, writing into `tmp_path`, which has no result files yet."""
    report = script("report")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return report


def test_report_has_no_gpu_number_without_a_gpu_file(report, tmp_path):
    limits = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 7.9e14}
    record = {"ceilings": limits, "machine": {"gpu": None}, "rows": [kernel_row("ppo_fast", 40.0)]}
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(record))
    report.main()
    text = f"before\n{report.BEGIN}\nOn a GPU: not yet measured.\n{report.END}\nafter\n"
    assert report.README.read_text() == text
    assert not report.DOCS.exists()


def test_report_draws_and_tabulates_a_gpu_file(report, tmp_path, monkeypatch, capsys):
    limits = {"copy_bytes_per_s": 4.3e12, "matmul_flops_per_s": 7.9e14}
    machine = {"gpu": "Made-up GPU", "torch": "2.11.0", "date": "2026-01-01", "commit": "abc1234"}
    rows = [
        kernel_row("ppo_fast", 40.0),
        kernel_row("eager", 400.0),
        kernel_row("rl-triton", 60.0),
        kernel_row("torchrl", 200.0),
        kernel_row("rl_games", 1.0, status="failed: it broke"),
        kernel_row("ppo_fast", 1.0, op="sample_from_logits", status="wrong: entropy is off by 1"),
    ]
    record = {"ceilings": limits, "machine": machine, "rows": rows, "not_run": ["kl"]}
    (tmp_path / "kernels-made_up.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys.modules["harness"], "RESULTS", tmp_path)
    monkeypatch.setitem(sys.modules, "report", report)
    cli(["bench", "report"])
    page = report.README.read_text()
    assert "| `gae` | 8192x1024, forward | 40.0 | 80% | 10.0 | - | rl-triton 1.5 |" in page
    assert "copy 4.30 TB/s, matrix product 790 TFLOP/s" in page
    assert "Wrong, and not timed: `sample_from_logits` 8192x1024" in page
    assert "Not run for lack of time: 1 problems." in page
    assert "Made-up GPU; torch 2.11.0; 2026-01-01, commit abc1234" in page
    assert "not yet measured" not in page
    for picture in ("roofline.png", "speedup.png"):
        assert (report.DOCS / picture).read_bytes().startswith(b"\x89PNG")
        assert f"(docs/{picture})" in page


def test_bench_takes_one_word(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["bench"])
    assert stopped.value.code == 2
    assert "bench takes one word: report" in capsys.readouterr().err


def test_gpu_without_a_gpu_or_its_packages_says_so(script, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        gpu.main()
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match="no_such_package missing"):
        gpu.main()


def test_gpu_stops_a_command_that_takes_too_long(script):
    sleep = [sys.executable, "-u", "-c", "import time; print('begun'); time.sleep(60)"]
    assert script("gpu").run(sleep, {}, 2.0) == (None, ["begun"])


def test_the_deadline_starts_no_more_tests(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    raise RuntimeError\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "deadline", str(tmp_path)]
    env = {"PYTHONPATH": str(BENCHMARKS), "PPO_FAST_TESTS_UNTIL": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 tests not run: out of time" in done.stdout
