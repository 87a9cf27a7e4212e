"""Training speed on environments, against SB3 and a CleanRL-style loop: `python bench_control.py`.

Whole trainings of fixed length take turns in one process on one torch thread. Every round starts
from fresh models with a seed of its own; the ratio to SB3 is taken round by round, in wall-clock and
in processor time, of which the second suffers less from what else the machine does. Steps per
second are those of training; making the model and its environments is reported apart. The returns
show that every arm learns and none merely runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Timing, print_table, write_results
from peers import Build, Trained, Trainer

from ppo_fast import PPO
from ppo_fast.config import ControlConfig
from ppo_fast.plots import COLORS, STYLE

OURS, SYNC, SB3, CLEANRL = "ppo_fast", "ppo_fast, sync", "stable-baselines3", "CleanRL-style"
NAMES = {"ours": OURS, "sync": SYNC, "sb3": SB3, "cleanrl": CLEANRL}

# The top-level ones add up to the time of an iteration; a rollout's parts are named below it.
PHASES = ("inference", "environment", "storing", "gae", "update", "log")


class Case(NamedTuple):
    env_id: str
    config: ControlConfig
    timesteps: int
    arms: tuple[str, ...]


# CleanRL's ppo_continuous_action.py.
CONTINUOUS = ControlConfig(
    num_envs=1,
    num_steps=2048,
    num_minibatches=32,
    update_epochs=10,
    learning_rate=3e-4,
    ent_coef=0.0,
    norm_obs=True,
    norm_reward=True,
)

CASES = {
    # CleanRL's ppo.py, with 8 environments; ControlConfig's defaults are the rest of it.
    "cartpole": Case(
        "CartPole-v1", ControlConfig(num_envs=8), 51_200, ("ours", "sync", "sb3", "cleanrl")
    ),
    "pendulum": Case("Pendulum-v1", CONTINUOUS, 20_480, ("ours", "sb3")),
    "halfcheetah": Case("HalfCheetah-v5", CONTINUOUS, 20_480, ("ours", "sb3")),
}


def build_ours(env_id: str, config: ControlConfig) -> Trainer:
    model = PPO(env_id, config=config)

    def train(total_timesteps: int) -> Trained:
        phases: dict[str, float] = defaultdict(float)

        def add_up(model: PPO) -> None:
            for name in PHASES:
                # An iteration's log is reported by the next one.
                phases[name] += model.metrics.get(f"time/{name}_seconds", 0.0)

        model.learn(total_timesteps, add_up)
        model.close()
        return Trained(model.num_timesteps, list(model.episodes.returns), dict(phases))

    return train


def build_sync(env_id: str, config: ControlConfig) -> Trainer:
    """Step the environments one by one, as the peers do, instead of in their native vector form."""
    return build_ours(env_id, dataclasses.replace(config, vectorization="sync"))


def builder(arm: str) -> Build | None:
    """Return the arm's `build`, or None where its package is absent."""
    if arm in ("ours", "sync"):
        return build_ours if arm == "ours" else build_sync
    try:
        if arm == "sb3":
            from peers import sb3 as peer
        else:
            from peers import cleanrl_style as peer
    except ImportError:
        return None
    return peer.build


class Round(NamedTuple):
    build_seconds: float
    seconds: float
    cpu_seconds: float
    trained: Trained


def run_round(build: Build, case: Case, seed: int) -> Round:
    config = dataclasses.replace(case.config, seed=seed)
    gc.collect()
    start = time.perf_counter()
    train = build(case.env_id, config)
    built, cpu = time.perf_counter(), time.process_time()
    trained = train(case.timesteps)
    seconds, cpu_seconds = time.perf_counter() - built, time.process_time() - cpu
    return Round(built - start, seconds, cpu_seconds, trained)


def measure(case: Case, arms: dict[str, Build], rounds: int) -> dict[str, list[Round]]:
    for build in arms.values():
        run_round(build, case._replace(timesteps=1), seed=0)  # one rollout, to warm up
    found: dict[str, list[Round]] = {arm: [] for arm in arms}
    order = list(arms)
    for number in range(rounds):
        shift = number % len(order)
        for arm in order[shift:] + order[:shift]:
            done = run_round(arms[arm], case, seed=number + 1)
            found[arm].append(done)
            rate = done.trained.steps / done.seconds
            print(
                f"round {number + 1} of {rounds}: {NAMES[arm]:18} {rate:8.0f} steps/s", flush=True
            )
    return found


