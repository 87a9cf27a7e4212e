"""`ppo-fast train ID` as shipped: a process of its own, with its run folder, checkpoint and plot."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from peers import Trained, Trainer, Watch

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Of the config only `seed` and `stop_return` are looked at: the recipe is what it ships."""

    def train(total_timesteps: int, watch: Watch) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "ppo_fast",
                "train",
                env_id,
                "--run-dir",
                f"{folder}/run",
            ]
            flags = {
                "--total-timesteps": total_timesteps,
                "--stop-return": config.stop_return,
                "--seed": config.seed,
            }
            for flag, value in flags.items():
                command += [flag, str(value)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            metrics = Path(folder) / "run" / "metrics.csv"
            # It also ends with an error where the return was not reached.
            if not metrics.exists():
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
            with metrics.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["rollout/ep_rew_mean"]]
        steps, mean = int(rows[-1]["step"]), float(rows[-1]["rollout/ep_rew_mean"])
        watch(steps, [mean] * 100)
        return Trained(steps, [mean], {})

    return train
