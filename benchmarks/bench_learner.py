"""The learner step, and training on tensor environments: `python bench_learner.py --json`.

A learner step is one whole update: for every epoch a permutation, for every minibatch the loss, its
gradient, clipping and Adam. Its arms start from the same weights, work on the same synthetic rollout
and are timed in turns in one process; the gradient of each one's first minibatch is held against
float64 autograd. Beside the times stand the kernels an update launches, the share of its wall-clock
time in which the GPU works, and the share of the matrix rate and of the copy bandwidth that the same
run has measured.

Then PPO trains on tensor CartPole: steps a second after the phases were recorded, and the return.

Cases run in the order of their weight while there is time (--seconds); the file is written anew after
each. On a CPU (--tiny) everything runs at small sizes, ours by its reference in fp32: figures from
there mean nothing, and go to a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ceilings
import torch
from harness import Timing, interleaved, print_table, write_results
from learner_arms import (
    CARTPOLE,
    COMPILED,
    DEVICE,
    EAGER,
    EVERY,
    LOCOMOTION,
    NARROW,
    ON_GPU,
    OURS,
    PUFFER,
    USUAL,
    Arm,
    Problem,
    Start,
    arm_of,
    relative_error,
    start_of,
    true_gradient,
)
from torch import Tensor

from ppo_fast import PPO, capture
from ppo_fast.config import ControlConfig
from ppo_fast.control.tensor_envs import TensorCartPole

NEVER = 10**9
OUT_OF_TIME = "not run: out of time"


class Case(NamedTuple):
    name: str
    problem: Problem
    arms: tuple[str, ...]


CASES = (
    Case("puffer", PUFFER, EVERY),
    Case("cartpole", CARTPOLE, USUAL),
    Case("narrow", NARROW, USUAL),
    Case("locomotion", LOCOMOTION, USUAL),
    # Its compiler may take half a minute, so it comes last.
    Case("compiled", PUFFER, (OURS, COMPILED, EAGER)),
)
"""Those of the learner step."""

TRAINED_ENVS = (65536, 1024, 16384, 4096)
"""In the order of their weight, too."""
TRAINED_ARMS = ("fp16, graphs", "fp32, graphs", "fp32, eager")


def tiny_case(case: Case) -> Case:
    """The same at a size for a CPU in an interpreter's hands."""
    p = case.problem
    hidden = tuple(width // 8 for width in p.hidden)
    return case._replace(problem=p._replace(num_envs=16, num_steps=8, hidden=hidden))


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


class OnDevice(NamedTuple):
    """What a profiler saw the GPU do."""

    kernels: int
    """copies and fills included"""
    busy_seconds: float
    """in which at least one of them ran"""


def on_device(call: Callable[[], object]) -> OnDevice | None:
    """Profile a call; None without a GPU."""
    if not ON_GPU:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        wait()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
        # Ranges of the host are drawn on the device, too.
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("update/")
    ]
    return OnDevice(len(spans), covered(spans) * 1e-6) if spans else None


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reach = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return total


class Prepared(NamedTuple):
    arm: Arm
    error: float
    peak_mb: float | None


def prepare(start: Start, config: ControlConfig, name: str, exact: Tensor) -> Prepared:
    """Make an arm, compare its gradient and run it often enough to be compiled and recorded."""
    held = 0
    if ON_GPU:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    arm = arm_of(start, config, name)
    error = relative_error(arm.gradient(), exact)
    for _ in range(capture.EAGER_RUNS + 1):
        arm.update()
    wait()
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6 if ON_GPU else None
    return Prepared(arm, error, peak)


def failed(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return f"failed: {type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"


def release() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def run_case(
    case: Case, limits: dict[str, Any], rounds: int, end: float | None
) -> list[dict[str, Any]]:
    """A row for each arm, whatever came of it.

    Args:
        rounds: samples an arm, at most.
        end: time.monotonic() after which no more are taken, or None.
    """
    problem, config = case.problem, case.problem.config
    start = start_of(problem)
    exact = true_gradient(start, config)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Arm] = {}
    for name in case.arms:
        labels = {"case": case.name, "problem": problem.label, "arm": name}
        labels |= {"flops": problem.flops, "bytes": problem.bytes}
        labels |= {"published_ms": problem.published_ms, "minibatches": problem.updates}
        if end is not None and time.monotonic() > end:
            rows[name] = {**labels, "status": OUT_OF_TIME}
            continue
        try:
            prepared = prepare(start, config, name, exact)
        except Exception as error:
            rows[name] = {**labels, "status": failed(error)}
            release()
            continue
        note = prepared.arm.note
        rows[name] = {
            **labels,
            "status": "timed",
            "note": note if isinstance(note, str) else note(),
            "gradient_error": prepared.error,
            "peak_mb": prepared.peak_mb,
        }
        ready[name] = prepared.arm
        del prepared

    def sampler(arm: Arm) -> Callable[[], float]:
        return lambda: seconds_of(arm.update)

    samplers = {name: sampler(arm) for name, arm in ready.items()}
    a_round = sum(sample() for sample in samplers.values())
    if end is not None:
        rounds = max(3, min(rounds, int((end - time.monotonic()) / 2 / max(a_round, 1e-9))))
    for name, samples in interleaved(samplers, rounds).items():
        timing = Timing(tuple(samples), 1)
        row = rows[name]
        row |= {
            "median_ms": timing.median * 1e3,
            "min_ms": timing.min * 1e3,
            "max_ms": timing.max * 1e3,
            "minibatch_us": timing.median * 1e6 / problem.updates,
            "samples_per_second": problem.rows * problem.epochs / timing.median,
            "matrix_fraction": problem.flops / timing.median / limits["matmul_flops_per_s"],
            "copy_fraction": problem.bytes / timing.median / limits["copy_bytes_per_s"],
        }
        try:
            seen = on_device(ready[name].update)
        except Exception as error:  # no permission to profile, say
            row["profile"] = failed(error)
            continue
        row["kernels"] = None if seen is None else seen.kernels
        # By the clock of the unprofiled runs: a profiler makes launches slow.
        row["busy"] = None if seen is None else seen.busy_seconds / timing.median
    if (ours := rows.get(OURS, {}).get("median_ms")) is not None:
        for row in rows.values():
            row["times ours"] = row["median_ms"] / ours if "median_ms" in row else None
    return list(rows.values())


