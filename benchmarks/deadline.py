"""A pytest plugin that starts no test after `PPO_FAST_TESTS_UNTIL` (seconds since the epoch).

`pytest -p deadline` with this folder on PYTHONPATH; workers of pytest-xdist take it over.
"""

from __future__ import annotations

import os
import time

import pytest

UNTIL = float(os.environ.get("PPO_FAST_TESTS_UNTIL", "inf"))
REASON = "out of time"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL:
        pytest.skip(REASON)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left = [r for r in terminalreporter.stats.get("skipped", ()) if REASON in str(r.longrepr)]
    if left:
        terminalreporter.write_line(f"{len(left)} tests not run: {REASON}")
