"""`ppo-fast profile -- COMMAND`: a command under Nsight Systems, Nsight Compute or torch.profiler."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ppo_fast.profiling import CAPTURE, DOMAIN, STAGES, iteration_listeners

TOOL_MISSING = 127
"""exit code where a tool that was asked for is missing: a shell's for a command not found"""

TOOLS = {
    "nsys": "Nsight Systems: https://developer.nvidia.com/nsight-systems, or the package "
    "cuda-nsight-systems-13-0 of NVIDIA's apt repository",
    "ncu": "Nsight Compute: https://developer.nvidia.com/nsight-compute, or the package "
    "cuda-nsight-compute-13-0 of NVIDIA's apt repository",
}
ROWS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileFlags:
    """Run a ppo-fast command under a profiler, as in ppo-fast profile -- train CartPole-v1.

    Of training a few iterations are recorded, of other commands all. The exit code is the command's,
    or 127 where the tool asked for is missing.
    """

    tool: Literal["auto", "nsys", "ncu", "torch"] = "auto"
    """nsys: a timeline of stages and kernels (Nsight Systems); ncu: the hardware counters of every
    kernel of a stage (Nsight Compute); torch: a trace for any browser and a table; auto: nsys where
    it is on PATH, else torch"""
    skip: int = 2
    """training iterations to leave out first: compilation, graph capture, warm-up"""
    iterations: int = 3
    """training iterations to record"""
    stage: str = "update"
    """ncu: the stage whose kernels are measured, such as rollout or update/minibatch"""
    launches: int = 100
    """ncu: kernel launches to measure at most; each is replayed dozens of times"""
    out: Path | None = None
    """report to write, without its ending; None makes profiles/TIME"""
    print_command: bool = False
    """print the command line, run nothing"""

    def __post_init__(self) -> None:
        """Check the numbers and the stage; raise ValueError naming the field."""
        for name, least in (("skip", 0), ("iterations", 1), ("launches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least {least}")
        if self.stage.partition("/")[0] not in STAGES:
            raise ValueError(
                f"stage = {self.stage!r}; expected {', '.join(STAGES)} or a part of one"
            )


def profile(flags: ProfileFlags, command: list[str], run: Callable[[], None]) -> None:
    """Do what the flags say with a ppo-fast command.

    Args:
        flags: the tool, and what it records.
        command: words of the command, without `ppo-fast`.
        run: runs it in this process.

    Nsight replaces this process, so that exit codes and signals are the command's own.

    Raises:
        ValueError: `out` cannot be written.
        RuntimeError: training ended before anything was recorded.
        SystemExit: the tool asked for is missing, or what `run` raises.
    """
    out = flags.out or Path("profiles") / time.strftime("%Y%m%d-%H%M%S")
    tool = "nsys" if flags.tool == "auto" else flags.tool
    environment, line = command_line(tool, flags, command, out)
    shown = shlex.join([f"{name}={value}" for name, value in environment.items()] + line)
    if flags.print_command:
        print(shown)
        return
    if tool != "torch" and shutil.which(tool) is None:
        instead = (
            "recording with torch.profiler instead" if flags.tool == "auto" else "nothing was run"
        )
        print(
            f"ppo-fast: {tool} is not on PATH: {instead}. To install {TOOLS[tool]}. "
            f"The command line: {shown}",
            file=sys.stderr,
        )
        if flags.tool != "auto":
            sys.exit(TOOL_MISSING)
        tool = "torch"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out = {out}: the folder cannot be made: {error}") from error
    if tool == "torch":
        record_with_torch(flags, _is_training(command), Path(f"{out}.json.gz"), run)
        return
    print(
        f"nsys-ui {out}.nsys-rep shows the timeline, nsys stats {out}.nsys-rep prints tables"
        if tool == "nsys"
        else f"ncu-ui {out}.ncu-rep shows the kernels, ncu --import {out}.ncu-rep prints them",
        flush=True,
    )
    os.execvpe(line[0], line, os.environ | environment)


def command_line(
    tool: str, flags: ProfileFlags, command: list[str], out: Path
) -> tuple[dict[str, str], list[str]]:
    """What a tool is started with: additions to the environment, and the words."""
    child = [sys.executable, "-m", "ppo_fast"]
    if tool == "torch":
        window = [f"--skip={flags.skip}", f"--iterations={flags.iterations}", f"--out={out}"]
        return {}, [*child, "profile", "--tool=torch", *window, "--", *command]
    training = _is_training(command)
    environment = {"PPO_FAST_CAPTURE": f"{flags.skip}:{flags.iterations}"} if training else {}
    if tool == "nsys":
        line = ["nsys", "profile", "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node"]
        line += ["--sample=none", "--cpuctxsw=none"]
        if training:
            # By default the end of the range would end the training too.
            line += ["--capture-range=nvtx", f"--nvtx-capture={CAPTURE}@{DOMAIN}"]
            line += ["--capture-range-end=stop"]
        line += ["--force-overwrite=true", f"--output={out}"]
    else:
        line = ["ncu", "--set", "full", "--target-processes", "all", "--graph-profiling", "node"]
        line += ["--nvtx"]
        if training:
            # A slash within a name would read as one range inside another.
            stage = flags.stage.replace("/", r"\/")
            line += ["--nvtx-include", f"{DOMAIN}@{CAPTURE}/*/{stage}"]
        line += ["--launch-count", str(flags.launches), "--force-overwrite", "--export", str(out)]
    return environment, [*line, *child, *command]


def _is_training(command: list[str]) -> bool:
    return command[0] == "train"


def record_with_torch(
    flags: ProfileFlags, training: bool, path: Path, run: Callable[[], None]
) -> None:
    """Run under `torch.profiler`; write a trace (Chrome's JSON, gzipped), print the largest rows.

    What was recorded is written even if `run` raises.

    Raises:
        RuntimeError: training ended before anything was recorded.
    """
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recorded = False
    ended = 0

    def stopped(trace: Any) -> None:
        nonlocal recorded
        recorded = not training or ended > flags.skip

    def iteration_ended() -> None:
        nonlocal ended
        ended += 1
        profiler.step()

    profiler = torch.profiler.profile(
        activities=activities,
        # The profiler's own start is slow: it warms up during the last iteration left out.
        schedule=torch.profiler.schedule(
            wait=max(flags.skip - 1, 0),
            warmup=min(flags.skip, 1),
            active=flags.iterations,
            repeat=1,
        )
        if training
        else None,
        on_trace_ready=stopped,
    )
    iteration_listeners.append(iteration_ended)
    profiler.start()
    try:
        run()
    finally:
        iteration_listeners.remove(iteration_ended)
        profiler.stop()
        if recorded:
            # Only now: writing takes longer than what was recorded, and the run times itself.
            profiler.export_chrome_trace(str(path))
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            rows = profiler.key_averages()
            print(rows.table(sort_by=order, row_limit=ROWS, max_name_column_width=40))
            print(f"trace {path}: open it at https://ui.perfetto.dev or in chrome://tracing")
    if not recorded:
        raise RuntimeError(
            f"nothing was recorded: training ended after {ended} iterations, and the first "
            f"{flags.skip} are left out; train longer, or give --skip"
        )
