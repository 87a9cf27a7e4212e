"""Device time, call time and memory of arms on a GPU; on a CPU the same by the host's clock.

An arm is a list of functions, one for each set of buffers, that do the same on different memory: one
after the other they touch more than the L2 cache holds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from harness import Timing, interleaved

Arm = Sequence[Callable[[], Any]]

GRAPH_SECONDS = 0.5e-3
"""A replay lasts at least this long, so that launching it weighs nothing."""

GRAPH_CALLS = 512


class Measured(NamedTuple):
    """What was measured of one arm."""

    timing: Timing
    method: str
    """How: "graph", "events", or "host"; events and host include what the host does between kernels."""
    host_us: float
    """Microseconds until a call on an idle device returns."""
    call_us: float
    """Microseconds until its results are there."""
    peak_mb: float | None
    """Memory it takes beyond its inputs, in 10^6 bytes."""


def number_of_sets(working_set: int, l2_bytes: int | None) -> int:
    """How many sets of buffers: together at least four times the L2 cache, 4 to 64, or one."""
    if l2_bytes is None or working_set >= 4 * l2_bytes:
        return 1
    return min(64, max(4, -(-4 * l2_bytes // max(1, working_set))))


def measure(arms: Mapping[str, Arm], rounds: int) -> dict[str, Measured]:
    """Time the arms in turns, the order rotated from round to round."""
    on_gpu = torch.cuda.is_available()
    samplers = {n: _on_gpu(arm) if on_gpu else _on_host(arm) for n, arm in arms.items()}
    samples = interleaved({name: sample for name, (sample, _, _) in samplers.items()}, rounds)
    found = {}
    for name, arm in arms.items():
        _, calls, method = samplers[name]
        host, call = _call_times(arm)
        timing = Timing(tuple(samples[name]), calls)
        found[name] = Measured(timing, method, host * 1e6, call * 1e6, _peak(arm[0]))
    return found


def _on_host(arm: Arm) -> tuple[Callable[[], float], int, str]:
    turns = itertools.cycle(arm)

    def sample() -> float:
        call = next(turns)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample, 1, "host"


def _events(work: Callable[[], object], calls: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    return sample


def _on_gpu(arm: Arm) -> tuple[Callable[[], float], int, str]:
    def lap() -> list[Any]:
        # Held until the lap is over: each call then writes to memory of its own.
        return [call() for call in arm]

    # Capture wants the work warmed up on a stream of its own.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lap()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    seconds = _events(lap, len(arm))()

    laps = max(1, min(int(GRAPH_SECONDS / (seconds * len(arm))) + 1, GRAPH_CALLS // len(arm)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(laps):
                kept = lap()
        del kept
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        torch.cuda.synchronize()
        # Ending a broken capture raises too; what broke it is what that error came on top of.
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        why = str(first).strip().partition("\n")[0][:120]
        return _events(lap, len(arm)), len(arm), f"events ({type(first).__name__}: {why})"
    return _events(graph.replay, laps * len(arm)), laps * len(arm), "graph"


def _call_times(arm: Arm, seconds: float = 0.05) -> tuple[float, float]:
    """Medians of the times until a call returns, and until the device is done with it."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    returned, done = [], []
    began = time.perf_counter()
    for call in itertools.cycle(arm):
        wait()
        start = time.perf_counter()
        call()
        returned.append(time.perf_counter() - start)
        wait()
        done.append(time.perf_counter() - start)
        if len(done) >= 50 or time.perf_counter() - began > seconds:
            break
    return statistics.median(returned), statistics.median(done)


def _peak(call: Callable[[], Any]) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
