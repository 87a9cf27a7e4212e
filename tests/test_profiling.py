"""Profiling: ranges a real NVTX tool sees, stage times, the table, and `ppo-fast profile`."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ppo_fast import profiling
from ppo_fast.cli import main
from ppo_fast.profiling import StageTimer, phase_table, ranged, span, stage_seconds

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")
TRAIN = ["train", "CartPole-v1", "--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2"]
TRAIN += ["--update-epochs", "3", "--no-progress-bar"]


def environment(**more):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in more.items()},
    }


# What a tool records. NVTX loads it when the process makes its first call, so it runs in its own.


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """The NVTX tool of nvtx_recorder.c as a shared library."""
    pytest.importorskip("nvtx")
    if COMPILER is None:
        pytest.skip("no C compiler (cc or gcc) to build the NVTX tool with")
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    source = Path(__file__).with_name("nvtx_recorder.c")
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True
    )
    return library


SCRIPT = """
import json, os, sys
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from ppo_fast import PPO
from ppo_fast.profiling import StageTimer, listening, nvtx_attached, ranged, span

assert nvtx_attached() and listening()
folder = sys.argv[1]

def record(name):
    os.environ["NVTX_RECORD"] = f"{folder}/{name}"

record("training")
model = PPO("CartPole-v1", num_envs=2, num_steps=16, num_minibatches=2, update_epochs=3)
model.learn(70)

record("environment_fails")
class Falling(CartPoleEnv):
    steps = 0
    def step(self, action):
        Falling.steps += 1
        if Falling.steps > 12:
            raise ValueError("fell off the table")
        return super().step(action)
try:
    PPO(Falling, num_envs=2, num_steps=16, num_minibatches=2).learn(70)
except ValueError as error:
    assert "fell off the table" in str(error)
else:
    raise SystemExit("the environment did not fail")

record("exceptions")
timer = StageTimer()
def fails():
    raise KeyboardInterrupt
for _ in range(2):
    try:
        with timer.stage("rollout"), timer.stage("rollout/environment"):
            ranged("innermost", fails)()
    except KeyboardInterrupt:
        with span("after"):
            pass

record("both")
with torch.profiler.profile() as profiler:
    with timer.stage("gae"), span("gae/part"):
        torch.ones(3).sum()
