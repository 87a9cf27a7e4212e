"""Learning curves of one or many runs, drawn from their `metrics.csv` into one picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_fast.extras import require
from ppo_fast.logger import read_metrics

INK, FAINT, GRID = "#22303c", "#7b8794", "#e4e8ec"
COLORS = ("#2f6fb0", "#d1603d", "#3d8f6d", "#8a5fa8", "#b58a1b", "#5b6770")

STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

DIAGNOSTICS = {
    "approx_kl": "KL(old || new), nats",
    "clip_fraction": "share of ratios outside the clip range",
    "explained_variance": "1 − Var(return − value) / Var(return)",
}

Curve = tuple[np.ndarray, np.ndarray]
Run = dict[str, Any]


def plot_learning_curves(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    metric: str = "rollout/ep_rew_mean",
    ylabel: str = "mean episode return",
) -> Path:
    """Draw a metric against environment steps, one panel an environment, and save it at `out`.

    Runs of one environment (`env_id` in their config.json) are drawn as the median of the seeds in
    a band from the lowest to the highest, over the steps that all of them have, each run as a thin
    line behind it. A single run also gets its approx_kl, clip_fraction and explained_variance. A
    `stop_return` common to the runs of a panel becomes a dashed line.

    Args:
        folders: run folders, each with a `metrics.csv`; `config.json` may be missing.
        out: the picture; its ending (.png, .svg, .pdf) chooses the format.
        metric: the column to draw.
        ylabel: what that column is, with its unit.

    Raises:
        ValueError: no folder, no such column, no finite value in it, or a config.json that is not
            JSON.
        FileNotFoundError: a folder without `metrics.csv`.
        ImportError: matplotlib is missing.
    """
    if not folders:
        raise ValueError("plot_learning_curves: folders is empty; give at least one run folder")
    matplotlib = require("matplotlib", "train", "plotting")
    ticker = require("matplotlib.ticker", "train", "plotting")
    runs = [_read_run(Path(folder), metric) for folder in folders]
    panels: dict[str, list[Run]] = {}
    for run in runs:
        panels.setdefault(run["title"], []).append(run)

    with matplotlib.rc_context(STYLE):
        figure = _draw_run(runs[0], ylabel) if len(runs) == 1 else _draw_panels(panels, ylabel)
        for ax in figure.axes:
            ax.xaxis.set_major_formatter(ticker.FuncFormatter(_short))
            ax.margins(x=0)
            ax.set_xlim(left=0)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, hspace=0.03)
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
    return out


def _figure(width: float, height: float) -> Any:
    """Make a figure without pyplot: nothing global changes, and it draws with Agg always."""
    module = require("matplotlib.figure", "train", "plotting")
    return module.Figure(figsize=(width, height), layout="constrained")


def _draw_run(run: Run, ylabel: str) -> Any:
    """Draw one run: its returns large, what training did small below."""
    rows = [name for name in DIAGNOSTICS if _finite(run["metrics"], _column(run, name))]
    figure = _figure(7.2, 4.2 + 0.75 * len(rows))
    main, *rest = figure.subplots(
        1 + len(rows), 1, sharex=True, squeeze=False, height_ratios=[3.2] + [1] * len(rows)
    )[:, 0]
    _draw_returns(main, [run], COLORS[0])
    main.set_title(run["title"])
    main.set_ylabel(ylabel)
    for ax, name, color in zip(rest, rows, COLORS[1:], strict=False):
        _draw_diagnostic(ax, run, name, color)
    for ax in [main, *rest][:-1]:
        ax.tick_params(axis="x", length=0)
    [main, *rest][-1].set_xlabel("environment steps")
    return figure


def _draw_panels(panels: dict[str, list[Run]], ylabel: str) -> Any:
    """Draw one panel an environment, on a grid."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(*((7.2, 4.2) if columns == 1 else (4.6 * columns, 3.4 * rows)))
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for spare in grid[len(panels) :]:
        spare.remove()
    for index, (title, runs) in enumerate(panels.items()):
        _draw_returns(grid[index], runs, COLORS[index % len(COLORS)])
        grid[index].set_title(title)
        grid[index].set_xlabel("environment steps")
        if index % columns == 0:
            grid[index].set_ylabel(ylabel)
    return figure


