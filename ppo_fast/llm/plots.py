"""Pictures of a language model's training, drawn from the `metrics.csv` of its runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_fast.extras import require
from ppo_fast.logger import read_metrics
from ppo_fast.plots import COLORS, FAINT, INK, STYLE

Metrics = dict[str, list[float]]

PANELS = {
    "objective/scores": "mean score",
    "objective/kl": "KL(policy || reference), nats a response",
    "val/response_length": "tokens a response",
    "policy/entropy_avg": "entropy, nats a token",
    "policy/approxkl_avg": "KL(old || new), nats a token",
    "val/explained_variance": "1 − Var(return − value) / Var(return)",
}

COMPARED = {
    "objective/scores": ("reward-model score", "standard deviations before PPO"),
    "objective/scores/gold": ("gold reward", "what the responses are worth"),
    "objective/kl": ("KL to reference", "nats a response"),
    "policy/entropy_avg": ("entropy", "nats a token"),
}
PROXY, GOLD = COLORS[3], COLORS[4]
DASHED = (0, (4, 3))


def plot_run(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Draw score, KL and what training did against episodes; `learning_curve.png` by default.

    Raises:
        FileNotFoundError: the folder has no metrics.
        ValueError: they hold no update yet.
        ImportError: matplotlib is missing.
    """
    matplotlib = require("matplotlib", "train", "plotting")
    figures = require("matplotlib.figure", "train", "plotting")
    metrics = read_metrics(folder)
    shown = [name for name in PANELS if name in metrics and len(metrics[name])]
    if not shown:
        raise ValueError(f"{folder} has no update to draw yet")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(9.2, 2.6 * -(-len(shown) // 2)), layout="constrained")
        grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True).reshape(-1)
        for ax, name, color in zip(grid, shown, COLORS, strict=False):
            _draw(ax, metrics, name, color)
        for spare in grid[len(shown) :]:
            spare.remove()
        for ax in grid[max(0, len(shown) - 2) : len(shown)]:
            ax.set_xlabel("episodes")
            ax.tick_params(axis="x", labelbottom=True)
        out = Path(out or Path(folder) / "learning_curve.png")
        figure.savefig(out, dpi=160)
    return out


def plot_training(
    runs: Mapping[str, Path], out: str | os.PathLike[str], *, kl_target: float | None = None
) -> Path:
    """Draw score, gold reward, KL and entropy of runs against updates; gold where it is reported.

    Args:
        runs: run folders by label.
        out: the picture.
        kl_target: drawn as a dashed line.

    Raises:
        FileNotFoundError: a folder has no metrics.
        ImportError: matplotlib is missing.
    """
    metrics = {label: read_metrics(folder) for label, folder in runs.items()}
    shown = [name for name in COMPARED if any(name in of for of in metrics.values())]
    matplotlib = require("matplotlib", "train", "plotting")
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(-(-len(shown) // 2), 2, len(shown))
        for ax, name in zip(grid, shown, strict=True):
            title, unit = COMPARED[name]
            for color, (label, of) in zip(COLORS, metrics.items(), strict=False):
                if name in of:
                    updates = range(1, len(of[name]) + 1)
                    ax.plot(updates, of[name], color=color, linewidth=1.6, label=label)
            if name == "objective/kl" and kl_target is not None:
                ax.axhline(kl_target, color=INK, linewidth=0.9, linestyle=DASHED, label="target")
            ax.set_title(title, size=11)
            ax.set_title(unit, loc="right", color=FAINT, size=8, weight="normal")
            ax.set_xlabel("updates")
            ax.margins(x=0)
        _legend(grid[0])
        _legend(grid[shown.index("objective/kl")] if "objective/kl" in shown else None)
        return _saved(figure, out)


def plot_overoptimization(
    runs: Mapping[str, Path], start: Mapping[str, float], out: str | os.PathLike[str]
) -> Path:
    """Draw what the reward model says and what is true against sqrt(KL), as Gao et al. 2022 do.

    Both as the improvement over the start in standard deviations of the start's responses. Faint
    dots are rollouts, lines evaluations on held-out prompts (figure 1 of arXiv:2210.10760).

    Args:
        runs: run folders by label, a panel each.
        start: `score`, `score_std` and optionally `gold`, `gold_std` before training.
        out: the picture.

    Raises:
        FileNotFoundError: a folder has no metrics.
        ImportError: matplotlib is missing.
    """
    lines = {"score": ("reward_model", "reward model (proxy)", PROXY)}
    if "gold" in start:
        lines["gold"] = ("gold", "gold reward", GOLD)
    matplotlib = require("matplotlib", "train", "plotting")
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(1, len(runs), len(runs), sharey=True)
        for ax, (label, folder) in zip(grid, runs.items(), strict=True):
            metrics = read_metrics(folder)
            for name, (part, title, color) in lines.items():
                scale = start[f"{name}_std"] or 1.0
                dots = _against_kl(metrics, "objective", part)
                held = [(0.0, start[name]), *_against_kl(metrics, "eval", part)]
                for points, style in (
                    (dots, {"marker": ".", "linestyle": "", "alpha": 0.3, "markersize": 5}),
                    (held, {"marker": "o", "markersize": 3, "label": title}),
                ):
                    ax.plot(
                        [x for x, _ in points],
                        [(y - start[name]) / scale for _, y in points],
                        color=color,
                        **style,
                    )
            ax.axhline(0, color=FAINT, linewidth=0.8)
            ax.set_title(label, size=11)
            ax.set_xlabel("sqrt of KL(policy || reference), nats a response")
            ax.set_xlim(left=0)
        grid[0].set_ylabel("improvement, standard deviations")
        _legend(grid[-1])
        return _saved(figure, out)


def _against_kl(metrics: Metrics, stage: str, part: str) -> list[tuple[float, float]]:
    """`(sqrt(KL), mean score)` of a stage's rows, in the order of training."""
    name = f"{stage}/scores/{part}" if f"{stage}/scores/{part}" in metrics else f"{stage}/scores"
    if name not in metrics or f"{stage}/kl" not in metrics:
        return []
    # An estimate from samples may fall below 0, a KL cannot.
    pairs = zip(metrics[f"{stage}/kl"], metrics[name], strict=True)
    return [(math.sqrt(max(kl, 0.0)), score) for kl, score in pairs if math.isfinite(kl + score)]


def _grid(rows: int, columns: int, used: int, *, sharey: bool = False) -> tuple[Any, list[Any]]:
    figures = require("matplotlib.figure", "train", "plotting")
    size = (4.8 * columns, 3.2 * rows if rows > 1 else 3.8)
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).reshape(-1))
    for spare in axes[used:]:
        spare.remove()
    return figure, axes[:used]


def _legend(ax: Any) -> None:
    if ax is not None:
        ax.legend(frameon=False, fontsize=9, loc="best")


def _saved(figure: Any, out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.savefig(path, dpi=160)
    return path


def _draw(ax: Any, metrics: dict[str, list[float]], name: str, color: str) -> None:
    ax.plot(metrics["step"], metrics[name], color=color, linewidth=1.4)
    ax.set_title(name, size=10)
    ax.set_title(PANELS[name], loc="right", color=FAINT, size=8, weight="normal")
    ax.margins(x=0)
