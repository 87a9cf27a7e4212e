"""Named stages: an NVTX range for Nsight and a running total of seconds for the logs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import nvtx
except ImportError:  # pragma: no cover - nvtx is a dependency; a stripped machine may lack it
    nvtx = None


class StageTimer:
    """Wall-clock seconds per stage; each stage is also an NVTX range of the same name.

    On a GPU the seconds are those of the host: kernels still in flight are charged to the stage that
    waits for them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with` block under `name`."""
        if nvtx is not None:
            nvtx.push_range(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            if nvtx is not None:
                nvtx.pop_range()

    def take(self) -> dict[str, float]:
        """Return the totals so far and start again from zero."""
        totals = dict(self.seconds)
        self.seconds.clear()
        return totals
