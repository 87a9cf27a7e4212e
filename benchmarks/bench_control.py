"""Training speed on environments, against the field: `python bench_control.py --case all --json`.

Every arm of every round is a training in a process of its own, pinned to one processor, with one
torch or XLA thread; arms take turns, their order rotated, and round i has seed i for all. Figures:

- steps a second, after the first iteration, in which compilers and allocators still work;
- the same with compile time and the first iteration counted, and seconds from the start of the process;
- how many times as fast ours is, round by round, in wall-clock and in processor time, of which the
  second suffers less from what else the machine does;
- the mean return of the last 100 training episodes, and when it reached the case's threshold.

The case `solved` (or `--until-solved`) has each arm train CartPole-v1 by its own best recipe until it
is solved, on all processors, and counts from the start of the process. `update` times the update phase
alone. `ablations` has ours with one thing off. An arm whose packages are missing is absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import control_arm
from control_cases import ARMS, CASES, OURS, WINDOW, Arm, Case, absent
from harness import Timing, print_table, write_results

import ppo_fast
from ppo_fast.plots import COLORS, STYLE

HERE = Path(__file__).resolve().parent
TIMEOUT = 600.0
SOLVE_LIMIT = 120.0
"""Seconds after which an arm that has not solved its task is given up."""
MARKS = 200
"""Points kept of a learning curve."""

Seen = dict[str, Any]
"""What `control_arm.run` returned."""


def processors(arm: Arm, solve: bool) -> list[int] | None:
    """The processors an arm may use; None where it may use all, or cannot be pinned."""
    if solve or not hasattr(os, "sched_getaffinity"):
        return None
    # Interrupts tend to go to the first.
    return sorted(os.sched_getaffinity(0))[-arm.cores :]


def environment(arm: Arm, solve: bool) -> dict[str, str]:
    threads = str(arm.cores)
    source = str(Path(ppo_fast.__file__).parent.parent)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if not solve:
        # XLA sizes its pools by NPROC.
        env["NPROC"] = threads
        flags = os.environ.get("XLA_FLAGS", "")
        env["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return env


def launch(arm: Arm, job: dict[str, Any], solve: bool) -> Seen | str:
    """Run a training in a new process; return what it saw, or in words how it failed."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "control_arm.py"), json.dumps(job)],
        env=environment(arm, solve),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        # With its own children, if it has some.
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took longer than {TIMEOUT:.0f} s"
        raise
    lines = [line for line in out.splitlines() if line.startswith(control_arm.MARK)]
    if process.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(control_arm.MARK))
    last = err.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    return last[0]


def job_of(case: Case, key: str, seed: int) -> dict[str, Any]:
    arm = ARMS[key]
    config, timesteps = case.recipe(key)
    config = dataclasses.replace(config, seed=seed)
    return {
        "started": time.monotonic(),
        "module": arm.module,
        "options": arm.options or {},
        "env_id": case.env_id,
        "config": dataclasses.asdict(config),
        "timesteps": max(1, int(arm.share * timesteps)),
        "solved": case.threshold if case.solve else None,
        "window": WINDOW,
        "limit": SOLVE_LIMIT if case.solve else None,
        "processors": processors(arm, case.solve),
    }


def measure(
    case: Case, keys: Sequence[str], rounds: int
) -> tuple[dict[str, list[Seen]], dict[str, str]]:
    """Run the arms in turns; return what each round saw, and why arms are missing."""
    missing = {}
    for key in keys:
        if (package := absent(ARMS[key])) is not None:
            missing[key] = f"absent: no package {package}"
            print(f"{ARMS[key].name}: {missing[key]}", flush=True)
    order = [key for key in keys if key not in missing]
    found: dict[str, list[Seen]] = {key: [] for key in order}
    for number in range(rounds):
        shift = number % max(1, len(order))
        for key in order[shift:] + order[:shift]:
            if key in missing:
                continue
            seen = launch(ARMS[key], job_of(case, key, number + 1), case.solve)
            head = f"round {number + 1} of {rounds}: {ARMS[key].name:27}"
            if isinstance(seen, str):
                missing[key] = f"failed: {seen}"
                print(f"{head} {missing[key]}", flush=True)
                continue
            found[key].append(seen)
            print(
                f"{head} {1 / step_seconds(seen):9,.0f} steps/s, {seen['total_seconds']:5.1f} s",
                flush=True,
            )
    return {key: seen for key, seen in found.items() if key not in missing}, missing


