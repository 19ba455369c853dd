"""The plots of a run's report: metrics and evaluations in, PNG files out. Nothing is shown on a screen.

A plot without data is left out. Raw values are thin and pale, a running mean is drawn over them.
Leaves out the page (grpo/report.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo.data_types import EvalReport

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
BLUE, ORANGE, GREEN, RED, PURPLE, TEAL = "#2563a8", "#d9822b", "#2f8f5b", "#c23b3b", "#7a53a8", "#1f8a94"
PHASES = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, "#8c6d4f", "#98a2ad")
_STYLE: Any = {
    "font.size": 10.5,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

Rows = Sequence[Mapping[str, Any]]


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a number under `name`."""
    points = [(int(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float) and "step" in row]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of up to `width` values around each one; the window narrows at both ends."""
    half = max(0, width // 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def evaluated_step(report: EvalReport) -> int | None:
    """The training step an evaluation belongs to, where it says so."""
    return int(report.extras["step"]) if "step" in report.extras else None


def write_plots(rows: Rows, reports: Sequence[EvalReport], folder: Path) -> list[tuple[str, Path]]:
    """Draw everything there is data for. Returns (caption, PNG) in reading order."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[tuple[str, str, Callable[[Axes, Rows, Sequence[EvalReport]], bool]]] = [
        ("reward", "Share of sampled answers that are correct and well formed", _reward),
        ("evaluation", "Held-out problems before and after, with 95 % intervals", _evaluation),
        ("length", "Tokens of a completion: mean, and the range within each step", _length),
        ("entropy", "Entropy of the sampled distribution, in nats a token", _entropy),
        ("divergence", "Distance to the reference (k3) and between sampler and learner", _divergence),
        ("time", "Seconds a step, by phase", _time),
    ]
    written = []
    for name, caption, draw in plots:
        with plt.rc_context(_STYLE):
            figure, axes = plt.subplots(figsize=(6.4, 3.7), layout="constrained")
            if draw(axes, rows, reports):
                written.append((caption, _save(figure, folder / f"{name}.png")))
            plt.close(figure)
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _line(axes: Axes, rows: Rows, name: str, label: str, colour: str) -> bool:
    steps, values = series(rows, name)
    if not steps:
        return False
    smooth = len(values) >= 12
    if smooth:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    shown = running_mean(values, max(3, len(values) // 12)) if smooth else values
    axes.plot(steps, shown, color=colour, linewidth=2.2, label=label, marker=None if len(values) > 2 else "o")
    return True


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, columns: int = 3) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.4, columnspacing=1.4)


def _reward(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith("rewards/") and name.endswith("/mean")]
    drawn = [_line(axes, rows, name, name.split("/")[1], colour) for name, colour in zip(sorted(names), PHASES)]
    if not drawn:
        drawn = [_line(axes, rows, "reward", "reward", BLUE)]
    points = [(step, report.metrics["pass@1"]) for report in reports if (step := evaluated_step(report)) is not None and "pass@1" in report.metrics]
    if points:
        values = [metric.value for _, metric in points]
        spread = [[metric.value - metric.low for _, metric in points], [metric.high - metric.value for _, metric in points]]
        axes.errorbar(
            [step for step, _ in points], values, yerr=spread, fmt="o", color=INK, markersize=5, capsize=3, linewidth=1.2, label="held-out pass@1"
        )
    _steps(axes)
    if all(0 <= value <= 1 for name in names for value in series(rows, name)[1]):
        axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("mean reward")
    axes.set_title("Rewards", pad=28)
    _legend(axes)
    return any(drawn) or bool(points)