keys = [row.key for row in profiler.key_averages()]
json.dump({"iterations": model.iteration, "keys": keys}, sys.stdout)
"""


@pytest.fixture(scope="module")
def recorded(recorder, tmp_path_factory):
    """What the script said, and the lines the tool wrote, by part of the script."""
    folder = tmp_path_factory.mktemp("recorded")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment(NVTX_INJECTION64_PATH=recorder, NVTX_RECORD=folder / "imports"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), {file.name: file.read_text() for file in folder.iterdir()}


def nested(text):
    """The ranges of a record as `(name, [ranges inside])`, asserting that all of them end.

    All are of one thread, of our domain, and carry a registered string, which is what
    `nsys --nvtx-capture` recognises.
    """
    root = []
    stack = [root]
    threads = set()
    for line in text.splitlines():
        word, thread, domain, *message = line.split(" ", 4)
        threads.add(thread)
        assert domain == "ppo_fast", line
        if word == "push":
            kind, name = message
            assert kind == "3", line
            stack[-1].append((name, []))
            stack.append(stack[-1][-1][1])
        else:
            stack.pop()
            assert stack, "a range was ended that had not begun"
    assert stack == [root], f"ranges that did not end: {stack[1:]}"
    assert len(threads) == 1
    return root


def names(ranges):
    return [name for name, _ in ranges]


def test_training_emits_the_stages_in_order_nested_and_balanced(recorded):
    said, records = recorded
    ranges = nested(records["training"])
    assert said["iterations"] >= 3
    assert names(ranges) == ["rollout", "gae", "update", "log"] * said["iterations"]


def test_parts_lie_inside_their_stages_as_often_as_they_run(recorded):
    _, records = recorded
    for stage, inside in nested(records["training"]):
        parts = Counter(names(inside))
        assert all(not deeper for _, deeper in inside)
        if stage == "rollout":
            assert set(parts) == {"rollout/inference", "rollout/environment"}
            assert parts["rollout/environment"] % 16 == 0
            assert parts["rollout/inference"] >= parts["rollout/environment"]
        else:
            # 3 epochs of 2 minibatches
            assert parts == ({"update/minibatch": 6} if stage == "update" else {})


def test_ranges_end_where_an_environment_fails(recorded):
    ((stage, inside),) = nested(recorded[1]["environment_fails"])
    assert stage == "rollout"
    assert names(inside)[-1] == "rollout/environment"


def test_ranges_end_when_their_body_raises(recorded):
    inner = [("rollout/environment", [("innermost", [])])]
    assert nested(recorded[1]["exceptions"]) == [("rollout", inner), ("after", [])] * 2


def test_an_nvtx_tool_and_a_torch_profiler_can_listen_together(recorded):
    said, records = recorded
    assert nested(records["both"]) == [("gae", [("gae/part", [])])]
    assert {"gae", "gae/part"} <= set(said["keys"])


def test_importing_emits_nothing(recorded):
    assert "imports" not in recorded[1]


# Nobody listens.


def test_a_tool_is_seen_only_where_there_is_one():
    there = profiling.nvtx is not None and "NVTX_INJECTION64_PATH" in os.environ
    assert profiling.nvtx_attached() == there


def test_without_a_profiler_there_is_nothing_in_the_way(monkeypatch):
    monkeypatch.setattr(profiling, "nvtx_attached", lambda: False)
    function = print
    assert ranged("rollout/environment", function) is function
    assert span("rollout") is span("update")
    with torch.profiler.profile():
        assert ranged("rollout/environment", function) is not function
        assert span("rollout") is not span("update")
    assert ranged("rollout/environment", function) is function


def test_ranged_passes_everything_through(monkeypatch):
    monkeypatch.setattr(profiling, "nvtx_attached", lambda: False)
    with torch.profiler.profile() as profiler:
        assert ranged("part", divmod)(7, 2) == (3, 1)
        assert ranged("part", sorted)([1, 2], reverse=True) == [2, 1]
        with pytest.raises(ZeroDivisionError):
            ranged("part", divmod)(7, 0)
    assert {row.key: row.count for row in profiler.key_averages()}["part"] == 3


# Times.


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now` moves."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(profiling.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_stage_seconds_add_up_until_taken(clock):
    timer = StageTimer()
    for seconds in (1.0, 2.5):
        with timer.stage("rollout"):
            clock.now += 0.5
            with timer.stage("rollout/environment"):
                clock.now += seconds
    with timer.stage("gae"):
        pass
    assert timer.take() == {"rollout": 4.5, "rollout/environment": 3.5, "gae": 0.0}
    assert timer.take() == {}


def test_a_stage_that_raises_is_timed_and_left(clock):
    timer = StageTimer()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), timer.stage("update"):
            clock.now += 2.0
            raise error
    with timer.stage("update"):
        clock.now += 1.0
    assert timer.take() == {"update": 5.0}


def test_stage_seconds_of_metrics():
    metrics = {
        "time/rollout_seconds": 3.0,
        "time/inference_seconds": 1.0,
        "time/update/minibatch_seconds": 0.5,
        "time/update_seconds": 0.75,
        "time/sps": 1000.0,
        "train/entropy": 0.5,
    }
    assert stage_seconds(metrics) == {
        "rollout": 3.0,
        "rollout/inference": 1.0,
        "update/minibatch": 0.5,
        "update": 0.75,
    }


def test_phase_table():
    totals = {"other": 1.0, "update": 4.0, "rollout/environment": 1.25, "rollout": 5.0}
    assert phase_table({**totals, "rollout/inference": 0.5}).splitlines() == [
        "stage            seconds    share",
        "rollout             5.00   50.0 %",
        "  environment       1.25   12.5 %",
        "  inference         0.50    5.0 %",
        "update              4.00   40.0 %",
        "other               1.00   10.0 %",
    ]


def test_phase_table_of_nothing():
    assert phase_table({}).splitlines() == ["stage    seconds    share"]
    assert phase_table({"gae": 0.0}).endswith("gae         0.00    0.0 %")


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        ({"rollout/inference": 1.0}, "'rollout/inference' is a part of a stage that is not in"),
        ({"gae": -1.0}, "gae = -1.0; expected seconds, 0 or more"),
        ({"gae": float("nan")}, "gae = nan; expected seconds"),
    ],
)
def test_phase_table_refuses_what_is_no_time(totals, message):
    with pytest.raises(ValueError, match=message):
        phase_table(totals)


# The command line.


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in an empty folder, where no tool is on PATH: `(exit code, stdout, stderr)`."""
    for package in ("tyro", "safetensors", "tensorboard"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def table_of(out):
    """`{stage: (seconds, share)}` of the printed table."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["stage", "seconds", "share"])
    rows = {}
    for line in lines[start + 1 :]:
        if not line.endswith(" %"):
            break
        name, seconds, share, _ = line.split()
        rows[name] = (float(seconds), float(share))
    return rows


def test_train_and_resume_print_where_the_time_went(run, monkeypatch):
    code, out, _ = run(*TRAIN, "--total-timesteps", "100", "--run-dir", "r")
    assert code == 0
    rows = table_of(out)
    tops = ["rollout", "gae", "update", "log", "other"]
    assert [name for name in rows if name in tops] == tops
    assert {"inference", "environment"} < set(rows)
    assert sum(rows[name][1] for name in tops) == pytest.approx(100, abs=0.5)
    seconds = float(out.split(" steps in ")[1].split(" s")[0])
    assert sum(rows[name][0] for name in tops) == pytest.approx(seconds, abs=0.1)

    # Parts are within their stages; what the last iteration logged counts too.
    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.cli.stage_seconds", lambda metrics: {"rollout/environment": 99.0})
        patch.setattr(
            "ppo_fast.control.ppo.StageTimer.take", lambda timer: {"rollout": 0.0, "log": 0.01}
        )
        rows = table_of(run(*TRAIN, "--total-timesteps", "10", "--run-dir", "r1")[1])
    assert (rows["environment"][0], rows["log"][0]) == (99.0, 0.01)
    assert rows["other"][0] > 0

    def stop(metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.cli.stage_seconds", stop)
        assert run(*TRAIN, "--total-timesteps", "100", "--run-dir", "r2")[0] == 130
    code, out, _ = run("train", "--resume", "r2")
    assert (code, [name for name in table_of(out) if name in tops]) == (0, tops)


def trace_of(path):
    with gzip.open(path) as file:
        return json.load(file)


def test_the_fallback_writes_a_trace_of_the_iterations_asked_for(run):
    command = ["--", *TRAIN, "--total-timesteps", "200", "--run-dir", "r"]
    code, out, err = run("profile", "--skip", "1", "--iterations", "2", "--out", "p/t", *command)
    assert code == 0
    assert "nsys is not on PATH: recording with torch.profiler instead" in err
    assert "https://developer.nvidia.com/nsight-systems" in err
    assert "PPO_FAST_CAPTURE=1:2 nsys profile" in err
    assert "run folder r: " in out
    assert "trace p/t.json.gz: open it at https://ui.perfetto.dev" in out
    assert "Self CPU" in out
    assert "aten::" in out
    events = trace_of("p/t.json.gz")["traceEvents"]
    counts = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    # Its steps are iterations, counted from 0.
    assert {name for name in counts if "#" in name} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert {name: counts[name] for name in profiling.STAGES} == dict.fromkeys(profiling.STAGES, 2)
    assert counts["update/minibatch"] == 12
    assert profiling.iteration_listeners == []


def test_the_fallback_records_other_commands_whole(run):
    code, out, err = run("profile", "--tool", "torch", "--out", "t", "--", "doctor")
    assert code == 0
    assert "nsys" not in err
    assert "all is well" in out
    assert any(e["name"].startswith("aten::") for e in trace_of("t.json.gz")["traceEvents"])


def test_the_commands_exit_code_is_passed_through(run):
    fails = [*TRAIN, "--total-timesteps", "100", "--stop-return", "500", "--run-dir", "r"]
    code, out, err = run("profile", "--tool", "torch", "--skip", "0", "--out", "t", "--", *fails)
    assert code == 1
    assert "stop_return = 500 was not reached" in err
    assert "trace t.json.gz" in out
    assert trace_of("t.json.gz")["traceEvents"]
    wrong = ["--", "train", "CartPole-v1", "--gamma", "2"]
    assert run("profile", "--tool", "torch", "--out", "u", *wrong)[0] == 2


@pytest.mark.parametrize("skip", [2, 50])
def test_training_that_ends_before_the_window_is_an_error(run, skip):
    # Two iterations: 2 environments times 16 steps are too few, twice that is enough.
    command = ["--", *TRAIN, "--total-timesteps", "40", "--run-dir", "r"]
    code, _, err = run("profile", "--tool", "torch", "--skip", skip, "--out", "t", *command)
    assert code == 1
    assert f"nothing was recorded: training ended after 2 iterations, and the first {skip}" in err
    assert not Path("t.json.gz").exists()


def test_print_command_prints_and_does_nothing(run):
    window = ["--skip", "4", "--iterations", "5", "--out", "p/t", "--print-command"]
    for tool in ([], ["--tool", "nsys"]):
        code, out, err = run("profile", *tool, *window, "--", "train", "CartPole-v1", "--seed", "3")
        assert (code, err) == (0, "")
        words = shlex.split(out)
        assert words[:3] == ["PPO_FAST_CAPTURE=4:5", "nsys", "profile"]
        assert {"--trace=cuda,nvtx,osrt", "--output=p/t", "--capture-range=nvtx"} < set(words)
        assert {"--nvtx-capture=capture@ppo_fast", "--capture-range-end=stop"} < set(words)
        child = [sys.executable, "-m", "ppo_fast", "train", "CartPole-v1", "--seed", "3"]
        assert words[-7:] == child
    code, out, _ = run("profile", "--tool", "ncu", *window, "--", "train", "CartPole-v1")
    words = shlex.split(out)
    assert (code, words[:2]) == (0, ["PPO_FAST_CAPTURE=4:5", "ncu"])
    assert words[words.index("--nvtx-include") + 1] == "ppo_fast@capture/*/update"
    assert words[words.index("--export") + 1] == "p/t"
    part = ["--tool", "ncu", "--stage", "update/minibatch", "--print-command"]
    words = shlex.split(run("profile", *part, "--", "train", "CartPole-v1")[1])
    assert words[words.index("--nvtx-include") + 1] == r"ppo_fast@capture/*/update\/minibatch"
    # Other commands have no iterations: all of them is recorded.
    words = shlex.split(run("profile", "--tool", "nsys", "--print-command", "--", "doctor")[1])
    assert words[0] == "nsys"
    assert not any("capture" in word for word in words)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_tool_that_was_asked_for_and_is_missing_runs_nothing(run, tool):
    code, out, err = run("profile", "--tool", tool, "--", *TRAIN)
    assert (code, out) == (127, "")
    assert err.count("\n") == 1
    assert f"ppo-fast: {tool} is not on PATH: nothing was run" in err
    for part in ("To install", "https://developer.nvidia.com/", f"PPO_FAST_CAPTURE=2:3 {tool} "):
        assert part in err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "profile needs one of train, eval, plot, doctor, bench, rlhf after --"),
        (["--"], 2, "got nothing"),
        (["--", "trian"], 2, "got trian"),
        (["--", "profile", "--", "doctor"], 2, "got profile"),
        (["--skip", "-1", "--", "doctor"], 2, "skip = -1; expected at least 0"),
        (["--iterations", "0", "--", "doctor"], 2, "iterations = 0; expected at least 1"),
        (["--launches", "0", "--", "doctor"], 2, "launches = 0; expected at least 1"),
        (["--stage", "reset", "--", "doctor"], 2, "stage = 'reset'; expected rollout, gae"),
        (["--tool", "perf", "--", "doctor"], 2, "perf"),
        (["--tool", "torch", "--out", "/proc/no/t", "--", "doctor"], 1, "out = /proc/no/t"),
    ],
)
def test_wrong_usage_says_what_is_wrong(run, arguments, code, text):
    found, out, err = run("profile", *arguments)
    assert found == code
    assert text in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in err


def test_nsys_gets_the_command_and_sees_exactly_the_iterations(recorder, tmp_path):
    for package in ("tyro", "safetensors", "tensorboard"):
        pytest.importorskip(package)
    tool = tmp_path / "nsys"
    tool.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$ARGS"\n'
        'while [ "$1" != "$PYTHON" ]; do shift; done\n'
        'export NVTX_INJECTION64_PATH="$RECORDER"\nexec "$@"\n'
    )
    tool.chmod(0o755)
    fails = [*TRAIN, "--total-timesteps", "160", "--stop-return", "500", "--run-dir", "r"]
    profile = ["profile", "--skip", "1", "--iterations", "2", "--out", "p/t", "--", *fails]
    done = subprocess.run(
        [sys.executable, "-m", "ppo_fast", *profile],
        env=environment(
            PATH=f"{tmp_path}:{os.environ['PATH']}", ARGS=tmp_path / "args", PYTHON=sys.executable,
            RECORDER=recorder, NVTX_RECORD=tmp_path / "record",
        ),
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "stop_return = 500 was not reached" in done.stderr
    assert "nsys-ui p/t.nsys-rep" in done.stdout
    words = (tmp_path / "args").read_text().splitlines()
    assert words[0] == "profile"
    assert words[-len(fails) - 3 :] == [sys.executable, "-m", "ppo_fast", *fails]
    ranges = nested((tmp_path / "record").read_text())
    stages = list(profiling.STAGES)
    assert names(ranges)[:5] == [*stages, "capture"]
    assert names(ranges).count("capture") == 1
    assert names(dict(ranges)["capture"]) == stages * 2
    assert names(ranges)[5:9] == stages


@pytest.mark.parametrize("value", ["2", "2:0", ":", "a:b", "-1:2", "1.5:2", "1:2:3"])
def test_a_capture_window_that_is_none(run, monkeypatch, value):
    monkeypatch.setenv("PPO_FAST_CAPTURE", value)
    code, _, err = run(*TRAIN, "--total-timesteps", "40", "--run-dir", "r")
    assert code == 1
    assert f"PPO_FAST_CAPTURE is {value!r}; expected SKIP:N" in err


@pytest.mark.parametrize(
    ("window", "iterations", "expected"),
    [
        ("", 2, "01"),
        ("0:1", 3, "[0]12"),
        ("0:9", 2, "[01]"),
        ("1:2", 4, "0[12]3"),
        ("2:1", 4, "01[2]3"),
        ("1:1", 2, "0[1]"),
        ("2:2", 3, "01[2]"),
    ],
)
def test_the_capture_range_surrounds_the_window(monkeypatch, caplog, window, iterations, expected):
    events = []

    @contextmanager
    def recording(name):
        assert name == "capture"
        events.append("[")
        yield
        events.append("]")

    monkeypatch.setattr(profiling, "span", recording)
    monkeypatch.setattr(profiling, "nvtx_attached", lambda: True)
    monkeypatch.setenv("PPO_FAST_CAPTURE", window)
    with profiling.captured_iterations() as iteration_ended:
        for iteration in range(iterations):
            events.append(str(iteration))
            iteration_ended()
    assert "".join(events) == expected
    assert caplog.text == ""


def test_a_capture_that_records_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setenv("PPO_FAST_CAPTURE", "1:1")
    monkeypatch.setattr(profiling, "nvtx_attached", lambda: False)
    with profiling.captured_iterations() as iteration_ended:
        iteration_ended()
        assert "PPO_FAST_CAPTURE: nothing is recorded: no NVTX tool is attached" in caplog.text
        caplog.clear()
    assert "nothing was recorded: training ended after 1 iterations, and the first 1" in caplog.text


# benchmarks/nsight.sh.

NSIGHT = ["sh", str(ROOT / "benchmarks" / "nsight.sh")]


def nsight(*arguments, **variables):
    return subprocess.run(
        [*NSIGHT, *arguments], env=environment(PYTHON=sys.executable, **variables),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_script_prints_the_same_command_lines_as_the_command(run, tmp_path):
    flags = {"TRAIN_FLAGS": "--seed 3", "OUT": "p", "SKIP": 4, "ITERATIONS": 5, "LAUNCHES": 6}
    window = ["--skip", "4", "--iterations", "5", "--launches", "6", "--print-command"]
    for case, tool in (("train", "nsys"), ("update", "ncu")):
        done = nsight("--print", case, ENV_ID="Pendulum-v1", PATH="/bin:/usr/bin", **flags)
        assert (done.returncode, done.stderr) == (0, "")
        command = ["--", "train", "Pendulum-v1", "--seed", "3"]
        ours = run("profile", "--tool", tool, *window, "--out", f"p/{case}", *command)[1]
        assert shlex.split(done.stdout) == ["env", *shlex.split(ours)]
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_tools_on_the_suite(tmp_path):
    for tool in ("nsys", "ncu"):
        (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" >>"$ARGS"\nexit 3\n')
        (tmp_path / tool).chmod(0o755)
    path = {"PATH": f"{tmp_path}:/bin:/usr/bin", "ARGS": tmp_path / "args", "OUT": tmp_path / "out"}
    assert nsight("bench", "gae", **path).returncode == 3
    assert nsight("kernel", "gae", "gae_kernel", **path).returncode == 3
    words = (tmp_path / "args").read_text().splitlines()
    systems, compute = words[: words.index(str(tmp_path / "ncu"))], words
    assert systems[:2] == [str(tmp_path / "nsys"), "profile"]
    assert systems[-3:] == [str(ROOT / "benchmarks"), "--only", "gae"]
    assert compute[compute.index("--kernel-name") + 1] == "gae_kernel"
    code = systems[systems.index("-c") + 1]
    # The code both get: the suite, inside the range they wait for.
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks"), "--help"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout


@pytest.mark.parametrize(("case", "tool"), [("train", "nsys"), ("update", "ncu")])
def test_the_script_says_which_tool_is_missing(tmp_path, case, tool):
    needed = {name: shutil.which(name) for name in ("sh", "dirname", "env", "mkdir", "sed")}
    for name, file in needed.items():
        (tmp_path / name).symlink_to(file)
    done = nsight(case, PATH=tmp_path, OUT=tmp_path / "out")
    assert done.returncode == 127
    assert f"nsight.sh: {tool} is not on PATH; install Nsight" in done.stderr
    assert "ppo-fast profile --tool torch -- train CartPole-v1" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["frain"], ["bench"], ["kernel", "gae"], ["--print", "x"]]
)
def test_the_script_refuses_wrong_usage(arguments):
    done = nsight(*arguments)
    assert done.returncode == 2
    assert done.stderr
    assert nsight("--help").returncode == 0
