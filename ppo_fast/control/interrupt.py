"""Ctrl-C and SIGTERM held back until a training iteration is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class DeferredInterrupt:
    """Inside the `with` block a first SIGINT or SIGTERM only sets `requested`; a second SIGINT acts.

    Outside the main thread, where handlers cannot be set, signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """The signal's name, once requested."""
        return self.requested.name if self.requested is not None else ""

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        print("\nfinishing this iteration, then saving; Ctrl-C again stops at once", flush=True)

    def deliver(self) -> None:
        """Raise what the signal means: KeyboardInterrupt, or SystemExit for SIGTERM."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
