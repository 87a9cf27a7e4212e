"""Sampling, scoring and updates of one arm in a process of its own: what `bench_llm.py` starts.

Takes a job as JSON on the command line and prints one line of JSON behind MARK.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import llm_cases
import torch

MARK = "RESULT "
PHASES = ("sample", "score", "update", "garbage")


class Memory:
    """Peak memory of a phase in MB: resident memory on a CPU, allocated memory on a GPU.

    `None` where the system does not tell: resident peaks are reset through Linux' /proc.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.libc: Any = None
        with contextlib.suppress(OSError):
            self.libc = ctypes.CDLL("libc.so.6")

    def _status(self, field: str) -> float | None:
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                line = next(line for line in file if line.startswith(field))
        except OSError:
            return None
        return int(line.split()[1]) * 1024 / 1e6

    def now(self) -> float | None:
        """Memory held; what was freed is returned to the system first."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated() / 1e6
        if self.libc is not None:
            self.libc.malloc_trim(0)
        return self._status("VmRSS")

    def reset(self) -> None:
        self.now()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def peak(self) -> float | None:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 1e6
        return self._status("VmHWM")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Take `updates` timed updates after one that is not, then one whose memory is watched."""
    if job["processors"] is not None:
        os.sched_setaffinity(0, job["processors"])
    case = llm_cases.Case(**job["case"])
    torch.set_num_threads(job["threads"])
    # Before the models: packages are not to count as memory of a phase.
    module = importlib.import_module(f"peers.{job['module']}")
    memory = Memory(case.device)
    models = llm_cases.make_models(case)
    loaded = memory.now()
    stages = module.build(case, models, **job["options"])
    wait = torch.cuda.synchronize if memory.on_gpu else lambda: None

    seconds: dict[str, list[float]] = {name: [] for name in PHASES}
    processor: dict[str, list[float]] = {name: [] for name in PHASES}
    tokens: dict[str, list[int]] = {"sample": [], "score": []}
    peaks: dict[str, float | None] = {}
    held: dict[str, float | None] = {}
    metrics: dict[str, float] = {}
    timed, watched = range(1, job["updates"] + 1), job["updates"] + 1

    for turn in range(job["updates"] + 2):
        spent = dict.fromkeys(PHASES, (0.0, 0.0))

        # Called within its own turn only.
        def phase(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
            if turn == watched:  # noqa: B023
                held[name] = memory.now()
                memory.reset()
            wait()
            start, cpu = time.perf_counter(), time.process_time()
            result = work(*arguments)
            wait()
            took = time.perf_counter() - start, time.process_time() - cpu
            if turn == watched:  # noqa: B023
                peaks[name] = memory.peak()
            before = spent[name]  # noqa: B023
            spent[name] = (before[0] + took[0], before[1] + took[1])  # noqa: B023
            return result

        seed = 1000 * job["seed"] + turn
        prompts = llm_cases.make_prompts(case, seed)
        torch.manual_seed(seed)
        sampled = phase("sample", stages.sample, prompts)
        count = stages.count(sampled)
        del sampled
        # Every arm scores and learns from the same responses.
        responses = llm_cases.make_responses(case, seed)
        # A list, so that the phase can be the last to hold it.
        fixed = [stages.forced(prompts, responses)]
        rollout = phase("score", lambda held: stages.score(held.pop()), fixed)
        if stages.garbage is not None:
            phase("garbage", stages.garbage)
        metrics = phase("update", stages.update, rollout)
        del rollout
        if stages.garbage is not None:
            phase("garbage", stages.garbage)
        if turn in timed:
            for name in PHASES:
                seconds[name].append(spent[name][0])
                processor[name].append(spent[name][1])
            tokens["sample"].append(count)
            tokens["score"].append(sum(map(len, responses)))
    return {
        "seconds": seconds,
        "cpu_seconds": processor,
        "sampled_tokens": tokens["sample"],
        "fixed_tokens": tokens["score"],
        "loaded_mb": loaded,
        "held_mb": held,
        "peak_mb": peaks,
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


if __name__ == "__main__":
    print(MARK + json.dumps(run(json.loads(sys.argv[1]))), flush=True)
