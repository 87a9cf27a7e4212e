"""PPO for language models by phase, against TRL 1.10's algorithm: `bench_llm.py --case all --json`.

Every arm of every round is a process of its own, pinned to one processor with one thread; arms take
turns, their order rotated, and round i has seed i for all. Models, prompts and hyper-parameters are
the same. Each arm samples its own responses; scoring and the update are timed on responses that all
share. A process takes one update to warm up, then `--updates` that are timed, then one whose memory
is watched. Figures, by phase:

- sample: response tokens a second, EOS included;
- score: log-probs of policy and reference, values, rewards and advantages of the shared responses;
- update: all epochs over them; tokens a second are those of the rollout, however many the epochs;
- peak memory beyond that of the four loaded models, so gradients and Adam's moments count;
- garbage: what TRL spends in `gc.collect()`, in no phase but in the whole.

A case on a GPU is skipped without one; `--device cuda` runs any case there. All cases of a CPU take 20
minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llm_arm
import torch
from harness import print_table, write_results
from llm_cases import ARMS, CASES, OURS, Arm, Case

import ppo_fast

HERE = Path(__file__).resolve().parent
TIMEOUT = 900.0
WORK = ("sample", "score", "update")
"""Phases in which tokens are counted."""

Seen = dict[str, Any]
"""What `llm_arm.run` returned."""


def processors() -> list[int] | None:
    """The processor that an arm is pinned to; None where it cannot be."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    # Interrupts tend to go to the first.
    return sorted(os.sched_getaffinity(0))[-1:]


def job_of(case: Case, arm: Arm, seed: int, updates: int) -> dict[str, Any]:
    on_gpu = case.device.startswith("cuda")
    return {
        "case": case._asdict(),
        "module": arm.module,
        "options": arm.options,
        "seed": seed,
        "updates": updates,
        "threads": 1,
        "processors": None if on_gpu else processors(),
    }


def launch(job: dict[str, Any]) -> Seen | str:
    """Run an arm in a new process; return what it saw, or in words how it failed."""
    source = str(Path(ppo_fast.__file__).parent.parent)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(job["threads"]),
        "MKL_NUM_THREADS": str(job["threads"]),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "llm_arm.py"), json.dumps(job)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took longer than {TIMEOUT:.0f} s"
        raise
    lines = [line for line in out.splitlines() if line.startswith(llm_arm.MARK)]
    if process.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(llm_arm.MARK))
    last = err.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    return last[0]


def measure(
    case: Case, rounds: int, updates: int, keys: Sequence[str]
) -> tuple[dict[str, list[Seen]], dict[str, str]]:
    """Run the arms in turns; return what each round saw, and why arms are missing."""
    found: dict[str, list[Seen]] = {key: [] for key in keys}
    missing: dict[str, str] = {}
    for number in range(rounds):
        shift = number % len(keys)
        for key in [*keys[shift:], *keys[:shift]]:
            if key in missing:
                continue
            seen = launch(job_of(case, ARMS[key], number + 1, updates))
            head = f"round {number + 1} of {rounds}: {ARMS[key].name:30}"
            if isinstance(seen, str):
                missing[key] = f"failed: {seen}"
                print(f"{head} {missing[key]}", flush=True)
                continue
            found[key].append(seen)
            told = ", ".join(
                f"{phase} {statistics.median(seen['seconds'][phase]):.3f} s" for phase in WORK
            )
            print(f"{head} {told}", flush=True)
    return {key: seen for key, seen in found.items() if key not in missing}, missing


def token_seconds(seen: Seen, phase: str, clock: str = "seconds") -> float:
    """Median over updates of seconds a response token; of "whole", all phases and the garbage.

    The whole is told by the tokens sampled and the shared ones alike: each phase by its own, garbage
    by the shared.
    """
    if phase == "whole":
        return sum(token_seconds(seen, part, clock) for part in llm_arm.PHASES)
    tokens = seen["sampled_tokens" if phase == "sample" else "fixed_tokens"]
    return statistics.median(
        spent / count for spent, count in zip(seen[clock][phase], tokens, strict=True)
    )


def beyond_models(seen: Seen, phase: str) -> float | None:
    """Peak memory of a phase in MB beyond the loaded models."""
    peak = seen["peak_mb"].get(phase)
    return None if peak is None else peak - seen["loaded_mb"]


