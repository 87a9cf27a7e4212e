"""Named stages: seconds for the logs, ranges for whichever profiler listens, a table at the end.

The ranges are NVTX ranges of the domain `ppo_fast` under Nsight, and `record_function` blocks under
`torch.profiler`. Where neither listens, `span` is a block that does nothing and `ranged` hands back the
function it was given, so that a loop of environment steps carries nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

try:
    import nvtx
except ImportError:  # pragma: no cover - a dependency, but without wheels for macOS
    nvtx = None

log = logging.getLogger("ppo_fast")

P = ParamSpec("P")
R = TypeVar("R")

DOMAIN = "ppo_fast"
"""NVTX domain of all ranges: what nsys and ncu expressions begin or end with"""

STAGES = ("rollout", "gae", "update", "log")
"""what an iteration consists of, in this order; `stage/part` is a part of a stage"""

CAPTURE = "capture"
"""NVTX range around the iterations that `PPO_FAST_CAPTURE` asks for"""

iteration_listeners: list[Callable[[], None]] = []
"""each is called after every training iteration of the command line, on the training thread"""

_NOTHING = nullcontext()


@cache
def nvtx_attached() -> bool:
    """Whether a tool receives this process's NVTX ranges.

    A tool is there from the start of the process or never: NVTX loads it with the first call.
    """
    if nvtx is None:
        return False
    # Without a tool nvtx hands out a domain of another class, one that does nothing.
    return isinstance(nvtx.get_domain(DOMAIN), nvtx.Domain)


def listening() -> bool:
    """Whether ranges are seen by anybody: an NVTX tool, or a `torch.profiler` on this thread."""
    return nvtx_attached() or torch.autograd._profiler_enabled()


def span(name: str) -> AbstractContextManager[Any]:
    """A `with` block that profilers show under this name; nothing where none listens."""
    if not torch.autograd._profiler_enabled():
        return _nvtx_range(name) if nvtx_attached() else _NOTHING
    recorded = torch.profiler.record_function(name)
    return _both(name, recorded) if nvtx_attached() else recorded


def ranged(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """`function` inside `span(name)`; `function` itself where no profiler listens.

    For loops: wrap before the first step, as often as a profiler may have come or gone.
    """
    if not listening():
        return function

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with span(name):
            return function(*args, **kwargs)

    return inside


@cache
def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    # One object a name: it registers the string once, holds no state, and may be entered again.
    return nvtx.annotate(name, domain=DOMAIN)


@contextmanager
def _both(name: str, recorded: AbstractContextManager[Any]) -> Iterator[None]:
    with _nvtx_range(name), recorded:
        yield


class StageTimer:
    """Wall-clock seconds per stage; each stage is also a `span` of the same name.

    On a GPU the seconds are those of the host: kernels still in flight are charged to the stage that
    waits for them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with` block under `name`, whether or not it raises."""
        with span(name):
            start = time.perf_counter()
            try:
                yield
            finally:
                self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the totals so far and start again from zero."""
        totals = dict(self.seconds)
        self.seconds.clear()
        return totals


@contextmanager
def captured_iterations() -> Iterator[Callable[[], None]]:
    """Training of the command line: yields what to call after every iteration.

    With `PPO_FAST_CAPTURE=SKIP:N`, which `ppo-fast profile` sets, the N iterations after the first SKIP
    lie in the NVTX range `capture`, by which nsys and ncu know what to record.

    Raises:
        ValueError: `PPO_FAST_CAPTURE` is not two whole numbers, or N is 0.
    """
    window = _capture_window()
    if window and not nvtx_attached():
        log.warning("PPO_FAST_CAPTURE: nothing is recorded: no NVTX tool is attached")
    done = 0

    def iteration_ended() -> None:
        nonlocal done
        done += 1
        for listener in tuple(iteration_listeners):
            listener()
        if done == window.stop:
            capture.close()
        if done == window.start < window.stop:
            capture.enter_context(span(CAPTURE))

    with ExitStack() as capture:
        if window.start == 0 < window.stop:
            capture.enter_context(span(CAPTURE))
        yield iteration_ended
    if window and done <= window.start:
        log.warning(
            "PPO_FAST_CAPTURE: nothing was recorded: training ended after %d iterations, and the first "
            "%d are left out",
            done,
            window.start,
        )


def _capture_window() -> range:
    """The iterations `PPO_FAST_CAPTURE` names, counted from 0; none where it is not set."""
    wish = os.environ.get("PPO_FAST_CAPTURE", "")
    if not wish:
        return range(0)
    skip, _, count = wish.partition(":")
    if not (skip.isdecimal() and count.isdecimal() and int(count) > 0):
        raise ValueError(
            f"PPO_FAST_CAPTURE is {wish!r}; expected SKIP:N, iterations to skip and to record, like 2:3"
        )
    return range(int(skip), int(skip) + int(count))


def stage_seconds(metrics: dict[str, float]) -> dict[str, float]:
    """The `time/<stage>_seconds` of an iteration's metrics, by stage.

    What is neither a stage nor `stage/part` already is a part of the rollout: the collector's times.
    """
    seconds = {}
    for key, value in metrics.items():
        if key.startswith("time/") and key.endswith("_seconds"):
            name = key.removeprefix("time/").removesuffix("_seconds")
            seconds[name if name in STAGES or "/" in name else f"rollout/{name}"] = value
    return seconds


def phase_table(totals: dict[str, float]) -> str:
    """Seconds and share of every stage as lines of text.

    Args:
        totals: seconds by stage. `stage/part` is listed under its stage and not counted twice; names
            that are no stage, such as "other", come last.

    Raises:
        ValueError: a part whose stage is missing, or seconds that are negative or not finite.
    """
    stages = [name for name in totals if "/" not in name]
    for name, seconds in totals.items():
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"phase_table: {name} = {seconds}; expected seconds, 0 or more")
        if name.partition("/")[0] not in stages:
            raise ValueError(f"phase_table: {name!r} is a part of a stage that is not in {stages}")
    stages.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    whole = sum(totals[name] for name in stages)
    rows = []
    for stage in stages:
        rows.append((stage, totals[stage]))
        parts = [name for name in totals if name.startswith(f"{stage}/")]
        rows += [(f"  {name.partition('/')[2]}", totals[name]) for name in parts]
    width = max([len("stage"), *(len(label) for label, _ in rows)])
    lines = [f"{'stage':{width}}  {'seconds':>9}  {'share':>7}"]
    for label, seconds in rows:
        share = seconds / whole if whole > 0 else 0.0
        lines.append(f"{label:{width}}  {seconds:9.2f}  {100 * share:5.1f} %")
    return "\n".join(lines)
