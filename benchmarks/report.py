"""Write the README's speed tables from the newest result files: `python report.py`.

`ppo-fast bench report` is the same. The kernels' file also gives two pictures, docs/roofline.png and
docs/speedup.png. What no file of a GPU shows is said to be not measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
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


OURS = "ppo_fast"
Rows = list[dict[str, Any]]


def timed(rows: Rows) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """(op, case, pass) -> arm -> row, where our kernel was timed; arms that were timed too."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "timed" and "median_us" in row:
            found.setdefault((row["op"], row["case"], row["pass"]), {})[row["arm"]] = row
    return {key: arms for key, arms in found.items() if OURS in arms}


def on_gpu() -> dict[str, Any] | None:
    """The newest result file of the kernels on a GPU."""
    record = newest("kernels")
    if record is None or not record["machine"]["gpu"] or record.get("interpreted"):
        return None
    return record


def peers_of(arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Times our time, by peer."""
    others = {
        name: row for name, row in arms.items() if name not in (OURS, "eager", "torch.compile")
    }
    return {name: row[f"times {OURS}"] for name, row in others.items()}


def kernels(record: dict[str, Any]) -> list[str]:
    """One line a problem: our time, our share of the ceiling, times the others take."""
    lines = [
        "| op | problem | microseconds | of the ceiling | eager, times | torch.compile, times "
        "| fastest peer, times |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op_name, case, passes), arms in timed(record["rows"]).items():
        ours = arms[OURS]
        share = max(ours["copy_fraction"], ours["matrix_fraction"])
        times = [
            f"{arms[arm][f'times {OURS}']:.1f}" if arm in arms else "-"
            for arm in ("eager", "torch.compile")
        ]
        peers = peers_of(arms)
        best = min(peers, key=peers.__getitem__, default=None)
        times.append("-" if best is None else f"{best} {peers[best]:.1f}")
        lines.append(
            f"| `{op_name}` | {case}, {passes} | {ours['median_us']:,.1f} | {share:.0%} | "
            + " | ".join(times)
            + " |"
        )
    limits = record["ceilings"]
    said = [
        f"Device time, median; buffers rotated beyond the L2 cache. Ceilings measured in the same run: "
        f"copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product "
        f"{limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s.",
    ]
    wrong = [r for r in record["rows"] if r["arm"] == OURS and r["status"].startswith("wrong")]
    if wrong:
        said.append("Wrong, and not timed: " + "; ".join(f"`{r['op']}` {r['case']}" for r in wrong))
    if record.get("not_run"):
        said.append(f"Not run for lack of time: {len(record['not_run'])} problems.")
    return [*lines, "", " ".join(said), f"`benchmarks/bench_kernels.py`; {source(record)}.", ""]


def pictures(record: dict[str, Any]) -> list[Path]:
    """Draw the roofline and the speed-ups."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ppo_fast.plots import COLORS, FAINT, INK

    problems = dict(sorted(timed(record["rows"]).items(), key=lambda item: item[0][0]))
    limits = record["ceilings"]
    copy, matrix = limits["copy_bytes_per_s"], limits["matmul_flops_per_s"]
    DOCS.mkdir(exist_ok=True)

    figure = Figure((8, 5), layout="constrained")
    axes = figure.add_subplot()
    knee = matrix / copy
    intensities = [arms[OURS]["flops"] / arms[OURS]["bytes"] for arms in problems.values()]
    reach = [min([0.1, *intensities]) / 2, knee, 2 * max([knee, *intensities])]
    axes.plot(reach, [min(copy * x, matrix) / 1e12 for x in reach], color=INK)
    names = sorted({op_name for op_name, _, _ in problems})
    for number, name in enumerate(names):
        rows = [arms[OURS] for (op_name, _, _), arms in problems.items() if op_name == name]
        axes.plot(
            [row["flops"] / row["bytes"] for row in rows],
            [row["flops"] / row["median_us"] / 1e6 for row in rows],
            linestyle="",
            color=COLORS[number % len(COLORS)],
            marker="os^Dv"[number // len(COLORS) % 5],
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.set_title(f"Roofline, {record['machine']['gpu']}", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)

    labels = [f"{op_name} {case}, {passes}" for op_name, case, passes in problems]
    bars = Figure((8, 1.5 + 0.32 * max(1, len(labels))), layout="constrained")
    axes = bars.add_subplot()
    axes.axvline(1, color=FAINT, linewidth=1)
    kinds = ("eager", "torch.compile", "fastest peer")
    for number, kind in enumerate(kinds):
        points = []
        for position, arms in enumerate(problems.values()):
            peers = peers_of(arms)
            if kind == "fastest peer" and peers:
                points.append((min(peers.values()), position))
            elif kind in arms:
                points.append((arms[kind][f"times {OURS}"], position))
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()),
            "o",
            color=COLORS[number],
            label=kind,
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time, as a multiple of ours")
    axes.set_title(f"Against the others, {record['machine']['gpu']}", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, axis="x")

    paths = []
    for drawn, file in ((figure, "roofline.png"), (bars, "speedup.png")):
        FigureCanvasAgg(drawn).print_figure(DOCS / file, dpi=130)
        paths.append(DOCS / file)
    return paths


def machine_code(record: dict[str, Any]) -> list[str]:
    """Instructions an element, ours beside the peers' kernels."""
    lines = [
        "What the kernels compile to for sm_90, beside the peers' kernels compiled by the same Triton "
        f"({record['machine']['triton']}): instructions a lane issues for each element, loads, stores and "
        "addresses included. No time, but what a kernel has to issue; on an H200 a bf16 element read from "
        "memory leaves room for 13.8.",
        "",
        "| | kernel | instructions an element | |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        number = row.get("instructions an element")
        if number is not None:
            cells = row["task"], row["kernel"], f"{number:,.1f}", row["note"]
            lines.append("| " + " | ".join(cells) + " |")
    machine = record["machine"]
    file = f"`benchmarks/aot_peers.py`; {machine['date']}, commit {machine['commit']}"
    return [*lines, "", f"{file}; every configuration: [docs/kernels.md](docs/kernels.md).", ""]


def report() -> str:
    """Return the section's text; what no file shows is said to be unmeasured."""
    lines: list[str] = []
    if (record := newest("control")) is not None:
        lines += control(record)
    if (record := newest("gae")) is not None:
        lines += op(record, "gae", ("shape",))
    if (record := newest("log_probs")) is not None:
        lines += op(record, "log_probs_from_logits", ("shape", "output", "pass"))
    if (record := newest("aot")) is not None:
        lines += machine_code(record)
    if (record := on_gpu()) is None:
        return "\n".join([*lines, "On a GPU: not yet measured."])
    lines += kernels(record)
    for picture in pictures(record):
        lines.append(f"![{picture.stem}]({picture.relative_to(DOCS.parent)})")
    return "\n".join(lines)


def main() -> None:
    page = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    README.write_text(
        pattern.sub(lambda _: f"{BEGIN}\n{report()}\n{END}", page, count=1), encoding="utf-8"
    )
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
