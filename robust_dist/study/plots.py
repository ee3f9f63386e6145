"""A study's pictures: a heat map of the grid, accuracy over the learning rate."""

from pathlib import Path
from typing import Any

import numpy as np

from robust_dist.study.figures import Array
from robust_dist.study.grid import Study
from robust_dist.study.summary import Summary

_LR = "optimizer.lr"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _means(points: Array) -> Array:
    """Means over the seeds that are there [cells]; NaN where there is none."""
    counts = np.sum(~np.isnan(points), axis=1)
    sums = np.nansum(points, axis=1)
    return np.divide(sums, counts, out=np.full(len(points), np.nan), where=counts > 0)


def plot_heat_map(summary: Summary, path: str | Path) -> None:
    """Draw every cell's mean accuracy into a PNG: rows are all axes but the last, columns the last.

    Args:
        summary: The results; missing cells stay white.
        path: The PNG to write.
    """
    study = summary.study
    columns = study.axes[-1].labels
    grid = _means(summary.points).reshape(-1, len(columns))
    cells = study.cells()
    heads = [", ".join(cell.labels[:-1]) for cell in cells[:: len(columns)]]
    figure = _figure(3 + 1.1 * len(columns), 1.6 + 0.5 * len(heads))
    axes = figure.subplots()
    # Cells that diverged do not stretch the colours over those that did not.
    shown = np.array([np.nan if _all_diverged(summary, place) else value for place, value in enumerate(grid.ravel())])
    lowest = None if np.isnan(shown).all() else np.nanmin(shown)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=lowest)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, _text(summary, row * len(columns) + column, value), ha="center", va="center")
    for text in axes.texts:
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(heads)), heads)
    axes.set_xlabel(study.axes[-1].name)
    axes.set_ylabel(", ".join(axis.name for axis in study.axes[:-1]))
    axes.set_title(_title(summary))
    if not np.isnan(grid).all():
        figure.colorbar(image, label="accuracy, %")
    figure.savefig(path, dpi=120)


def _text(summary: Summary, place: int, value: float) -> str:
    if np.isnan(value):
        return ""
    if _all_diverged(summary, place):
        return "diverged"
    return f"{value:.2f}" + ("*" if summary.diverged(summary.study.cells()[place]) else "")


def _all_diverged(summary: Summary, place: int) -> bool:
    there = int(np.sum(~np.isnan(summary.points[place])))
    return there > 0 and len(summary.diverged(summary.study.cells()[place])) == there


def plot_learning_rates(summary: Summary, path: str | Path) -> bool:
    """Draw mean ± standard deviation over the learning rate into a PNG, a line per place of the other axes.

    A cell whose every run diverged is a cross at the bottom.

    Args:
        summary: The results.
        path: The PNG to write.

    Returns:
        Whether an axis of the study is the learning rate; else nothing is written.
    """
    study = summary.study
    found = [(place, axis.values_of(_LR)) for place, axis in enumerate(study.axes)]
    rates = next(((place, values) for place, values in found if values is not None), None)
    if rates is None:
        return False
    place, values = rates
    figure = _figure(8, 5)
    axes = figure.subplots()
    for label, cells in _lines(study, place).items():
        _draw_line(axes, label, np.array(values), summary, cells)
    axes.set_xscale("log")
    axes.margins(y=0.1)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("accuracy, %")
    axes.set_title(_title(summary))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _draw_line(axes: Any, label: str, rates: Array, summary: Summary, cells: list[int]) -> None:
    points = summary.points[cells]
    means = _means(points)
    diverged = np.array([_all_diverged(summary, place) for place in cells])
    there = ~np.isnan(means) & ~diverged
    spread = [float(np.nanstd(row, ddof=1)) if np.sum(~np.isnan(row)) > 1 else 0.0 for row in points[there]]
    line = axes.errorbar(rates[there], means[there], yerr=spread, marker="o", capsize=3, label=label)[0]
    marks = {"marker": "x", "linestyle": "", "color": line.get_color(), "transform": axes.get_xaxis_transform()}
    axes.plot(rates[diverged], [0.02] * int(diverged.sum()), **marks)


def _lines(study: Study, place: int) -> dict[str, list[int]]:
    """Indices of the cells by what they have on the other axes, in the order of the learning rates."""
    lines: dict[str, list[int]] = {}
    for index, cell in enumerate(study.cells()):
        label = ", ".join(cell.labels[:place] + cell.labels[place + 1 :]) or study.name
        lines.setdefault(label, []).append(index)
    return lines


def _title(summary: Summary) -> str:
    note = "" if summary.is_complete else f", unfinished ({len(summary.results)} of {summary.points.size} runs)"
    seeds = len(summary.study.seeds)
    return f"{summary.study.name}{note}, {seeds} seed{'s' if seeds > 1 else ''}"
