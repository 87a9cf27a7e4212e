"""Write the README's speed tables from the newest result files: `python report.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import harness

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = {
    "stable-baselines3": "SB3",
    "torchrl generalized_advantage_estimate": "torchrl",
    "torchrl vec_generalized_advantage_estimate": "torchrl vectorised",
    "log_softmax": "log_softmax",
    "trl, verl": "TRL, verl",
    "trl": "TRL",
    "verl": "verl",
    "cross_entropy": "cross_entropy",
}


def newest(name: str) -> dict[str, Any] | None:
    """Return the latest result file of a benchmark, or None."""
    files = sorted(harness.RESULTS.glob(f"{name}-*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def source(record: dict[str, Any]) -> str:
    machine = record["machine"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['cpu_count']} cores"
    return f"{on}; torch {machine['torch']}; {machine['date']}, commit {machine['commit']}"


def control(record: dict[str, Any]) -> list[str]:
    lines = [
        "CartPole-v1, CleanRL's recipe (8 environments x 128 steps, 4 epochs, 4 minibatches, 64 x 64), "
        "one thread, whole trainings in turns in one process:",
        "",
        "| | steps a second, median (range) | times SB3 | return, last 100 episodes |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        returned = row["return_median"]
        lines.append(
            f"| {row['arm']} | {row['sps_median']:,.0f} ({row['sps_min']:,.0f} to {row['sps_max']:,.0f}) "
            f"| {row['times_sb3']:.2f} | {returned:.0f} |"
        )
    return [*lines, "", f"`benchmarks/bench_control.py`; {source(record)}.", ""]


def op(record: dict[str, Any], ours: str, group: tuple[str, ...]) -> list[str]:
    """One line a problem: our time, and how many times longer each peer takes."""
    column = f"times {ours}"
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault(", ".join(str(row[key]) for key in group), {})[row["case"]] = row
    peers = [peer for peer in PEERS if any(peer in cases for cases in groups.values())]
    lines = [
        f"| `{ours}` | microseconds | " + " | ".join(f"{PEERS[p]}, times" for p in peers) + " |",
        "|---" * (2 + len(peers)) + "|",
    ]
    for label, cases in groups.items():
        cells = [f"{cases[p][column]:.1f}" if p in cases else "-" for p in peers]
        lines.append(f"| {label} | {cases[ours]['median_us']:,.0f} | " + " | ".join(cells) + " |")
    return [*lines, "", f"CPU, one thread; {source(record)}.", ""]


def report() -> str:
    """Return the section's text; what no file shows is said to be unmeasured."""
    lines: list[str] = []
    if (record := newest("control")) is not None:
        lines += control(record)
    if (record := newest("gae")) is not None:
        lines += op(record, "gae", ("shape",))
    if (record := newest("log_probs")) is not None:
        lines += op(record, "log_probs_from_logits", ("shape", "output", "pass"))
    return "\n".join([*lines, "On a GPU: not yet measured."])


def main() -> None:
    page = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    README.write_text(
        pattern.sub(lambda _: f"{BEGIN}\n{report()}\n{END}", page, count=1), encoding="utf-8"
    )
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