def step_seconds(seen: Seen, clock: int = 0) -> float:
    """Seconds a step after the first iteration; clock 1 is processor time.

    Of a training of one iteration it is the whole.
    """
    marks = seen["marks"]
    if len(marks) < 2:
        return seen["train_cpu_seconds" if clock else "train_seconds"] / seen["steps"]
    first, last = marks[0], marks[-1]
    return (last[clock] - first[clock]) / (last[2] - first[2])


def reached(seen: Seen, threshold: float | None) -> Sequence[float] | None:
    """The first mark whose mean over `WINDOW` episodes is at the threshold."""
    if threshold is None:
        return None
    for mark in seen["marks"]:
        if mark[3] is not None and mark[4] >= WINDOW and mark[3] >= threshold:
            return mark
    return None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def summarise(name: str, case: Case, found: dict[str, list[Seen]]) -> list[dict[str, Any]]:
    """One row an arm; `ours_times` says how many times as fast as the arm ours is."""
    rows = []
    ours = found.get(case.arms[0])
    for key, rounds in found.items():
        mine = Timing(tuple(step_seconds(seen) for seen in rounds), rounds[0]["steps"])
        counted = [
            seen["steps"] / (seen["train_seconds"] + seen["compile_seconds"]) for seen in rounds
        ]
        returns = [statistics.fmean(seen["returns"]) for seen in rounds if seen["returns"]]
        hits = [mark for seen in rounds if (mark := reached(seen, case.threshold)) is not None]
        row: dict[str, Any] = {
            "case": name,
            "arm": ARMS[key].name,
            "steps": rounds[0]["steps"],
            "sps_median": 1 / mine.median,
            "sps_min": 1 / mine.max,
            "sps_max": 1 / mine.min,
            "sps": [1 / sample for sample in mine.samples],
            "sps_compile_counted": statistics.median(counted),
            "total_seconds": statistics.median(seen["total_seconds"] for seen in rounds),
            "total_seconds_by_round": [seen["total_seconds"] for seen in rounds],
        }
        for field in ("start", "import", "build", "compile"):
            column = f"{field}_seconds"
            row[column] = statistics.median(seen[column] for seen in rounds)
        row["peak_mb"] = _median([seen["peak_mb"] for seen in rounds if seen["peak_mb"]])
        row["return_median"] = _median(returns)
        row["returns"] = returns
        row["threshold"] = case.threshold
        row["threshold_reached"] = len(hits)
        row["threshold_seconds"] = _median([mark[0] for mark in hits])
        row["threshold_steps"] = _median([mark[2] for mark in hits])
        row["threshold_seconds_by_round"] = [mark[0] for mark in hits]
        if case.solve:
            row["solved_seconds_by_round"] = [
                seen["total_seconds"] for seen in rounds if reached(seen, case.threshold)
            ]
        if ours is not None:
            row |= ratios(case, ours, rounds)
        if rounds[0]["phases"]:
            row["phases"] = {
                phase: statistics.median(
                    seen["phases"][phase] / seen["train_seconds"] for seen in rounds
                )
                for phase in rounds[0]["phases"]
            }
        every = -(-len(rounds[0]["marks"]) // MARKS) or 1
        row["curves"] = [
            [[mark[0], mark[2], mark[3]] for mark in seen["marks"][::-every][::-1]]
            for seen in rounds
        ]
        rows.append(row)
    return rows


def ratios(case: Case, ours: Sequence[Seen], theirs: Sequence[Seen]) -> dict[str, Any]:
    """How many times as fast ours is, each round against the same round.

    Until solved: of the rounds that both solved, from process start to the end of training.
    """
    if case.solve:
        by_round = [
            b["total_seconds"] / a["total_seconds"]
            for a, b in zip(ours, theirs, strict=True)
            if reached(a, case.threshold) and reached(b, case.threshold)
        ]
        return {"ours_times": _median(by_round), "ours_times_by_round": by_round}
    by_clock = [
        [step_seconds(b, clock) / step_seconds(a, clock) for a, b in zip(ours, theirs, strict=True)]
        for clock in (0, 1)
    ]
    return {
        "ours_times": statistics.median(by_clock[0]),
        "ours_times_by_round": by_clock[0],
        "ours_times_cpu_time": statistics.median(by_clock[1]),
        "ours_times_cpu_time_by_round": by_clock[1],
    }


def print_rows(case: Case, rows: Sequence[dict[str, Any]], title: str) -> None:
    if case.solve:
        cells = [
            {
                "arm": row["arm"],
                "solved": f"{row['threshold_reached']} of {len(row['sps'])}",
                "seconds": _median(row["solved_seconds_by_round"]),
                "min": min(row["solved_seconds_by_round"], default=None),
                "max": max(row["solved_seconds_by_round"], default=None),
                "times ours": row.get("ours_times"),
                "steps": row["threshold_steps"],
                "steps/s": row["sps_median"],
                "import s": row["import_seconds"],
                "compile s": row["compile_seconds"],
                "MB": row["peak_mb"],
            }
            for row in rows
        ]
    else:
        cells = [
            {
                "arm": row["arm"],
                "steps/s": row["sps_median"],
                "min": row["sps_min"],
                "max": row["sps_max"],
                "ours is, times": row.get("ours_times"),
                "in CPU time": row.get("ours_times_cpu_time"),
                "compile counted": row["sps_compile_counted"],
                "return": row["return_median"],
                "min ": min(row["returns"], default=None),
                "max ": max(row["returns"], default=None),
                "steps": row["steps"],
                f"s to {case.threshold or '-'}": row["threshold_seconds"],
                "import s": row["import_seconds"],
                "compile s": row["compile_seconds"],
                "total s": row["total_seconds"],
                "MB": row["peak_mb"],
            }
            for row in rows
        ]
    print_table(cells, title)
    for row in rows:
        if "ours_times_by_round" in row and not row["arm"].startswith(OURS):
            by_round = ", ".join(f"{ratio:.2f}" for ratio in row["ours_times_by_round"])
            print(f"{OURS} / {row['arm']}, round by round: {by_round}")
        if "phases" in row and row["arm"].startswith(OURS):
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["phases"].items())
            print(f"{row['arm']} spends: {shares}")
    if (share := convolution_share(rows)) is not None:
        print(f"the convolutions alone take {share:.0%} of the time of {OURS}")


