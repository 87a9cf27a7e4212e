"""Ctrl-C and SIGTERM held back until a training iteration is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_NOTICE = b"\nfinishing this iteration, then saving; Ctrl-C again stops at once\n"


class DeferredInterrupt:
    """Inside the `with` block a first SIGINT or SIGTERM only sets `requested`; a second SIGINT acts.

    Outside the main thread, where handlers cannot be set, signals keep their usual effect.

    Attributes:
        requested: the first signal that came, or None.
        insisted: whether a SIGINT came after it.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.insisted = False
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
        if self.requested is None:
            self.requested = signal.Signals(number)
            # The interrupted code may be printing, and buffered streams refuse to be re-entered.
            with suppress(OSError, ValueError, AttributeError):
                os.write(sys.stderr.fileno(), _NOTICE)
        elif number == signal.SIGINT:
            self.insisted = True
            raise KeyboardInterrupt

    def deliver(self) -> None:
        """Raise what the signal means: KeyboardInterrupt, or SystemExit for SIGTERM."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
