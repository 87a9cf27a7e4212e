"""What every benchmark here shares: interleaved timing, a record of the machine, a table, JSON.

All arms are timed in one process, in turns: a slow moment of the machine then falls on all of them
alike, and a ratio taken round by round cancels it.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
CODE = (":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)README.md")
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "gymnasium", "stable-baselines3", "torchrl"),
    *("trl", "verl", "liger-kernel", "cut-cross-entropy", "rl-triton", "flash-attn", "rl_games"),
    *("jax", "sbx-rl", "rsl-rl-lib", "envpool", "ale-py", "mujoco"),
)


class Timing(NamedTuple):
    """Seconds per call of one case; entry i of `samples` is its mean over round i."""

    samples: tuple[float, ...]
    calls_per_round: int

    @property
    def median(self) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        """Fastest round, in seconds."""
        return min(self.samples)

    @property
    def max(self) -> float:
        """Slowest round, in seconds."""
        return max(self.samples)

    def speedup_over(self, other: Timing) -> float:
        """Median over rounds of `other / self`: how many times faster this case is."""
        pairs = zip(other.samples, self.samples, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def _seconds(case: Callable[[], object], calls: int) -> float:
    # A GPU runs behind the host: without the two waits this would time the launches.
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        case()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    cases: Mapping[str, Callable[[], object]], rounds: int = 15, min_time: float = 0.02
) -> dict[str, Timing]:
    """Time the cases in turns, each for at least `min_time` seconds a round.

    Every case is warmed up first, for at least two calls and `min_time` seconds; the order is
    rotated from round to round so that none always follows the same neighbour.

    Args:
        cases: what to call, by name.
        rounds: samples a case.
        min_time: seconds a sample lasts, at least; one call where a call lasts longer.
    """
    calls: dict[str, int] = {}
    for name, case in cases.items():
        case()
        number, spent = 1, _seconds(case, 1)
        while spent < min_time:
            number = max(number + 1, min(10 * number, int(1.1 * number * min_time / spent) + 1))
            spent = _seconds(case, number)
        calls[name] = number

    def sampler(name: str) -> Callable[[], float]:
        return lambda: _seconds(cases[name], calls[name]) / calls[name]

    samples = interleaved({name: sampler(name) for name in cases}, rounds)
    return {name: Timing(tuple(samples[name]), calls[name]) for name in cases}


def interleaved(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Take a sample of each in turns, the order rotated from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    collected_garbage = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                samples[name].append(samplers[name]())
            gc.collect()
    finally:
        if collected_garbage:
            gc.enable()
    return samples


def timing_rows(
    timings: Mapping[str, Timing], ours: str | None = None, **labels: object
) -> list[dict[str, Any]]:
    """Turn timings into rows for `print_table` and `write_results`.

    Args:
        timings: what `compare` returned.
        ours: the case the others are set against; each row then says how many times faster it is.
        labels: columns put first in every row, such as `shape="[128, 8]"`.
    """
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {
            **labels,
            "case": name,
            "median_us": timing.median * 1e6,
            "min_us": timing.min * 1e6,
            "max_us": timing.max * 1e6,
        }
        if ours is not None:
            row[f"times {ours}"] = timings[ours].speedup_over(timing)
        rows.append(row)
    return rows


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a Markdown table; columns are the keys in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if title:
        print(f"\n{title}")
    for number, line in enumerate(cells):
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.+)", text)
    return found.group(1).strip() if found else platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_record() -> dict[str, Any]:
    """Say on what a result was measured: processors, versions, threads, commit, date.

    `commit` is None outside a git checkout or before its first commit; `uncommitted_changes` tells
    whether the working tree differs from it. Packages that are absent are recorded as None.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        # A lent machine gets the files without their history: PPO_FAST_COMMIT names the commit.
        "commit": _git("rev-parse", "--short", "--verify", "HEAD")
        or os.environ.get("PPO_FAST_COMMIT"),
        # What a benchmark writes itself does not count.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *CODE)),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write_results(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    folder: Path | None = None,
    **more: object,
) -> Path:
    """Write rows and `machine_record()` to `<folder>/<name>-<machine>-<date>-<commit>.json`.

    `<machine>` is the GPU's name, or the CPU's and its count; `<commit>` ends in `+` where the
    working tree had changes the commit does not hold. A copy goes to the folder that the
    environment variable `OUT` names, if it is set.

    Args:
        name: of the benchmark.
        rows: what was measured.
        folder: results/ by default.
        more: further entries of the file beside the rows.
    """
    machine = machine_record()
    processor = machine["gpu"] or f"{machine['cpu']} {machine['cpu_count']} cores"
    slug = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm)\)", "", processor.lower())).strip("_")
    commit = (machine["commit"] or "none") + ("+" if machine["uncommitted_changes"] else "")
    record = {"benchmark": name, "machine": machine, **more, "rows": list(rows)}
    text = json.dumps(record, indent=1) + "\n"
    path = (folder or RESULTS) / f"{name}-{slug}-{machine['date']}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if out := os.environ.get("OUT"):
        # The device machine returns files of plain names.
        (Path(out) / path.name.replace("+", "_changed")).write_text(text, encoding="utf-8")
    return path