# --- training on tensor environments


class Training(NamedTuple):
    """How a training is measured."""

    num_envs: int
    num_steps: int
    seconds: float
    """of a training, at least one iteration more than are warmed up"""
    iterations: int
    """at most"""


def train(arm: str, t: Training) -> dict[str, Any]:
    """Train on tensor CartPole; steps a second are those of the iterations after recording."""
    precision, how = arm.split(", ")
    warm_up = capture.EAGER_RUNS + 1
    ends: list[float] = []
    returns: list[float] = []
    model = PPO(
        TensorCartPole(t.num_envs, device=DEVICE),
        num_steps=t.num_steps,
        precision=precision if ON_GPU else "fp32",
        learning_rate=2e-3,
        anneal_lr=False,
        seed=1,
        device=str(DEVICE),
    )

    def after(model: PPO) -> bool:
        ends.append(time.perf_counter())  # the metrics waited for the device
        if model.episodes.returns:
            returns.append(model.metrics["rollout/ep_rew_mean"])
        return len(ends) <= warm_up or ends[-1] - began < t.seconds

    eager_runs, held = capture.EAGER_RUNS, 0
    if ON_GPU:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        capture.EAGER_RUNS = NEVER if how == "eager" else eager_runs
        model.learn(t.iterations * t.num_envs * t.num_steps, after)
    finally:
        capture.EAGER_RUNS = eager_runs
    each = [b - a for a, b in itertools.pairwise(ends[warm_up - 1 :])]
    steps = t.num_envs * t.num_steps
    phases = {"update": model._phase, "rollout": model.collector and model.collector._phase}
    recorded = [name for name, phase in phases.items() if phase is not None and phase.recorded]
    row = {
        "status": "timed",
        "note": "" if ON_GPU else "the reference, fp32; a CPU has no graphs",
        "sps_median": steps / statistics.median(each),
        "sps_min": steps / max(each),
        "sps_max": steps / min(each),
        "iterations": len(ends),
        "steps": model.num_timesteps,
        "seconds": ends[-1] - began,
        "recorded": recorded,
        "return": returns[-1] if returns else None,
        "best_return": max(returns, default=None),
        "seconds_of": {
            name: model.metrics[f"time/{name}_seconds"] for name in ("rollout", "gae", "update")
        },
        "peak_mb": (torch.cuda.max_memory_allocated() - held) / 1e6 if ON_GPU else None,
    }
    model.close()
    return row


def trained(t: Training, end: float | None) -> list[dict[str, Any]]:
    """One training after another: a row an arm, whatever came of it; none starts after `end`."""
    rows: list[dict[str, Any]] = []
    for arm in TRAINED_ARMS:
        labels = {"case": "training", "problem": f"CartPole, {t.num_envs} x {t.num_steps}"}
        labels |= {"arm": arm, "num_envs": t.num_envs}
        if end is not None and time.monotonic() > end:
            rows.append({**labels, "status": OUT_OF_TIME})
            continue
        try:
            rows.append({**labels, **train(arm, t)})
        except Exception as error:
            rows.append({**labels, "status": failed(error)})
        release()
    return rows


# --- all cases


class Job(NamedTuple):
    label: str
    run: Callable[[float | None], list[dict[str, Any]]]
    """takes the time.monotonic() it should end by, or None"""
    seconds: float = 5.0
    """below which it is not worth starting"""


