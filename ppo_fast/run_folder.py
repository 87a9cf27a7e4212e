"""A run's folder: config.json, checkpoint.safetensors, metrics.csv, events and a picture."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.config import PPOConfig
from ppo_fast.logger import METRICS_FILE, RunLogger

log = logging.getLogger("ppo_fast")

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "config.json"


class RunFolder:
    """Opens a folder for a call of `learn` and closes it with a picture.

    Args:
        path: made if missing.
        resume_step: steps done, where this folder's run goes on; None for a new one.
        draw: draws the folder's metrics into it.
        continue_by: how a user continues a run in this folder, for the error.

    Raises:
        FileExistsError: a new run, but the folder holds one already.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str,
        resume_step: int | None,
        draw: Callable[[Path], Any],
        continue_by: str = "ppo-fast train --resume {folder}",
    ) -> None:
        self.path = Path(path)
        self._draw = draw
        if resume_step is None and (self.path / CHECKPOINT_FILE).exists():
            raise FileExistsError(
                f"run_dir {self.path} holds a finished or interrupted run; choose another, or continue "
                f"that one with `{continue_by.format(folder=self.path)}`"
            )
        if resume_step is None and (self.path / METRICS_FILE).exists():
            raise FileExistsError(
                f"run_dir {self.path} holds the metrics of a run without a checkpoint; choose another, "
                "or remove it"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"run_dir {self.path} cannot be made: {error.strerror}") from error
        self.checkpoint = self.path / CHECKPOINT_FILE
        self.logger = RunLogger(self.path, resume_step)

    def write_config(
        self, what: dict[str, Any], config: PPOConfig, library: ModuleType | None = None
    ) -> None:
        """Record what is trained, the settings, and the versions of what ran them."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        if library is not None:
            versions[library.__name__] = library.__version__
        record = {**what, **dataclasses.asdict(config), "versions": versions}
        atomic_write_text(self.path / CONFIG_FILE, json.dumps(record, indent=2) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row of metrics."""
        self.logger.log(step, metrics)

    def close(self, draw: bool = True) -> None:
        """Close the logs and draw the picture, where there is something to draw."""
        self.logger.close()
        if not draw:
            return
        try:
            self._draw(self.path)
        except (ImportError, ValueError, OSError) as error:
            log.warning("no picture of the run: %s", error)