def convolution_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Time of the convolutions alone over ours, by the medians of processor-time ratios."""
    floor = [row for row in rows if row["arm"] == ARMS["convolutions"].name]
    return floor[0].get("ours_times_cpu_time") if floor else None


def draw(rows: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """Draw a bar an arm at its median, with a whisker from the slowest round to the fastest."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {**STYLE, "axes.grid": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 1.1 + 0.5 * len(rows)), layout="constrained")
        ax = figure.subplots()
        widest = max(row["sps_max"] for row in rows)
        for place, row in enumerate(rows):
            ours = row["arm"].startswith(OURS)
            ax.barh(place, row["sps_median"], height=0.6, color=COLORS[0] if ours else COLORS[5])
            ax.plot([row["sps_min"], row["sps_max"]], [place, place], color="#22303c", linewidth=1)
            text = f"{row['sps_median']:,.0f}"
            if row.get("ours_times") and not ours:
                text += f"  (ours is {row['ours_times']:.2f}x)"
            ax.text(row["sps_max"] + widest / 80, place, text, va="center")
        ax.set_yticks(range(len(rows)), [row["arm"] for row in rows], color="#22303c")
        ax.invert_yaxis()
        ax.set_xlim(0, 1.6 * widest)
        ax.set_xlabel("environment steps per second, median and range of rounds")
        ax.set_title(title)
        figure.savefig(out, dpi=160)