def timing(rounds: Sequence[Round], clock: str = "seconds") -> Timing:
    """Seconds, or `cpu_seconds`, per environment step."""
    samples = tuple(getattr(r, clock) / r.trained.steps for r in rounds)
    return Timing(samples, rounds[0].trained.steps)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def summarise(case: str, found: dict[str, list[Round]]) -> list[dict[str, Any]]:
    rows = []
    for arm, rounds in found.items():
        mine = timing(rounds)
        returns = [mean for r in rounds if (mean := _mean(r.trained.returns)) is not None]
        row: dict[str, Any] = {
            "case": case,
            "arm": NAMES[arm],
            "steps": rounds[0].trained.steps,
            "sps_median": 1 / mine.median,
            "sps_min": 1 / mine.max,
            "sps_max": 1 / mine.min,
        }
        if "sb3" in found:
            theirs = timing(found["sb3"])
            pairs = zip(theirs.samples, mine.samples, strict=True)
            row["times_sb3"] = mine.speedup_over(theirs)
            row["times_sb3_by_round"] = [sb3 / seconds for sb3, seconds in pairs]
            theirs, cpu = timing(found["sb3"], "cpu_seconds"), timing(rounds, "cpu_seconds")
            row["times_sb3_cpu_time"] = cpu.speedup_over(theirs)
        row["build_seconds"] = statistics.median(r.build_seconds for r in rounds)
        row["return_median"] = statistics.median(returns) if returns else None
        row["returns"] = returns
        row["sps"] = [1 / sample for sample in mine.samples]
        if rounds[0].trained.phases:
            row["phases"] = {
                name: statistics.median(r.trained.phases[name] / r.seconds for r in rounds)
                for name in PHASES
            }
        rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    print_table(
        [
            {
                "arm": row["arm"],
                "steps/s": row["sps_median"],
                "min": row["sps_min"],
                "max": row["sps_max"],
                "times SB3": row.get("times_sb3"),
                "in CPU time": row.get("times_sb3_cpu_time"),
                "return, last 100": row["return_median"],
                "build s": row["build_seconds"],
            }
            for row in rows
        ],
        title,
    )
    for row in rows:
        if "times_sb3_by_round" in row and row["arm"] == OURS:
            by_round = ", ".join(f"{ratio:.2f}" for ratio in row["times_sb3_by_round"])
            print(f"{OURS} / SB3, round by round: {by_round}")
        if "phases" in row:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["phases"].items())
            print(f"{row['arm']} spends: {shares}")


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
            if row.get("times_sb3") and row["arm"] != SB3:
                text += f"  ({row['times_sb3']:.2f}x SB3)"
            ax.text(row["sps_max"] + widest / 80, place, text, va="center")
        ax.set_yticks(range(len(rows)), [row["arm"] for row in rows], color="#22303c")
        ax.invert_yaxis()
        ax.set_xlim(0, 1.4 * widest)
        ax.set_xlabel("environment steps per second, median and range of rounds")
        ax.set_title(title)
        figure.savefig(out, dpi=160)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), default="cartpole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timesteps", type=int, help="environment steps of one training")
    parser.add_argument("--envs", type=int, help="environments; minibatches grow with them")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), help="arms to run")
    parser.add_argument("--json", action="store_true", help="write JSON and PNG under results/")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    case = CASES[arguments.case]
    if arguments.envs:
        config = dataclasses.replace(case.config, num_envs=arguments.envs)
        case = case._replace(config=config)
    case = case._replace(timesteps=arguments.timesteps or case.timesteps)
    builds: dict[str, Build] = {}
    for arm in case.arms:
        if arguments.only and arm not in arguments.only:
            continue
        build = builder(arm)
        if build is None:
            print(f"{NAMES[arm]}: absent")
        else:
            builds[arm] = build
    if not builds:
        parser.error(f"--case {arguments.case} has the arms {', '.join(case.arms)}")
    rows = summarise(arguments.case, measure(case, builds, arguments.rounds))
    c = case.config
    title = f"{case.env_id}, {c.num_envs} x {c.num_steps} steps a rollout, 1 thread"
    print_rows(rows, title)
    if arguments.json:
        path = write_results("control", rows)
        draw(rows, title, path.with_suffix(".png"))
        print(f"\nwrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