def jobs(tiny: bool, limits: dict[str, Any], rounds: int) -> list[Job]:
    """Everything there is to run, the most important first."""

    def learner(case: Case) -> Job:
        case = tiny_case(case) if tiny else case
        label = f"learner step, {case.name}: {case.problem.label}"
        least = 40.0 if ON_GPU and COMPILED in case.arms else 5.0
        return Job(label, lambda end: run_case(case, limits, rounds, end), least)

    def training(num_envs: int) -> Job:
        t = Training(num_envs, 128, 3.0, 100)
        if tiny:
            t = Training(num_envs // 1024, 16, 0.2, 8)
        return Job(f"training, {t.num_envs} environments", lambda end: trained(t, end))

    steps = [learner(case) for case in CASES]
    runs = [training(num_envs) for num_envs in TRAINED_ENVS]
    return [*steps[:1], *runs[:1], *steps[1:3], *runs[1:], *steps[3:]]


def run(
    tiny: bool, only: Sequence[str], seconds: float | None, rounds: int, folder: Path | None
) -> tuple[Path, dict[str, Any]]:
    """Run the cases while there is time; the file is written anew after each of them."""
    end = None if seconds is None else time.monotonic() + seconds
    with torch.device(DEVICE):
        limits = ceilings.measure()
    record: dict[str, Any] = {"ceilings": limits, "tiny": tiny, "not_run": []}
    record["runs"] = "kernels" if ON_GPU else "references on a CPU, in fp32"
    rows: list[dict[str, Any]] = []
    path = write_results("learner", rows, folder, **record)
    print(f"results: {path}", flush=True)
    wanted = [j for j in jobs(tiny, limits, rounds) if not only or any(w in j.label for w in only)]
    for job in wanted:
        began = time.monotonic()
        if end is not None and began + job.seconds > end:
            record["not_run"].append(job.label)
            continue
        try:
            found = job.run(end)
        except Exception as error:
            found = [{"case": job.label, "problem": job.label, "arm": "", "status": failed(error)}]
        rows += found
        release()
        print(f"{time.monotonic() - began:5.1f} s  {job.label}", flush=True)
        for row in found:
            if row["status"] != "timed":
                print(f"         {row['arm']}: {row['status']}", flush=True)
        path = write_results("learner", rows, folder, **record)
    path = write_results("learner", rows, folder, **record)
    return path, record | {"rows": rows}


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"ours: {record['runs']}")
    timed = [row for row in record["rows"] if row["status"] == "timed"]
    for name in dict.fromkeys(row["case"] for row in timed if row["case"] != "training"):
        rows = [row for row in timed if row["case"] == name]
        cells = [
            {
                "arm": row["arm"],
                "ms": row["median_ms"],
                "min": row["min_ms"],
                "max": row["max_ms"],
                "us a minibatch": row["minibatch_us"],
                "times ours": row.get("times ours"),
                "kernels": row.get("kernels"),
                "GPU busy": percent(row.get("busy")),
                "of matrix rate": percent(row["matrix_fraction"]),
                "of copy rate": percent(row["copy_fraction"]),
                "gradient error": f"{row['gradient_error']:.1e}",
                "MB": row["peak_mb"],
                "note": row["note"],
            }
            for row in rows
        ]
        print_table(cells, f"{name}: {rows[0]['problem']}, {rows[0]['minibatches']} minibatches")
    cells = [
        {
            "environments": row["num_envs"],
            "arm": row["arm"],
            "steps/s": f"{row['sps_median']:,.0f}",
            "min": f"{row['sps_min']:,.0f}",
            "max": f"{row['sps_max']:,.0f}",
            "return": row["return"],
            "best": row["best_return"],
            "iterations": row["iterations"],
            "recorded": " ".join(row["recorded"]) or "-",
            "MB": row["peak_mb"],
        }
        for row in timed
        if row["case"] == "training"
    ]
    if cells:
        print_table(cells, "PPO on tensor CartPole, 128 steps, 4 epochs, 4 minibatches, 64 x 64")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--tiny", action="store_true", help="small sizes; always without a GPU")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases whose label contains one of these"
    )
    parser.add_argument("--seconds", type=float, help="start no case after this long")
    parser.add_argument("--rounds", type=int, help="samples an arm, at most")
    parser.add_argument("--out", type=Path, help="folder for the file, in place of results/")
    arguments = parser.parse_args(argv)
    tiny = arguments.tiny or not ON_GPU
    folder = arguments.out
    if folder is None and (tiny or not arguments.json):
        # Sizes that tell nothing about speed must not stand among the results.
        folder = Path(tempfile.mkdtemp(prefix="ppo-fast-learner-"))
    rounds = arguments.rounds or (15 if ON_GPU else 3)
    path, record = run(tiny, arguments.only, arguments.seconds, rounds, folder)
    if record["not_run"]:
        print("not run, out of time: " + "; ".join(record["not_run"]))
    show(record)
    print(f"\nwrote {path}")
    if wrong := [row for row in record["rows"] if row["status"].startswith("failed")]:
        raise SystemExit(
            "\n".join(f"{row['case']}, {row['arm']}: {row['status']}" for row in wrong)
        )


if __name__ == "__main__":
    main()
