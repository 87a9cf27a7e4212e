"""Write the README's speed tables from the newest result files: `python report.py`.

`ppo-fast bench report` is the same. The kernels' file also gives two pictures, docs/roofline.png and
docs/speedup.png. What no file of a GPU shows is said to be not measured.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
OURS = "ppo_fast"
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


TRAINING = {
    "cartpole": "CartPole-v1, 8 environments x 128 steps, 4 epochs, 4 minibatches, 64 x 64",
    "cartpole-tensor": "the same with 1024 environments",
    "pendulum": "Pendulum-v1, CleanRL's continuous recipe",
    "halfcheetah": "HalfCheetah-v5, CleanRL's continuous recipe",
    "pendulum-tensor": "Pendulum-v1, 1024 environments x 32 steps, 5 epochs, 16 minibatches, 64 x 64",
    "pong": "Pong, 8 environments x 128 steps, NatureCNN",
}
"""Cases of bench_control.py whose arms share a recipe, in words."""

CAVEATS = {
    "CleanRL-style": "The CleanRL-style loop is ours, after CleanRL's scripts.",
    "jitted JAX loop": "The JAX loop is ours, after purejaxrl; in blocks: minibatches in pieces of "
    "1024 rows.",
    "SBX": "SBX has no value clip, clips the gradients of actor and critic apart and starts from other "
    "weights.",
    "rsl_rl": "rsl_rl bootstraps truncated episodes from the last state but one.",
}
"""What to know about an arm, by the beginning of its name."""


def shown(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def training(records: dict[str, dict[str, Any]]) -> list[str]:
    """One line an arm of the cases that share a recipe."""
    lines = [
        "Whole trainings in turns, each in a process of its own on one core with one thread; all arms of a "
        "case have the same recipe, environments and seeds. Steps a second are counted after the first "
        "iteration, in brackets from slowest to fastest round; with start-up: from compiling on, the first "
        "iteration included. Times: how many times as fast ours is, median over rounds, in brackets by "
        "processor time.",
        "",
        "| | steps a second | with start-up | times | return, last 100 episodes, over seeds |",
        "|---|---|---|---|---|",
    ]
    notes, sources = [], []
    for case, label in TRAINING.items():
        if (record := records.get(case)) is None:
            continue
        lines.append(f"| **{label}** | | | | |")
        for row in record["rows"]:
            times = "-"
            if row.get("ours_times") is not None:
                times = f"{row['ours_times']:.2f} ({row['ours_times_cpu_time']:.2f})"
            returned = spread(row["returns"]) if row["returns"] else "-"
            if row["steps"] < 0.9 * max(other["steps"] for other in record["rows"]):
                returned += f", after {row['steps']:,} steps"
            cells = (
                row["arm"],
                spread(row["sps"]),
                shown(row["sps_compile_counted"]),
                times,
                returned,
            )
            lines.append("| " + " | ".join(cells) + " |")
        notes += [f"{case}: {arm} {reason}." for arm, reason in record.get("missing", {}).items()]
        if (share := record.get("convolution_share")) is not None:
            notes.append(f"In Pong the convolutions alone take {share:.0%} of our time.")
        sources.append(source(record))
    arms = {row["arm"] for case in TRAINING if case in records for row in records[case]["rows"]}
    notes += [said for name, said in CAVEATS.items() if any(arm.startswith(name) for arm in arms)]
    return [*lines, "", *closing("bench_control.py", notes, sources)]


def closing(script: str, notes: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Notes, then where the figures come from, each source once."""
    said = "; ".join(dict.fromkeys(sources))
    return [" ".join([*notes, f"`benchmarks/{script}`; {said}."]), ""]