def summarise(name: str, case: Case, found: dict[str, list[Seen]]) -> list[dict[str, Any]]:
    """One row an arm and phase; `ours_times` says how many times as fast as the arm ours is."""
    ours = found.get(case.arms[0])
    rows = []
    for key, rounds in found.items():
        for phase in (*WORK, "whole"):
            samples = [token_seconds(seen, phase) for seen in rounds]
            row: dict[str, Any] = {
                "case": name,
                "arm": ARMS[key].name,
                "phase": phase,
                "tokens_per_s": 1 / statistics.median(samples),
                "tokens_per_s_by_round": [1 / sample for sample in samples],
            }
            if phase in WORK:
                row["seconds"] = statistics.median(
                    second for seen in rounds for second in seen["seconds"][phase]
                )
                row["seconds_by_round"] = [seen["seconds"][phase] for seen in rounds]
                peaks = [beyond_models(seen, phase) for seen in rounds]
                row["peak_mb"] = statistics.median(peaks) if None not in peaks else None
                row["peak_mb_by_round"] = peaks
            else:
                row["garbage_seconds"] = statistics.median(
                    second for seen in rounds for second in seen["seconds"]["garbage"]
                )
                peaks = [
                    max((beyond_models(seen, part) or 0.0) for part in WORK) for seen in rounds
                ]
                row["peak_mb"] = statistics.median(peaks) or None
                row["peak_mb_by_round"] = peaks
                row["loaded_mb"] = statistics.median(seen["loaded_mb"] or 0.0 for seen in rounds)
            if ours is not None:
                ratios = {
                    clock: [
                        token_seconds(b, phase, clock) / token_seconds(a, phase, clock)
                        for a, b in zip(ours, rounds, strict=True)
                    ]
                    for clock in ("seconds", "cpu_seconds")
                }
                row["ours_times"] = statistics.median(ratios["seconds"])
                row["ours_times_by_round"] = ratios["seconds"]
                row["ours_times_cpu_time"] = statistics.median(ratios["cpu_seconds"])
            rows.append(row)
    if ours is not None:
        set_against_ours(rows)
    return rows


def set_against_ours(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row how many times ours' memory the arm takes."""
    mine = {row["phase"]: row["peak_mb"] for row in rows if row["arm"] == OURS}
    for row in rows:
        own = mine.get(row["phase"])
        both = own is not None and row["peak_mb"] is not None
        row["memory_times"] = row["peak_mb"] / own if both and own > 0 else None


def print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    cells = [
        {
            "phase": row["phase"],
            "arm": row["arm"],
            "tokens/s": row["tokens_per_s"],
            "min": min(row["tokens_per_s_by_round"]),
            "max": max(row["tokens_per_s_by_round"]),
            "seconds": row.get("seconds"),
            "garbage s": row.get("garbage_seconds"),
            "ours is, times": row.get("ours_times"),
            "in CPU time": row.get("ours_times_cpu_time"),
            "peak MB": row["peak_mb"],
            "times ours": row.get("memory_times"),
        }
        for phase in (*WORK, "whole")
        for row in rows
        if row["phase"] == phase
    ]
    print_table(cells, title)


def run_case(
    name: str, case: Case, rounds: int, updates: int, keys: Sequence[str], write: bool
) -> None:
    found, missing = measure(case, rounds, updates, keys)
    rows = summarise(name, case, found)
    if rows:
        print_rows(rows, case.label)
    if write:
        reasons = {ARMS[key].name: reason for key, reason in missing.items()}
        more = {"title": case.label, "rounds": rounds, "updates": updates, "missing": reasons}
        described = {**case._asdict(), "arms": list(found)}
        print(f"\nwrote {write_results(f'llm_{name}', rows, definition=described, **more)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, "all"], default=["small"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3, help="timed updates of a process")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), help="arms to run")
    parser.add_argument("--device", help="in place of the case's own")
    parser.add_argument("--batch", type=int, help="prompts an update")
    parser.add_argument("--json", action="store_true", help="write JSON under results/")
    arguments = parser.parse_args(argv)
    for name in CASES if "all" in arguments.case else arguments.case:
        case = CASES[name]
        case = case._replace(
            device=arguments.device or case.device, batch=arguments.batch or case.batch
        )
        print(f"\n== {name}", flush=True)
        if case.device.startswith("cuda") and not torch.cuda.is_available():
            print(f"{name}: not run: needs a GPU", flush=True)
            continue
        keys = [key for key in case.arms if not arguments.only or key in arguments.only]
        started = time.perf_counter()
        run_case(name, case, arguments.rounds, arguments.updates, keys, arguments.json)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
