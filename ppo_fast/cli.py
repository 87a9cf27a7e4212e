"""The `ppo-fast` command: train, eval, plot, doctor, profile, bench report, rlhf."""

from __future__ import annotations

import dataclasses
import dis
import importlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gymnasium.error import DependencyNotInstalled

from ppo_fast.config import ControlConfig
from ppo_fast.extras import require
from ppo_fast.profiling import captured_iterations, phase_table, stage_seconds

if TYPE_CHECKING:
    from ppo_fast.control.ppo import PPO

USAGE = """ppo-fast: PPO in PyTorch whose hot paths are Triton kernels

  ppo-fast train ENV_ID [--flags]     train; `ppo-fast train ENV_ID --help` lists the flags
  ppo-fast train --resume RUN         continue an interrupted run
  ppo-fast eval RUN [--episodes N] [--video]
  ppo-fast plot RUN... [--out FILE]   learning curves; seeds of one environment are banded
  ppo-fast rlhf COMMAND               PPO for language models; `ppo-fast rlhf` lists its commands
  ppo-fast doctor                     versions, devices, backends, and a self-check of every op
  ppo-fast profile -- train ENV_ID    any command under Nsight or torch.profiler; `ppo-fast profile --help`
  ppo-fast bench report               in a checkout: speed tables and pictures from benchmarks/results
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(ControlConfig):
    """Train PPO on a Gymnasium environment.

    Known ids start from a recipe, whose values are the defaults shown; any flag overrides. The run
    folder gets config.json, checkpoint.safetensors, metrics.csv, TensorBoard events and
    learning_curve.png.
    """

    total_timesteps: int = 100_000
    """environment steps to train for"""
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    """whiten advantages over each minibatch, once over the whole rollout, or not at all"""
    run_dir: str | None = None
    """folder to write the run to; None makes runs/ENV_ID/TIME-seedSEED"""
    progress_bar: bool = True
    """show a progress bar"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, 1 (an error the message explains), 2 (usage), 127 (a profiler is missing), 130
    (Ctrl-C) or 143 (SIGTERM).
    """
    arguments = sys.argv[1:] if argv is None else argv
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}\n\n{USAGE}", 2)
    try:
        with _log_shown():
            commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, DependencyNotInstalled) or _is_ours(error):
            _fail(str(error), 1)
        raise


def _commands() -> dict[str, Callable[[list[str]], None]]:
    return {
        "train": _train,
        "eval": _eval,
        "plot": _plot,
        "doctor": _doctor,
        "profile": _profile,
        "bench": _bench,
        "rlhf": _rlhf,
    }


@contextmanager
def _log_shown() -> Iterator[None]:
    """Show this package's log, and only this, on stderr."""
    log, handler = logging.getLogger("ppo_fast"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _is_ours(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error.

    Those are sentences for the user. What an environment raised, and what is our own mistake, needs
    its traceback.
    """
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    package = str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    operation = last.tb_frame.f_code.co_code[last.tb_lasti]
    return package == "ppo_fast" and dis.opname[operation] == "RAISE_VARARGS"


def _fail(message: str, status: int) -> None:
    print(f"ppo-fast: {message}", file=sys.stderr)
    sys.exit(status)


def _train(arguments: list[str]) -> None:
    from ppo_fast.control.ppo import PPO
    from ppo_fast.control.recipes import RECIPES, recipe

    if arguments and arguments[0].partition("=")[0] == "--resume":
        _, given, run = arguments[0].partition("=")
        _resume(([run] if given else []) + arguments[1:])
        return
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        _fail(f"train needs an environment id first\n\n{USAGE}", 2)
    tyro = require("tyro", "train", "the ppo-fast command")
    asks_help = arguments[0].startswith("-")
    env_id, flags = ("ENV_ID", arguments) if asks_help else (arguments[0], arguments[1:])
    start = TrainFlags(**{**dataclasses.asdict(recipe(env_id)), "progress_bar": True})
    choice = tyro.cli(TrainFlags, args=flags, default=start, prog=f"ppo-fast train {env_id}")
    if env_id in RECIPES:
        print(f"recipe of {env_id}; flags override it")
    settings = dataclasses.asdict(choice)
    total = settings.pop("total_timesteps")
    if settings["run_dir"] is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        settings["run_dir"] = str(
            Path("runs") / env_id.replace("/", "-") / f"{stamp}-seed{choice.seed}"
        )
    model = PPO(env_id, **settings)
    _run(model, lambda mark: model.learn(total, mark))


def _resume(arguments: list[str]) -> None:
    from ppo_fast.control.ppo import PPO

    if len(arguments) != 1 or arguments[0].startswith("-"):
        _fail("train --resume takes one run folder and no other flag", 2)
    model = PPO.load(arguments[0], run_dir=arguments[0])
    print(f"resuming {arguments[0]} at {model.num_timesteps} steps")
    _run(model, model.resume)


def _run(model: PPO, learn: Callable[[Callable[[PPO], None]], object]) -> None:
    # Rates leave out imports and drawing, which would dominate short runs.
    marks: list[tuple[float, int]] = []
    stages: dict[str, float] = defaultdict(float)

    def add(seconds: dict[str, float]) -> None:
        for stage, spent in seconds.items():
            stages[stage] += spent

    def iterated(model: PPO) -> None:
        marks.append((time.perf_counter(), model.num_timesteps))
        add(stage_seconds(model.metrics))
        iteration_ended()

    before, started = model.num_timesteps, time.perf_counter()
    try:
        with captured_iterations() as iteration_ended:
            learn(iterated)
    finally:
        # Worker processes that are gone cannot be told to go; why they went is the news.
        with suppress(OSError, EOFError):
            model.close()
    seconds = time.perf_counter() - started
    add(model.timer.take())  # what came after the last iteration's metrics
    in_stages = sum(spent for stage, spent in stages.items() if "/" not in stage)
    stages["other"] = max(0.0, seconds - in_stages)
    (first, steps), (last, end) = marks[0], marks[-1]
    rate = f", {(end - steps) / (last - first):,.0f} a second while training" if end > steps else ""
    print(f"{end - before:,} steps in {seconds:.1f} s{rate}")
    print(phase_table(stages))
    window = len(model.episodes.returns)
    reached = f"{model.metrics['rollout/ep_rew_mean']:.1f}" if window else "none finished"
    print(f"mean return of the last {window} episodes: {reached}")
    folder = Path(str(model.config.run_dir))
    print(f"run folder {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")
    if model.config.stop_return is not None and not model.reached_stop_return():
        _fail(
            f"stop_return = {model.config.stop_return:g} was not reached by the mean return of "
            f"{model.config.stats_window} episodes in {model.num_timesteps:,} steps",
            1,
        )


def _rlhf(arguments: list[str]) -> None:
    from ppo_fast.llm.commands import rlhf

    rlhf(arguments)


def _eval(arguments: list[str]) -> None:
    _call(evaluate_run, arguments, "ppo-fast eval")


def _plot(arguments: list[str]) -> None:
    _call(plot_runs, arguments, "ppo-fast plot")


def _call(function: Callable[..., None], arguments: list[str], prog: str) -> None:
    tyro = require("tyro", "train", "the ppo-fast command")
    tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))


def evaluate_run(
    run: Path,
    episodes: int = 10,
    deterministic: bool = True,
    seed: int = 10_000,
    video: bool = False,
) -> None:
    """Play whole episodes with the policy of a run folder or checkpoint.

    Args:
        run: run folder or checkpoint file
        episodes: how many episodes
        deterministic: most likely actions, or samples
        seed: of the environments
        video: also record an episode as an MP4 beside the run (needs the extra `video`)
    """
    from ppo_fast.control.evaluate import evaluate, record_video
    from ppo_fast.control.ppo import PPO

    if video:
        require("moviepy", "video", "eval --video")
    model = PPO.load(run)
    print(evaluate(model, episodes=episodes, deterministic=deterministic, seed=seed))
    if video:
        folder = run if run.is_dir() else run.parent
        print(f"video: {record_video(model, folder / 'videos', seed=seed)}")


def plot_runs(runs: tuple[Path, ...], out: Path = Path("learning_curves.png")) -> None:
    """Draw the learning curves of one or several runs.

    Args:
        runs: run folders
        out: picture to write; its ending (.png, .svg, .pdf) chooses the format
    """
    from ppo_fast.plots import plot_learning_curves

    if not runs:
        raise ValueError("plot needs at least one run folder")
    print(plot_learning_curves(runs, out))


def _doctor(arguments: list[str]) -> None:
    from ppo_fast.doctor import report

    if arguments:
        _fail("doctor takes no arguments", 2)
    text, well = report()
    print(text)
    sys.exit(0 if well else 1)


def _profile(arguments: list[str]) -> None:
    from ppo_fast.profile_command import ProfileFlags, profile

    tyro = require("tyro", "train", "the ppo-fast command")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = tyro.cli(ProfileFlags, args=arguments[:end], prog="ppo-fast profile")
    command = arguments[end + 1 :]
    runnable = {name: run for name, run in _commands().items() if name != "profile"}
    if not command or command[0] not in runnable:
        _fail(
            f"profile needs one of {', '.join(runnable)} after --, as in ppo-fast profile -- train "
            f"CartPole-v1; got {' '.join(command) or 'nothing'}",
            2,
        )
    profile(flags, command, lambda: runnable[command[0]](command[1:]))


def _bench(arguments: list[str]) -> None:
    if arguments != ["report"]:
        _fail("bench takes one word: report", 2)
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "report.py").exists():
        _fail(f"bench report works in a checkout of the repository; there is no {folder}", 1)
    sys.path.insert(0, str(folder))
    importlib.import_module("report").main()
