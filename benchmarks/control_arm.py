"""One training in a process of its own: what `bench_control.py` starts for every arm of a round.

Takes a job as JSON on the command line and prints one line of JSON behind MARK. Imports nothing but
the arm's own module, so that the time from the start of the process is the arm's.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

MARK = "RESULT "


class Watcher:
    """Notes clock, processor time, steps and mean return after every iteration.

    Args:
        started: `time.monotonic()` of when the process was started.
        solved: stop once the last `window` returns reach this mean; None for never.
        window: episodes that mean needs.
        limit: seconds from the process' start after which training is given up.
    """

    def __init__(
        self, started: float, solved: float | None, window: int, limit: float | None
    ) -> None:
        self.started = started
        self.solved = solved
        self.window = window
        self.limit = limit
        self.marks: list[tuple[float, float, int, float | None, int]] = []

    def __call__(self, steps: int, returns: Sequence[float]) -> bool:
        now = time.monotonic() - self.started
        mean = statistics.fmean(returns) if len(returns) else None
        self.marks.append((now, time.process_time(), steps, mean, len(returns)))
        enough = mean is not None and len(returns) >= self.window
        if enough and self.solved is not None and mean >= self.solved:
            return True
        return self.limit is not None and now > self.limit


def peak_mb() -> float | None:
    """Largest resident set so far, in MB, of this program or of one it ran; None where unknown."""
    # Not getrusage: under Linux its maximum counts what the parent had when it started this process.
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            lines = file.readlines()
    except (OSError, ImportError):
        return None
    mine = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return max(mine, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Import, build and train; return what was seen, times in seconds from the process' start."""
    started = job["started"]
    awake = time.monotonic()
    if job["processors"] is not None:
        os.sched_setaffinity(0, job["processors"])
    module = importlib.import_module(f"peers.{job['module']}")
    imported = time.monotonic()
    config = SimpleNamespace(**job["config"])
    config.hidden_sizes = tuple(config.hidden_sizes)
    train = module.build(job["env_id"], config, **job["options"])
    built, cpu = time.monotonic(), time.process_time()
    watcher = Watcher(started, job["solved"], job["window"], job["limit"])
    trained = train(job["timesteps"], watcher)
    done = time.monotonic()
    return {
        "start_seconds": awake - started,
        "import_seconds": imported - awake,
        "build_seconds": built - imported,
        "compile_seconds": trained.compile_seconds,
        "train_seconds": done - built,
        "train_cpu_seconds": time.process_time() - cpu,
        "total_seconds": done - started,
        "cpu_seconds_before": cpu,
        "steps": trained.steps,
        "returns": trained.returns,
        "phases": trained.phases,
        "marks": watcher.marks,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    print(MARK + json.dumps(run(json.loads(sys.argv[1]))), flush=True)