def solved(record: dict[str, Any]) -> list[str]:
    """Seconds from process start to solved."""
    lines = [
        "From the start of the process, imports and compiling included, until the mean of the last 100 "
        "training episodes of CartPole-v1 is 475; each arm by its own best recipe, on all cores:",
        "",
        "| | seconds, median (range) | solved | environment steps | imports, s | compiling, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        runs = len(row["sps"])
        cells = (
            row["arm"],
            spread(row["solved_seconds_by_round"], ".1f")
            if row["solved_seconds_by_round"]
            else "-",
            f"{row['threshold_reached']} of {runs}",
            shown(row["threshold_steps"]),
            shown(row["import_seconds"], ".1f"),
            shown(row["compile_seconds"], ".1f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{arm} {reason}." for arm, reason in record.get("missing", {}).items()]
    return [*lines, "", *closing("bench_control.py", notes, [source(record)])]


ABLATED = {"ablations": "CartPole-v1", "ablations-host": "HalfCheetah-v5"}


def ablations(record: dict[str, Any]) -> list[str]:
    """What each optimisation is worth."""
    lines = [
        f"What each part is worth: {ABLATED[record['rows'][0]['case']]} as above, with one thing off.",
        "",
        "| | steps a second, median (range) | times slower (in processor time) |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        times = f"{row['ours_times']:.2f} ({row['ours_times_cpu_time']:.2f})"
        lines.append(f"| {row['arm']} | {spread(row['sps'])} | {times} |")
    notes = [f"{arm} {reason}." for arm, reason in record.get("missing", {}).items()]
    return [*lines, "", *closing("bench_control.py", notes, [source(record)])]


def update_phase(record: dict[str, Any]) -> list[str]:
    """A minibatch of the update phase alone."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault(row["problem"], {})[row["case"]] = row
    arms = list(dict.fromkeys(row["case"] for row in record["rows"]))
    others = [arm for arm in arms if arm != OURS]
    lines = [
        "| update phase alone, a minibatch | microseconds | "
        + " | ".join(f"{arm}, times" for arm in others)
        + " |",
        "|---" * (2 + len(others)) + "|",
    ]
    for problem, rows in groups.items():
        cells = [f"{rows[arm][f'times {OURS}']:.2f}" for arm in others]
        lines.append(f"| {problem} | {rows[OURS]['median_us']:,.0f} | " + " | ".join(cells) + " |")
    return [*lines, "", *closing("bench_control.py", [], [source(record)])]


def control() -> list[str]:
    """All that the result files of bench_control.py show."""
    names = [*TRAINING, "solved", "ablations", "ablations-host", "update"]
    files = {name: newest(f"control_{name.replace('-', '_')}") for name in names}
    records = {name: record for name, record in files.items() if record is not None}
    lines: list[str] = []
    if any(name in records for name in TRAINING):
        lines += training(records)
    sections = {
        "solved": solved,
        "ablations": ablations,
        "ablations-host": ablations,
        "update": update_phase,
    }
    for name, section in sections.items():
        if name in records:
            lines += section(records[name])
    return lines


LANGUAGE = ("full", "small", "v50k", "qwen")
"""Cases of bench_llm.py."""

SAID_OF_PHASES = {"sample": "sample", "score": "score", "update": "update", "whole": "together"}


def language(records: Sequence[dict[str, Any]]) -> list[str]:
    """Speed and memory by phase, a line an arm, a block a case."""
    lines = [
        "PPO for language models by phase, in turns, each arm in a process of its own on one core with one "
        "thread; models, prompts and hyper-parameters are the same, and scoring and update see the same "
        "responses. In brackets: how many times as fast ours is, median over rounds; together: with "
        "the garbage collection that TRL asks for. Memory: the peak beyond the four loaded models, and in "
        "brackets how many times ours.",
        "",
        "| | " + " | ".join(f"{said}, tokens/s" for said in SAID_OF_PHASES.values()) + " | "
        "sample, MB | score, MB | update, MB |",
        "|---" * (1 + len(SAID_OF_PHASES) + 3) + "|",
    ]
    notes, sources = [], []
    for record in records:
        lines.append(f"| **{record['title']}** |" + " |" * (len(SAID_OF_PHASES) + 3))
        arms: dict[str, dict[str, dict[str, Any]]] = {}
        for row in record["rows"]:
            arms.setdefault(row["arm"], {})[row["phase"]] = row
        for arm, phases in arms.items():
            speeds = [
                with_times(phases[name]["tokens_per_s"], arm, phases[name].get("ours_times"))
                for name in SAID_OF_PHASES
            ]
            memory = [
                with_times(phases[name]["peak_mb"], arm, phases[name].get("memory_times"))
                for name in ("sample", "score", "update")
            ]
            lines.append("| " + " | ".join([arm, *speeds, *memory]) + " |")
        notes += [f"{arm} {reason}." for arm, reason in record.get("missing", {}).items()]
        sources.append(source(record))
    notes.insert(0, "The TRL-1.10-style loop is ours: TRL has no PPO since September 2026.")
    return [*lines, "", *closing("bench_llm.py", notes, sources)]


def with_times(value: float | None, arm: str, times: float | None) -> str:
    """A figure, and of arms that are not ours how it stands to ours."""
    beside = "" if times is None or arm == OURS else f" ({times:.2f})"
    return shown(value) + beside


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


def hidden(record: dict[str, Any]) -> list[str]:
    """The `_from_hidden` ops beside whole logits: time and memory, a line a problem."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        label = ", ".join(str(row[key]) for key in ("shape", "output", "pass"))
        groups.setdefault(label, {})[row["case"]] = row
    peers = list(dict.fromkeys(case for cases in groups.values() for case in cases if case != OURS))
    lines = [
        "| from hidden states, rows x vocabulary x hidden | ms | peak, MiB | "
        + " | ".join(f"{peer}: times, peak" for peer in peers)
        + " |",
        "|---" * (3 + len(peers)) + "|",
    ]
    for label, cases in groups.items():
        own = cases[OURS]
        cells = [
            f"{1 / cases[p]['ours / this, median']:.2f}, {1 / cases[p]['ours / this, peak']:.1f}"
            if p in cases
            else "-"
            for p in peers
        ]
        speed = f"{own['median_us'] / 1000:,.0f} | {own['peak_mib']:,.0f}"
        lines.append(f"| {label} | {speed} | " + " | ".join(cells) + " |")
    note = "CPU, one thread; peak: beyond what the call is given, gradients included"
    return [*lines, "", f"{note}; {source(record)}.", ""]


LEARNER_OTHERS = {
    "ppo_fast fp16, eager": "no graph",
    "ppo_fast fp32, graph": "fp32",
    "autograd, graph": "autograd, graph",
    "torch.compile": "torch.compile",
    "eager loop, TF32": "eager loop, TF32",
    "eager loop": "eager loop",
}
"""Arms of bench_learner.py beside ours in fp16, and what the table calls them."""


def learner(record: dict[str, Any]) -> list[str]:
    """The learner step, a line a problem, and training on tensor CartPole."""
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["status"] != "timed":
            continue
        if row["case"] == "training":
            runs.setdefault(row["num_envs"], {})[row["arm"]] = row
        elif row["arm"] not in steps.setdefault(row["problem"], {}):
            # A problem may come twice; its first figures were taken beside most others.
            steps[row["problem"]][row["arm"]] = row
    ours = f"{OURS} fp16, graph"
    steps = {problem: arms for problem, arms in steps.items() if ours in arms}
    lines: list[str] = []
    if steps:
        lines += [
            "| learner step (rows, network) | milliseconds (range) | of the matrix rate | GPU busy "
            "| gradient error | elsewhere, ms | "
            + " | ".join(f"{name}, times" for name in LEARNER_OTHERS.values())
            + " |",
            "|---" * (6 + len(LEARNER_OTHERS)) + "|",
        ]
        for problem, arms in steps.items():
            mine = arms[ours]
            cells = [
                problem,
                f"{mine['median_ms']:.1f} ({mine['min_ms']:.1f} to {mine['max_ms']:.1f})",
                f"{mine['matrix_fraction']:.0%}",
                shown(mine.get("busy"), ".0%"),
                f"{mine['gradient_error']:.1e}",
                shown(mine["published_ms"], ".1f"),
                *(shown(arms.get(arm, {}).get("times ours"), ".1f") for arm in LEARNER_OTHERS),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        limits = record["ceilings"]
        lines += [
            "",
            "A whole update: every epoch's permutation, the loss, its gradient, clipping and Adam of "
            f"every minibatch. Matrix rate, measured in the same run: "
            f"{limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s; gradient error: of the first "
            "minibatch against float64 autograd; elsewhere: published, TF32 on an H100. The eager "
            "loop is ours, after CleanRL and rsl_rl.",
            "",
        ]
    if runs:
        arms_run = list(dict.fromkeys(arm for arms in runs.values() for arm in arms))
        lines += [
            "| training on tensor CartPole, environments | "
            + " | ".join(f"{arm}, steps a second | return" for arm in arms_run)
            + " |",
            "|---" * (1 + 2 * len(arms_run)) + "|",
        ]
        for number, arms in sorted(runs.items()):
            cells = [f"{number:,}"]
            for arm in arms_run:
                row = arms.get(arm, {})
                cells += [shown(row.get("sps_median")), shown(row.get("best_return"))]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "128 steps a rollout, 4 epochs, 4 minibatches, 64 x 64; the best return.", ""]
    notes = []
    if record.get("not_run"):
        notes.append(f"Not run for lack of time: {len(record['not_run'])} cases.")
    return [*lines, *closing("bench_learner.py", notes, [source(record)])] if lines else []


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
    lines = control()
    if models := [record for case in LANGUAGE if (record := newest(f"llm_{case}")) is not None]:
        lines += language(models)
    if (record := newest("gae")) is not None:
        lines += op(record, "gae", ("shape",))
    if (record := newest("log_probs")) is not None:
        lines += op(record, "log_probs_from_logits", ("shape", "output", "pass"))
    if (record := newest("linear_head")) is not None:
        lines += hidden(record)
    if (record := newest("aot")) is not None:
        lines += machine_code(record)
    if (record := newest("learner")) is not None and record["machine"]["gpu"]:
        lines += learner(record)
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