def _evaluation(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    if not reports:
        return False
    shown = [reports[0], reports[-1]] if len(reports) > 1 else list(reports)
    names = [name for name in shown[-1].metrics if not name.startswith("avg@")]
    offsets, colours = ([0.14, -0.14], ["#98a2ad", BLUE]) if len(shown) > 1 else ([0.0], [BLUE])
    for report, offset, colour in zip(shown, offsets, colours):
        for row, name in enumerate(reversed(names)):
            metric = report.metrics.get(name)
            if metric is None:
                continue
            axes.plot([metric.low, metric.high], [row + offset] * 2, color=colour, linewidth=3, solid_capstyle="round", alpha=0.55)
            axes.plot(metric.value, row + offset, "o", color=colour, markersize=7)
            axes.annotate(
                f"{metric.value:.2f}", (metric.value, row + offset), xytext=(0, 6), textcoords="offset points", ha="center", color=INK, fontsize=9
            )
        axes.plot([], [], "o-", color=colour, label=_when(report))
    axes.set_yticks(range(len(names)), list(reversed(names)), color=INK)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(False, axis="y")
    axes.set_xlabel("share of problems")
    axes.set_title(f"Held-out accuracy ({shown[-1].num_problems} problems)", pad=28)
    _legend(axes)
    return True


def _when(report: EvalReport) -> str:
    step = evaluated_step(report)
    return report.checkpoint if step is None else ("before (step 0)" if step == 0 else f"after step {step}")


def _length(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    drawn = _line(axes, rows, "completions/mean_length", "mean", BLUE)
    low, high = series(rows, "completions/min_length"), series(rows, "completions/max_length")
    if drawn and low[0] and low[0] == high[0]:
        axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens")
    axes.set_title("Completion length")
    _steps(axes)
    return drawn


def _entropy(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    drawn = _line(axes, rows, "entropy", "entropy", PURPLE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per token")
    axes.set_title("Entropy")
    _steps(axes)
    return drawn


def _divergence(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    drawn = [
        _line(axes, rows, name, label, colour)
        for name, label, colour in (
            ("kl", "KL to the reference", ORANGE),
            ("mismatch/mean", "sampler vs learner, |Δ log p|", TEAL),
            ("mismatch/k3", "sampler vs learner, k3", GREEN),
        )
    ]
    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):  # type: ignore[union-attr]
        axes.set_yscale("log")
    axes.set_ylabel("nats per token")
    axes.set_title("Divergences", pad=44)
    _steps(axes)
    _legend(axes, columns=2)
    return any(drawn)


def _time(axes: Axes, rows: Rows, reports: Sequence[EvalReport]) -> bool:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith("time/")]
    timed = [row for row in rows if any(name in row for name in names) and ("reward" in row or "loss" in row)]
    names = [name for name in names if any(row.get(name) for row in timed)]
    if not names:
        return False
    steps = [int(row["step"]) for row in timed]
    names.sort(key=lambda name: -sum(float(row.get(name) or 0) for row in timed))
    base = [0.0] * len(steps)
    for name, colour in zip(names, PHASES):
        heights = [float(row.get(name) or 0) for row in timed]
        axes.bar(steps, heights, bottom=base, width=1.0, color=colour, label=name.removeprefix("time/"), linewidth=0)
        base = [below + height for below, height in zip(base, heights)]
    axes.set_ylabel("seconds")
    axes.set_title("Time per step", pad=28 if len(names) <= 4 else 44)
    _steps(axes)
    _legend(axes, columns=4)
    return True


def write_curves(reports: Sequence[EvalReport], path: Path, *, title: str = "") -> Path:
    """Maj@K (solid) and Pass@K (dashed) over K with 95 % bands over problems, one colour per checkpoint.

    After the analysis in DeepSeekMath (arXiv 2402.03300, Section 5.2.2). Take at least 2K samples for a point at K.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        shown: set[int] = set()
        for report, colour in zip(reports, [BLUE, ORANGE, GREEN, PURPLE, TEAL, RED] * (1 + len(reports) // 6)):
            for name, line in (("maj", "-"), ("pass", "--")):
                points = sorted(report.curves.get(name, {}).items())
                ks = [k for k, _ in points]
                shown.update(ks)
                label = f"{'Maj@K' if name == 'maj' else 'Pass@K'} {Path(report.checkpoint).name}".strip()
                axes.plot(ks, [metric.value for _, metric in points], line, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)
                axes.fill_between(
                    ks, [metric.low for _, metric in points], [metric.high for _, metric in points], color=colour, alpha=0.13, linewidth=0
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(shown), [str(k) for k in sorted(shown)])
        axes.minorticks_off()
        axes.set_xlabel("K samples")
        axes.set_ylabel("share of problems")
        axes.set_title(title, pad=14 + 14 * -(-2 * len(reports) // 2))
        _legend(axes, columns=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path)
        plt.close(figure)
    return path