def draw_curves(rows: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """Draw return over seconds since the start of the process, a line a round."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        ax = figure.subplots()
        curved = [row for row in rows if any(len(curve) > 1 for curve in row["curves"])]
        for number, row in enumerate(curved):
            color = COLORS[number % len(COLORS)]
            for turn, curve in enumerate(row["curves"]):
                points = [(at, mean) for at, _, mean in curve if mean is not None]
                label = row["arm"] if turn == 0 else None
                ax.plot(*zip(*points, strict=True), color=color, linewidth=1, label=label)
        ax.axhline(rows[0]["threshold"], color="#22303c", linewidth=0.8, linestyle=":")
        ax.set(xlabel="seconds since the start of the process", ylabel="mean return, last 100")
        ax.set_xlim(0, None)
        ax.legend(frameon=False)
        ax.set_title(title)
        figure.savefig(out, dpi=160)


def title_of(case: Case) -> str:
    if case.solve:
        return f"{case.env_id} until {case.threshold:g}, each by its own recipe"
    c = case.config
    return f"{case.env_id}, {c.num_envs} x {c.num_steps} steps a rollout, 1 thread"


def on_device(case: Case, device: str) -> Case:
    own = {
        key: (dataclasses.replace(config, device=device), steps)
        for key, (config, steps) in (case.recipes or {}).items()
    }
    return case._replace(config=dataclasses.replace(case.config, device=device), recipes=own)


def run_case(name: str, case: Case, keys: Sequence[str], rounds: int, write: bool) -> None:
    found, missing = measure(case, keys, rounds)
    rows = summarise(name, case, found)
    title = title_of(case)
    if rows:
        print_rows(case, rows, title)
    if not write:
        return
    reasons = {ARMS[key].name: reason for key, reason in missing.items()}
    more: dict[str, Any] = {"title": title, "rounds": rounds, "missing": reasons}
    if (share := convolution_share(rows)) is not None:
        more["convolution_share"] = share
    # No hyphen: "control_cartpole-*" is to find one case alone.
    path = write_results(f"control_{name.replace('-', '_')}", rows, **more)
    print(f"\nwrote {path}")
    if rows:
        (draw_curves if case.solve else draw)(rows, title, path.with_suffix(".png"))


def run_update(rounds: int, write: bool) -> None:
    import torch
    from control_update import measure as measure_update

    torch.set_num_threads(1)
    # Its rounds are short.
    rows = measure_update(3 * rounds)
    print_table(rows, "update phase alone, a minibatch, 1 thread")
    if write:
        print(f"\nwrote {write_results('control_update', rows)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CASES, "update"]
    parser.add_argument("--case", nargs="+", choices=[*names, "all"], default=["cartpole"])
    parser.add_argument("--until-solved", action="store_true", help="the same as --case solved")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timesteps", type=int, help="environment steps of one training")
    parser.add_argument("--envs", type=int, help="environments; minibatches grow with them")
    parser.add_argument("--device", default="cpu", help="of ours and of rsl_rl")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), help="arms to run")
    parser.add_argument("--json", action="store_true", help="write JSON and PNG under results/")
    arguments = parser.parse_args(argv)
    chosen = ["solved"] if arguments.until_solved else arguments.case
    for name in names if "all" in chosen else chosen:
        started = time.perf_counter()
        print(f"\n== {name}", flush=True)
        if name == "update":
            run_update(arguments.rounds, arguments.json)
        else:
            case = CASES[name]
            if arguments.envs:
                config = dataclasses.replace(case.config, num_envs=arguments.envs)
                case = case._replace(config=config)
            if arguments.timesteps:
                own = {
                    key: (c, arguments.timesteps) for key, (c, _) in (case.recipes or {}).items()
                }
                case = case._replace(timesteps=arguments.timesteps, recipes=own)
            case = on_device(case, arguments.device)
            keys = [key for key in case.arms if not arguments.only or key in arguments.only]
            if not keys:
                parser.error(f"--case {name} has the arms {', '.join(case.arms)}")
            run_case(name, case, keys, arguments.rounds, arguments.json)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
