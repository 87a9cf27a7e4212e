"""The `ppo-fast` command: train, eval, plot, doctor."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ppo_fast.config import ControlConfig
from ppo_fast.extras import require

if TYPE_CHECKING:
    from ppo_fast.control.ppo import PPO

USAGE = """ppo-fast: PPO in PyTorch whose hot paths are Triton kernels

  ppo-fast train ENV_ID [--flags]     train; `ppo-fast train ENV_ID --help` lists the flags
  ppo-fast train --resume RUN         continue an interrupted run
  ppo-fast eval RUN [--episodes N] [--video]
  ppo-fast plot RUN... [--out FILE]   learning curves; seeds of one environment are banded
  ppo-fast doctor                     versions, devices, backends, and a self-check of every op
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(ControlConfig):
    """Flags of `ppo-fast train`: every field of ControlConfig, and how long to train."""

    total_timesteps: int = 100_000
    """environment steps to train for"""
    progress_bar: bool = True
    """show a progress bar"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (an error the message explains), 2 (usage) or 130."""
    arguments = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "eval": _eval,
        "plot": _plot,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}\n\n{USAGE}", 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        # Errors of our own are sentences; what an environment raised needs its traceback.
        if _is_ours(error):
            _fail(str(error), 1)
        raise


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    last = None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__", "")).startswith(
        "ppo_fast"
    )


def _fail(message: str, status: int) -> None:
    print(f"ppo-fast: {message}", file=sys.stderr)
    sys.exit(status)


def _train(arguments: list[str]) -> None:
    from ppo_fast.control.ppo import PPO
    from ppo_fast.control.recipes import RECIPES, recipe

    if arguments and arguments[0] == "--resume":
        _resume(arguments[1:])
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
    _run(model, lambda: model.learn(total))


def _resume(arguments: list[str]) -> None:
    from ppo_fast.control.ppo import PPO

    if len(arguments) != 1:
        _fail("train --resume takes one run folder and no other flag", 2)
    model = PPO.load(arguments[0], run_dir=arguments[0])
    print(f"resuming {arguments[0]} at {model.num_timesteps} steps")
    _run(model, model.resume)


def _run(model: PPO, learn: Callable[[], object]) -> None:
    before, started = model.num_timesteps, time.perf_counter()
    try:
        learn()
    finally:
        model.close()
    seconds = time.perf_counter() - started
    metrics = model.metrics
    steps = model.num_timesteps - before
    print(f"{steps} steps in {seconds:.1f} s ({steps / seconds:,.0f} a second)")
    if "rollout/ep_rew_mean" in metrics:
        window = len(model.episodes.returns)
        print(f"mean return of the last {window} episodes: {metrics['rollout/ep_rew_mean']:.1f}")
    stop = model.config.stop_return
    if stop is not None and metrics.get("rollout/ep_rew_mean", float("-inf")) < stop:
        _fail(f"the mean return did not reach stop_return = {stop}", 1)
    folder = Path(str(model.config.run_dir))
    print(f"run folder {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


def _eval(arguments: list[str]) -> None:
    tyro = require("tyro", "train", "the ppo-fast command")

    def evaluate_run(
        run: Annotated[Path, tyro.conf.Positional],
        episodes: int = 10,
        deterministic: bool = True,
        seed: int = 10_000,
        video: bool = False,
    ) -> None:
        """Play whole episodes with the policy of a run folder or checkpoint.

        Args:
            run: run folder or checkpoint file.
            episodes: how many episodes.
            deterministic: most likely actions, or samples.
            seed: of the environments.
            video: record the first episode as an MP4 beside the run (needs the extra `video`).
        """
        from ppo_fast.control.evaluate import evaluate, record_video
        from ppo_fast.control.ppo import PPO

        model = PPO.load(run)
        print(evaluate(model, episodes=episodes, deterministic=deterministic, seed=seed))
        if video:
            folder = run if run.is_dir() else run.parent
            print(f"video: {record_video(model, folder / 'videos', seed=seed)}")

    tyro.cli(evaluate_run, args=arguments, prog="ppo-fast eval")


def _plot(arguments: list[str]) -> None:
    tyro = require("tyro", "train", "the ppo-fast command")

    def plot_runs(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        out: Path = Path("learning_curves.png"),
    ) -> None:
        """Draw learning curves of one or several run folders.

        Args:
            runs: run folders.
            out: the PNG to write.
        """
        from ppo_fast.plots import plot_learning_curves

        if not runs:
            raise ValueError("plot needs at least one run folder")
        plot_learning_curves(list(runs), out)
        print(out)

    tyro.cli(plot_runs, args=arguments, prog="ppo-fast plot")


def _doctor(arguments: list[str]) -> None:
    from ppo_fast.doctor import report

    if arguments:
        _fail("doctor takes no arguments", 2)
    text, well = report()
    print(text)
    sys.exit(0 if well else 1)
