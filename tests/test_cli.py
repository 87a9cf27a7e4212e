"""The command: what it writes, what it says, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_fast import PPO, functional
from ppo_fast.cli import USAGE, TrainFlags, main
from ppo_fast.config import ControlConfig
from ppo_fast.dispatch import Accelerated
from ppo_fast.doctor import ops, report
from ppo_fast.logger import read_metrics

for package in ("tyro", "safetensors", "tensorboard", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--total-timesteps", "2000", "--num-envs", "8", "--num-steps", "32"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in an empty folder: `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs of CartPole in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        main(["train", "CartPole-v1", *SHORT, "--run-dir", f"{folder}/{seed}", "--seed", str(seed)])
    return folder


def assert_one_line(err, *parts):
    # How the policy is trained is told before.
    lines = [line for line in err.splitlines(True) if not line.startswith("gradients ")]
    err = "".join(lines)
    assert err.startswith("ppo-fast: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def is_picture(file):
    return file.read_bytes()[:4] == b"\x89PNG"


# Help and usage.


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_the_commands(run, arguments):
    assert run(*arguments) == (0, USAGE + "\n", "")
    for command in ("train", "eval", "plot", "doctor"):
        assert f"ppo-fast {command}" in USAGE


def test_the_module_is_the_command(run):
    done = subprocess.run(
        [sys.executable, "-m", "ppo_fast", "no-such"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == run("no-such")


def test_an_unknown_command_is_a_usage_error(run):
    code, _, err = run("trian")
    assert code == 2
    assert err.startswith("ppo-fast: unknown command 'trian'\n\n")
    assert USAGE in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train"], "needs an environment id first"),
        (["train", "--seed", "1"], "needs an environment id first"),
        (["train", "--resume"], "takes one run folder and no other flag"),
        (["train", "--resume", "a", "--seed", "1"], "takes one run folder and no other flag"),
        (["train", "CartPole-v1", "--gama", "0.9"], "--gama"),
        (["train", "CartPole-v1", "--gamma", "x"], "could not convert string to float: 'x'"),
        (["train", "CartPole-v1", "--gamma", "2"], "gamma = 2.0; expected a number in [0, 1]"),
        (["train", "CartPole-v1", "--norm-adv", "True"], "minibatch"),
        (["train", "CartPole-v1", "--num-envs", "0"], "num_envs = 0; expected an integer >= 1"),
        (["eval"], "run folder or checkpoint file (required)"),
        (["doctor", "--verbose"], "doctor takes no arguments"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(run, arguments, text):
    code, out, err = run(*arguments)
    assert code == 2
    assert text in " ".join((out + err).split())
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [["train", "-h"], ["train", "CartPole-v1", "--help"]])
def test_every_setting_is_a_flag_with_its_explanation(run, command):
    code, out, _ = run(*command)
    assert code == 0
    assert "Train PPO on a Gymnasium environment" in out
    words = " ".join(line.strip("│ \n") for line in out.splitlines())
    for field in ControlConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in out
    for text in ("environment steps to train for", "discount factor", "--norm-obs, --no-norm-obs"):
        assert text in words
    assert "--norm-adv {minibatch,batch,none}" in words
    assert "_" not in "".join(word for word in words.split() if word.startswith("--"))


@pytest.mark.parametrize("command", ["eval", "plot"])
def test_the_other_commands_explain_themselves(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: ppo-fast {command}")


def test_flags_fit_the_config():
    assert set(TrainFlags.__dataclass_fields__) - set(ControlConfig.__dataclass_fields__) == {
        "total_timesteps"
    }


# train.


def test_train_leaves_a_whole_run_folder(run):
    code, out, _ = run("train", "CartPole-v1", *SHORT, "--seed", "7")
    assert code == 0
    (folder,) = (Path("runs") / "CartPole-v1").iterdir()
    assert folder.name.endswith("-seed7")
    files = {file.name for file in folder.iterdir()}
    assert {"config.json", "checkpoint.safetensors", "metrics.csv", "learning_curve.png"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert f"run folder {folder}: " in out
    assert "recipe of CartPole-v1; flags override it" in out
    assert "mean return of the last" in out
    assert is_picture(folder / "learning_curve.png")
    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == "CartPole-v1"
    assert (config["seed"], config["num_envs"], config["gamma"]) == (7, 8, 0.98)
    assert config["versions"]["torch"] == torch.__version__
    metrics = read_metrics(folder)
    assert metrics["step"][-1] >= 2000
    assert {"rollout/ep_rew_mean", "train/approx_kl", "time/sps"} <= set(metrics)
    assert PPO.load(folder).num_timesteps == metrics["step"][-1]


def test_train_of_an_unknown_id_is_one_line(run):
    code, _, err = run("train", "CartPoel-v1")
    assert code == 1
    assert_one_line(err, "environment id 'CartPoel-v1' is unknown to Gymnasium")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num-minibatches", "7"], ["8 * 32 = 256 is not divisible by num_minibatches = 7"]),
        (["--device", "tpu0"], ["device = 'tpu0'; expected 'auto', 'cpu'"]),
        (["--recurrent"], ["recurrent policies are not available yet"]),
        (["--run-dir", "/proc/here"], ["run_dir /proc/here cannot be made"]),
    ],
)
def test_what_cannot_be_trained_is_one_line(run, flags, parts):
    code, _, err = run("train", "CartPole-v1", *SHORT, *flags)
    assert code == 1
    assert_one_line(err, *parts)


def test_a_run_folder_is_not_used_twice(run, trained):
    before = (trained / "1" / "checkpoint.safetensors").read_bytes()
    code, _, err = run("train", "CartPole-v1", *SHORT, "--run-dir", trained / "1")
    assert code == 1
    assert_one_line(err, "holds a finished or interrupted run", "ppo-fast train --resume")
    assert (trained / "1" / "checkpoint.safetensors").read_bytes() == before


def test_a_finished_run_cannot_be_resumed(run, trained):
    for arguments in (["--resume", trained / "1"], [f"--resume={trained / '1'}"]):
        code, _, err = run("train", *arguments)
        assert code == 1
        assert_one_line(err, "the last call of learn was finished")


def test_resume_of_what_is_no_run_is_one_line(run):
    code, _, err = run("train", "--resume", "nowhere")
    assert code == 1
    assert_one_line(err, "nowhere: there is no such file")


def test_a_goal_that_is_not_reached_fails_after_everything_is_written(run):
    code, out, err = run("train", "CartPole-v1", *SHORT, "--stop-return", "475", "--run-dir", "r")
    assert code == 1
    assert_one_line(err, "stop_return = 475 was not reached by the mean return of 100 episodes")
    assert "run folder r: " in out
    assert is_picture(Path("r/learning_curve.png"))


def test_a_goal_that_is_reached_ends_the_run(run):
    goal = ["--stop-return", "10", "--stats-window", "20"]
    code, out, err = run("train", "CartPole-v1", *SHORT, *goal, "--run-dir", "r")
    assert (code, err.count("mean return")) == (0, 1), err
    assert "mean return of the last 20 episodes" in out
    assert read_metrics("r")["step"][-1] < 2000
    code, _, err = run("train", "--resume", "r")
    assert_one_line(err, "was finished")


def test_too_few_episodes_are_no_goal_reached(run):
    code, _, err = run(
        "train", "CartPole-v1", *SHORT, "--stop-return", "1", "--stats-window", "999"
    )
    assert code == 1
    assert_one_line(err, "was not reached by the mean return of 999 episodes")


def test_no_bar_is_drawn_where_no_terminal_is(run):
    _, _, err = run("train", "CartPole-v1", *SHORT)
    assert "steps/s" not in err
    assert "\r" not in err


def test_an_error_inside_an_environment_shows_its_traceback(run, tmp_path, monkeypatch):
    (tmp_path / "falling.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Falling(CartPoleEnv):\n"
        "    def step(self, action):\n"
        "        raise ValueError('fell off the table')\n"
        "gym.register('Falling-v0', 'falling:Falling')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="fell off the table"):
        run("train", "falling:Falling-v0", *SHORT, "--run-dir", "r")
    assert Path("r/checkpoint.safetensors").exists()


def test_a_mistake_of_our_own_shows_its_traceback(run, monkeypatch):
    monkeypatch.setattr("ppo_fast.control.recipes.recipe", lambda env_id: None + 1)
    with pytest.raises(TypeError):
        run("train", "CartPole-v1")


@pytest.mark.parametrize(
    ("package", "arguments", "feature"),
    [
        ("tyro", ["train", "CartPole-v1"], "the ppo-fast command"),
        ("tyro", ["eval", "."], "the ppo-fast command"),
        ("safetensors", ["train", "CartPole-v1", *SHORT], "a checkpoint"),
        ("tensorboard", ["train", "CartPole-v1", *SHORT], "RunLogger"),
        ("matplotlib", ["plot", "{run}"], "plotting"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    run, trained, monkeypatch, package, arguments, feature
):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(*[str(trained / "1") if a == "{run}" else a for a in arguments])
    assert code == 1
    assert_one_line(err, feature, f"needs {package}", "pip install 'ppo-fast[train]'")


# eval and plot.


def test_eval_plays_episodes_of_a_folder_or_a_file(run, trained):
    code, out, _ = run("eval", trained / "1", "--episodes", "3")
    assert code == 0
    assert " over 3 episodes, mean length " in out
    assert run("eval", trained / "1" / "checkpoint.safetensors", "--episodes", "3")[1] == out
    assert run("eval", trained / "1", "--episodes", "3", "--no-deterministic")[0] == 0


def test_eval_says_what_it_cannot_evaluate(run, trained):
    code, _, err = run("eval", "nowhere")
    assert code == 1
    assert_one_line(err, "nowhere: there is no such file; expected a checkpoint")
    code, _, err = run("eval", trained)
    assert_one_line(err, "is a folder, expected a checkpoint file")
    code, _, err = run("eval", trained / "1", "--episodes", "0")
    assert_one_line(err, "episodes = 0; expected at least 1")


def test_a_video_needs_moviepy_and_says_so_before_it_plays(run, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    code, out, err = run("eval", trained / "1", "--video")
    assert (code, out) == (1, "")
    assert_one_line(err, "eval --video needs moviepy", "ppo-fast[video]")


def test_a_video_is_recorded(run, trained):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    code, out, _ = run("eval", trained / "1", "--episodes", "1", "--video")
    assert code == 0
    assert Path(out.partition("video: ")[2].strip()).stat().st_size > 1000


def test_plot_draws_several_runs_into_one_picture(run, trained):
    code, out, _ = run("plot", trained / "1", trained / "2")
    assert (code, out) == (0, "learning_curves.png\n")
    assert is_picture(Path("learning_curves.png"))
    assert run("plot", trained / "1", "--out", "new/one.svg")[:2] == (0, "new/one.svg\n")
    assert Path("new/one.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("runs", "text"), [([], "at least one run folder"), (["nowhere"], "nowhere/metrics.csv")]
)
def test_plot_says_what_it_cannot_draw(run, runs, text):
    code, _, err = run("plot", *runs)
    assert code == 1
    assert_one_line(err, text)


# doctor.


def test_doctor_finds_every_op_well(run):
    code, out, _ = run("doctor")
    assert code == 0, out
    lines = {words[0]: words for words in map(str.split, out.splitlines()) if words}
    assert set(ops()) == set(functional.__all__)
    for name in ops():
        assert lines[name][1:3] == ["reference", "ok"]
    for package in ("python", "torch", "gymnasium"):
        assert package in lines
    assert out.endswith("all is well\n")


def changed(result, change):
    """The same kind of result with every floating-point tensor in it changed."""
    if isinstance(result, torch.Tensor):
        return change(result) if result.is_floating_point() else result
    parts = [changed(part, change) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)


@pytest.mark.parametrize("name", sorted(functional.__all__))
def test_doctor_catches_an_op_that_is_wrong(monkeypatch, name):
    op = getattr(functional, name)
    # What is no op of its own is replaced itself.
    owner, attribute = (op, "reference") if isinstance(op, Accelerated) else (functional, name)
    right = getattr(owner, attribute)
    for change in (lambda x: x * 1.01 + 0.001, lambda x: x * float("nan")):
        monkeypatch.setattr(owner, attribute, lambda *a, **k: changed(right(*a, **k), change))  # noqa: B023
        text, well = report()
        assert not well
        wrong = [line.split()[0] for line in text.splitlines() if "WRONG" in line]
        assert wrong == [name]
        assert text.endswith("something is wrong: see the lines marked above")


def test_doctor_reports_an_op_that_raises(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such luck\nand a second line")

    monkeypatch.setattr(functional.gae, "reference", broken)
    code, out, _ = run("doctor")
    assert code == 1
    assert "FAILED RuntimeError: no such luck (" in out


def test_doctor_refuses_a_backend_that_is_none(run, monkeypatch):
    monkeypatch.setenv("PPO_FAST_BACKEND", "cuda")
    code, _, err = run("doctor")
    assert code == 1
    assert_one_line(err, "PPO_FAST_BACKEND is 'cuda'; expected one of auto")
