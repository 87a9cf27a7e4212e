"""A run's folder: config.json, checkpoint.safetensors, metrics.csv, events and a picture."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from pathlib import Path

import gymnasium
import torch

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.config import ControlConfig
from ppo_fast.logger import METRICS_FILE, RunLogger

log = logging.getLogger("ppo_fast")

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "config.json"
CURVE_FILE = "learning_curve.png"


class RunFolder:
    """Opens a folder for a call of `learn` and closes it with a learning curve.

    Args:
        path: made if missing.
        resume_step: environment steps done, where this folder's run goes on; None for a new one.

    Raises:
        FileExistsError: a new run, but the folder holds one already.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: str, resume_step: int | None) -> None:
        self.path = Path(path)
        if resume_step is None and (self.path / CHECKPOINT_FILE).exists():
            raise FileExistsError(
                f"run_dir {self.path} holds a finished or interrupted run; choose another, or continue "
                f"that one with `ppo-fast train --resume {self.path}`"
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

    def write_config(self, env_id: str | None, config: ControlConfig) -> None:
        """Record the settings and what ran them."""
        record = {
            "env_id": env_id,
            **dataclasses.asdict(config),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gymnasium": gymnasium.__version__,
            },
        }
        atomic_write_text(self.path / CONFIG_FILE, json.dumps(record, indent=2) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row of metrics."""
        self.logger.log(step, metrics)

    def close(self, draw: bool = True) -> None:
        """Close the logs and draw the learning curve, where an episode has ended."""
        self.logger.close()
        if not draw:
            return
        from ppo_fast.plots import plot_learning_curves

        try:
            plot_learning_curves([self.path], self.path / CURVE_FILE)
        except (ImportError, ValueError, OSError) as error:
            log.warning("no learning curve: %s", error)
