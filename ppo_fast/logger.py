"""Metrics of a run: `metrics.csv`, which survives a kill, and TensorBoard events beside it."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.extras import require

METRICS_FILE = "metrics.csv"


class RunLogger:
    """Append rows of metrics to `folder/metrics.csv` and to TensorBoard; a context manager.

    The first column is `step`, the others are the metric keys in the order they first appeared; a
    cell is empty where a row lacks the key. Every row is handed to the system at once.

    Args:
        folder: the run folder, made if missing.
        resume_step: continue the file there, dropping rows after this step; None starts a new one.
        tensorboard: also write TensorBoard events.

    Raises:
        FileExistsError: the folder has metrics already and `resume_step` is None.
        ValueError: the metrics to continue are not readable.
        ImportError: tensorboard is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
    ) -> None:
        self.path = Path(folder) / METRICS_FILE
        self._tensorboard: Any = None
        self._keys: list[str] = []
        self._last_step: int | None = None
        rows: list[list[str]] = []
        if self.path.exists():
            if resume_step is None:
                raise FileExistsError(
                    f"{self.path} exists; continue that run with resume_step=, "
                    "or choose another folder"
                )
            self._keys, rows = _read(self.path)
            rows = [row for row in rows if int(row[0]) <= resume_step]
        if tensorboard:
            require("tensorboard", "train", "RunLogger(tensorboard=True)")
            from torch.utils.tensorboard import SummaryWriter

            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._tensorboard = SummaryWriter(
                str(self.path.parent),
                # Readers drop events at or after purge_step.
                purge_step=None if resume_step is None else resume_step + 1,
                flush_secs=10,
            )
        if rows:
            self._last_step = int(rows[-1][0])
        self._rewrite(rows)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row.

        Args:
            step: environment steps so far; never less than the row before.
            metrics: numbers by key; NaN and infinities are written as `nan`.

        Raises:
            ValueError: the logger is closed, the step goes back, a key is not a name or a value
                not a number.
            OSError: the row cannot be written.
        """
        if self._file.closed:
            raise ValueError(f"RunLogger.log: {self.path} is closed")
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"RunLogger.log: step {step} comes after step {self._last_step}")
        values = {key: _number(key, value) for key, value in metrics.items()}
        new_keys = [key for key in values if key not in self._keys]
        if new_keys:
            self._file.close()
            rows = _read(self.path)[1]
            self._keys += new_keys
            self._rewrite([row + [""] * len(new_keys) for row in rows])
        cells = [repr(values[key]) if key in values else "" for key in self._keys]
        line = _csv_line([str(step), *cells]).encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path}: the row of step {step} was not written: {error}"
            ) from error
        self._last_step = step
        if self._tensorboard is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # One event a row: add_scalar would write one a key, many times slower.
            scalars = [Summary.Value(tag=key, simple_value=values[key]) for key in values]
            self._tensorboard.file_writer.add_summary(Summary(value=scalars), step)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _rewrite(self, rows: list[list[str]]) -> None:
        """Replace the file by header and rows, atomically, and open it for more."""
        lines = [_csv_line(["step", *self._keys]), *map(_csv_line, rows)]
        atomic_write_text(self.path, "".join(lines))
        # Unbuffered: a row is out when `log` returns, and closing after a full disk cannot fail.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Read a run's metrics, also of a run in progress: `{"step": [...], key: [...]}`.

    All lists have one length; NaN where a row lacks the key.

    Raises:
        FileNotFoundError: the folder has no `metrics.csv`.
        ValueError: a cell is not a number.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; expected a run folder")
    keys, rows = _read(path)
    columns = list(zip(*rows, strict=True)) or [()] * (len(keys) + 1)
    return {
        key: [float(cell or "nan") for cell in cells]
        for key, cells in zip(["step", *keys], columns, strict=True)
    }


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read `(keys, rows of cells)`; an unfinished last line, left by a kill, is dropped."""
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines or lines[0][:1] != ["step"]:
        raise ValueError(f"{path} does not start with the column 'step'; it is not a metrics file")
    for number, row in enumerate(lines[1:], start=2):
        try:
            int(row[0])
            for cell in row[1:]:
                float(cell or "nan")
            if len(row) != len(lines[0]):
                raise ValueError(f"{len(row)} cells")
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; expected {len(lines[0])} numbers; "
                "mend or remove the line"
            ) from None
    return lines[0][1:], lines[1:]


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _number(key: str, value: Any) -> float:
    if not isinstance(key, str) or not key or key == "step" or "\n" in key or "\r" in key:
        raise ValueError(
            f"RunLogger.log: {key!r} cannot name a metric; expected one line of text, not 'step'"
        )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"RunLogger.log: {key} is {value!r}, expected a number") from error
    return number if math.isfinite(number) else math.nan
