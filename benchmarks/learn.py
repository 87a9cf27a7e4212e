"""Train the recipes over seeds and write the table of what they learn: `python learn.py`.

One process per core, each on one torch thread, trains one seed after another. Each row is on disk
as soon as its run is over; called again, only rows are trained that are missing for the same code,
recipe and machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch

import ppo_fast
from ppo_fast import PPO
from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.control.evaluate import evaluate
from ppo_fast.control.recipes import recipe
from ppo_fast.logger import RunLogger
from ppo_fast.plots import plot_learning_curves

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- learn:begin -->", "<!-- learn:end -->"
EPISODES = 20
CURVE_POINTS = 200

Row = dict[str, Any]


class Target(NamedTuple):
    timesteps: int
    seeds: int
    gate: float | None
    """what the mean return must reach"""
    while_training: bool = False
    """whether the last 100 training episodes must reach the gate at some time, as CartPole-v1's
    definition of solved has it, or the evaluated final policy"""


TARGETS = {
    "CartPole-v1": Target(100_000, 5, 475.0, while_training=True),
    "Acrobot-v1": Target(200_000, 5, -100.0),
    "Pendulum-v1": Target(100_000, 5, -300.0),
    "LunarLander-v3": Target(1_000_000, 3, 200.0),
    "HalfCheetah-v5": Target(1_000_000, 3, None),
}


class Job(NamedTuple):
    env_id: str
    seed: int
    timesteps: int
    code: str


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("env", "seed", "timesteps", "code", "config"))


def code_version() -> str:
    """Hash the library's source: a commit would not see uncommitted changes."""
    digest = hashlib.sha256()
    package = Path(ppo_fast.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def settings(env_id: str, seed: int) -> dict[str, Any]:
    """Return the recipe as JSON has it."""
    config = dataclasses.replace(recipe(env_id), seed=seed)
    return json.loads(json.dumps(dataclasses.asdict(config)))


def train(job: Job) -> Row:
    """Train and evaluate one seed."""
    torch.set_num_threads(1)
    target = TARGETS[job.env_id]
    model = PPO(job.env_id, config=dataclasses.replace(recipe(job.env_id), seed=job.seed))
    curve: list[tuple[int, float, float]] = []
    solved: list[tuple[int, float]] = []
    start = time.perf_counter()

    def watch(model: PPO) -> None:
        if "rollout/ep_rew_mean" not in model.metrics:
            return
        seconds, mean = time.perf_counter() - start, model.metrics["rollout/ep_rew_mean"]
        curve.append((model.num_timesteps, round(seconds, 2), round(mean, 2)))
        full = len(model.episodes.returns) == model.config.stats_window
        if not solved and full and target.gate is not None and mean >= target.gate:
            solved.append((model.num_timesteps, seconds))

    model.learn(job.timesteps, watch)
    seconds = time.perf_counter() - start
    evaluation = evaluate(model, episodes=EPISODES)
    model.close()
    evaluated = float(evaluation.returns.mean())
    passed = None
    if target.gate is not None:
        passed = bool(solved) if target.while_training else evaluated >= target.gate
    every = -(-len(curve) // CURVE_POINTS) or 1
    return {
        "env": job.env_id,
        "seed": job.seed,
        "timesteps": job.timesteps,
        "steps": model.num_timesteps,
        "seconds": seconds,
        "sps": model.num_timesteps / seconds,
        "train_return": model.metrics.get("rollout/ep_rew_mean"),
        "eval_return": evaluated,
        "eval_std": float(evaluation.returns.std(ddof=1)),
        "gate": target.gate,
        "passed": passed,
        "gate_steps": solved[0][0] if solved else None,
        "gate_seconds": solved[0][1] if solved else None,
        "code": job.code,
        "config": settings(job.env_id, job.seed),
        "curve": curve[::-every][::-1],
    }


class Results:
    """The results file: what it held for the same code and machine, and what is added."""

    def __init__(self, code: str) -> None:
        self.code = code
        cpu = harness.machine_record()["cpu"]
        files = sorted(harness.RESULTS.glob("learn-*.json"), key=lambda file: file.stat().st_mtime)
        records = {file: json.loads(file.read_text(encoding="utf-8")) for file in files}
        for file, record in reversed(records.items()):
            same_code = any(row["code"] == code for row in record["rows"])
            if same_code and record["machine"]["cpu"] == cpu:
                self.path, self.record = file, record
                return
        self.path = harness.write_results("learn", [])
        self.record = json.loads(self.path.read_text(encoding="utf-8"))
        if self.path in records:
            # The same commit with other uncommitted changes: its rows stay until they are replaced.
            self.record["rows"] = records[self.path]["rows"]

    def matching(self, targets: dict[str, Target]) -> list[Row]:
        """Rows of these environments and lengths, by today's recipe and code."""
        return [
            row
            for row in self.rows
            if row["code"] == self.code
            and row["env"] in targets
            and row["timesteps"] == targets[row["env"]].timesteps
            and row["config"] == settings(row["env"], row["seed"])
        ]

    @property
    def rows(self) -> list[Row]:
        return self.record["rows"]

    def add(self, row: Row) -> None:
        """Write the row, which replaces one of the same run, before another run can fail."""
        kept = [old for old in self.rows if identity(old) != identity(row)]
        self.record["rows"] = sorted([*kept, row], key=lambda r: (order(r["env"]), r["seed"]))
        # A line a row: the curves would take a line a number.
        head = json.dumps({**self.record, "rows": []}, indent=1).removesuffix("[]\n}")
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        atomic_write_text(self.path, f"{head}[\n{rows}\n ]\n}}\n")


def shown_rows(targets: dict[str, Target], results: Results) -> list[Row]:
    """Of every run by today's recipe on this machine, the row of these results, or else the newest."""
    machine = results.record["machine"]
    found: dict[tuple[str, int], Row] = {}
    files = sorted(harness.RESULTS.glob("learn-*.json"), key=lambda file: file.stat().st_mtime)
    for file in [*(f for f in files if f != results.path), results.path]:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["machine"]["cpu"] != machine["cpu"]:
            continue
        for row in record["rows"]:
            target = targets.get(row["env"])
            if target is None or row["timesteps"] != target.timesteps:
                continue
            if row["config"] == settings(row["env"], row["seed"]):
                found[row["env"], row["seed"]] = {**row, "commit": record["machine"]["commit"]}
    return sorted(found.values(), key=lambda row: (order(row["env"]), row["seed"]))


def order(env_id: str) -> int:
    return list(TARGETS).index(env_id)


def _stand_apart() -> None:
    """Leave the terminal's process group: Ctrl-C is for the parent, which ends the workers."""
    os.setpgrp()


def run_jobs(jobs: Sequence[Job], workers: int, done: Callable[[Row], None]) -> list[str]:
    """Train the jobs in parallel; return what failed, in words."""
    failures: list[str] = []
    # Inherited by the workers: OpenMP reads it once, before torch can be told.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    apart = _stand_apart if hasattr(os, "setpgrp") else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=apart) as pool:
        try:
            futures = {pool.submit(train, job): job for job in jobs}
            for future in as_completed(futures):
                try:
                    done(future.result())
                except Exception as error:
                    job = futures[future]
                    failures.append(f"{job.env_id} seed {job.seed}: {error}")
                    print(failures[-1], file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            # A worker asked kindly would first save a checkpoint nobody wants.
            for child in multiprocessing.active_children():
                child.kill()
            pool.shutdown(cancel_futures=True)
            sys.exit("\ninterrupted; finished runs are kept, and the same command goes on")
    return failures


def _spread(rows: Sequence[Row], key: str, form: str) -> str:
    """Median and range of a column, or of the seeds that have it."""
    values = sorted(row[key] for row in rows if row[key] is not None)
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({values[0]:{form}} to {values[-1]:{form}})"


def table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Return one line an environment, in Markdown."""
    lines = [
        "| environment | steps | gate | passed | return, evaluated | return, last 100 in training "
        "| steps to gate | seconds to gate | seconds | steps/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for env_id, target in TARGETS.items():
        mine = [row for row in rows if row["env"] == env_id]
        if not mine:
            continue
        passed = sum(bool(row["passed"]) for row in mine)
        cells = [
            env_id,
            f"{statistics.median(row['timesteps'] for row in mine):,.0f}",
            "-" if target.gate is None else f"{target.gate:g}",
            f"{len(mine)} seeds" if target.gate is None else f"{passed} of {len(mine)} seeds",
            _spread(mine, "eval_return", ".0f"),
            _spread(mine, "train_return", ".0f"),
            _spread(mine, "gate_steps", ",.0f"),
            _spread(mine, "gate_seconds", ".1f"),
            _spread(mine, "seconds", ".0f"),
            _spread(mine, "sps", ",.0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    cpu = f"{machine['cpu']}, {machine['cpu_count']} cores, one thread a run"
    commits = " and ".join(sorted({row["commit"] for row in rows}))
    lines += [
        "",
        f"Median (lowest to highest) over seeds; {cpu}; {machine['date']}, commit {commits}. "
        f"Evaluated: the final policy, deterministic, {EPISODES} episodes a seed; "
        "the gate is for that return, but for CartPole-v1, which passes once the last 100 training "
        "episodes reach it. Steps and seconds to gate: when those episodes first did.",
    ]
    return "\n".join(lines)


def write_table(text: str, readme: Path) -> bool:
    """Put the text between the markers; False where there are none."""
    if not readme.exists():
        return False
    page = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        return False
    atomic_write_text(readme, pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page, count=1))
    return True


def draw(rows: Sequence[Row], out: Path) -> None:
    """Draw the stored curves, by way of run folders, which is what the plot reads."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for row in rows:
            if not row["curve"]:
                continue
            folder = Path(scratch) / f"{row['env'].replace('/', '-')}-{row['seed']}"
            with RunLogger(folder, tensorboard=False) as logger:
                for step, _, mean in row["curve"]:
                    logger.log(step, {"rollout/ep_rew_mean": mean})
            config = {"env_id": row["env"], "stop_return": row["gate"]}
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            folders.append(folder)
        if folders:
            plot_learning_curves(folders, out, ylabel="mean return, last 100 episodes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", action="append", choices=list(TARGETS), help="may be repeated")
    parser.add_argument("--seeds", type=int, help="1 to this many, for every environment")
    parser.add_argument("--timesteps", type=int, help="environment steps of a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--fresh", action="store_true", help="train again what is there already")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(argv)

    code = code_version()
    results = Results(code)
    chosen = {
        env_id: TARGETS[env_id]._replace(
            timesteps=arguments.timesteps or TARGETS[env_id].timesteps,
            seeds=arguments.seeds or TARGETS[env_id].seeds,
        )
        for env_id in arguments.env or TARGETS
    }
    present = [] if arguments.fresh else results.matching(chosen)
    have = {(row["env"], row["seed"]) for row in present}
    runs = [(env_id, 1 + seed) for env_id in chosen for seed in range(chosen[env_id].seeds)]
    jobs = [Job(*run, chosen[run[0]].timesteps, code) for run in runs if run not in have]
    if len(jobs) < len(runs):
        print(f"{len(runs) - len(jobs)} of {len(runs)} runs are in {results.path} already")

    started = time.perf_counter()
    finished = 0

    def done(row: Row) -> None:
        nonlocal finished
        finished += 1
        results.add(row)
        verdict = {True: "passed", False: "MISSED", None: "no gate"}[row["passed"]]
        print(
            f"[{finished}/{len(jobs)}, {time.perf_counter() - started:.0f} s] {row['env']} seed "
            f"{row['seed']}: return {row['eval_return']:.1f} evaluated, {row['train_return'] or 0:.1f} "
            f"in training, {row['seconds']:.1f} s, {row['sps']:,.0f} steps/s, {verdict}",
            flush=True,
        )

    failures = run_jobs(jobs, min(arguments.jobs, len(jobs)), done) if jobs else []
    # The table keeps the environments that were not asked for.
    rows = shown_rows({**TARGETS, **chosen}, results)
    picture = results.path.with_suffix(".png")
    draw(rows, picture)
    text = table(rows, results.record["machine"])
    print(f"\n{text}\n\nwrote {results.path} and {picture.name}")
    shown = os.path.relpath(picture, arguments.readme.parent)
    text += f"\n\n![Learning curves: median and range over seeds]({shown})"
    if arguments.timesteps:
        print(f"{arguments.readme.name} is left alone: --timesteps is not the recipes' length")
    elif not write_table(text, arguments.readme):
        print(f"{arguments.readme} has no {BEGIN} ... {END}; the table is only here")
    if failures:
        sys.exit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