def _read_run(folder: Path, metric: str) -> Run:
    metrics = read_metrics(folder)
    if metric not in metrics:
        raise ValueError(f"{folder} has no metric {metric!r}; it has {', '.join(metrics)}")
    if not _finite(metrics, metric):
        raise ValueError(
            f"{folder} has no finite value of {metric!r} yet; it is written once an episode ends"
        )
    config: dict[str, Any] = {}
    if (folder / "config.json").exists():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    return {
        "metrics": metrics,
        "curve": _curve(metrics, metric),
        "title": config.get("env_id") or folder.resolve().name,
        "stop_return": config.get("stop_return"),
    }


def _curve(metrics: dict[str, list[float]], key: str) -> Curve:
    steps, values = np.array(metrics["step"]), np.array(metrics[key])
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _finite(metrics: dict[str, list[float]], key: str | None) -> bool:
    return key is not None and any(map(math.isfinite, metrics[key]))


def _column(run: Run, name: str) -> str | None:
    """Find the column of a metric whatever prefix it is logged under (`train/approx_kl`)."""
    return next((key for key in run["metrics"] if key.rpartition("/")[2] == name), None)


def _band(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Resample curves to the steps all of them span: `(steps [K], values [runs, K])`."""
    start = max(steps[0] for steps, _ in curves)
    stop = min(steps[-1] for steps, _ in curves)
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[(grid >= start) & (grid <= stop)]
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in curves])


def _draw_returns(ax: Any, runs: list[Run], color: str) -> None:
    curves = [run["curve"] for run in runs]
    if len(curves) == 1:
        ax.plot(*curves[0], color=color)
        _label_end(ax, curves[0], color)
    else:
        for steps, values in curves:
            ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        grid, values = _band(curves)
        if grid.size:
            ax.fill_between(
                grid, values.min(0), values.max(0), color=color, alpha=0.16, linewidth=0
            )
            median = np.median(values, axis=0)
            ax.plot(grid, median, color=color)
            _label_end(ax, (grid, median), color)
        note = f"median and range of {len(curves)} seeds"
        ax.set_title(note, loc="right", color=FAINT, size=9, weight="normal")
    goals = {run["stop_return"] for run in runs}
    goal = goals.pop() if len(goals) == 1 else None
    if goal is not None:
        ax.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            _signed(f"goal {goal:g}"),
            (0, goal),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            color=INK,
            size=9,
        )


def _draw_diagnostic(ax: Any, run: Run, name: str, color: str) -> None:
    key = _column(run, name)
    assert key is not None
    ax.plot(*_curve(run["metrics"], key), color=color, linewidth=1.2)
    ax.set_title(name, size=9, color=INK, weight="normal", pad=4)
    ax.set_title(DIAGNOSTICS[name], loc="right", color=FAINT, size=8, weight="normal", pad=4)
    ax.locator_params(axis="y", nbins=3)


def _label_end(ax: Any, curve: Curve, color: str) -> None:
    """Write the last value beside the end of the line: the number readers look for."""
    steps, values = curve
    ax.plot(steps[-1:], values[-1:], "o", color=color, markersize=4, clip_on=False)
    ax.annotate(
        _signed(f"{values[-1]:.4g}"),
        (steps[-1], values[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=color,
        weight="bold",
        annotation_clip=False,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _signed(text: str) -> str:
    """Use the minus sign of the axis labels."""
    return text.replace("-", "\N{MINUS SIGN}")


def _short(value: float, _position: int = 0) -> str:
    """Write 20000 as 20k and 1500000 as 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
