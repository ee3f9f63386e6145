"""A study's pictures: a heat map of the grid, accuracy over the learning rate."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from robust_dist.study.figures import Array
from robust_dist.study.grid import Study
from robust_dist.study.summary import Summary
from robust_dist.train.curves import line_style

_LR = "optimizer.lr"


def _means(points: Array) -> Array:
    """Means over the finished seeds [cells]; NaN for a cell without any."""
    counts = np.sum(~np.isnan(points), axis=1)
    sums = np.nansum(points, axis=1)
    return np.divide(sums, counts, out=np.full(len(points), np.nan), where=counts > 0)


def _are_numbers(labels: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False


def _growing(labels: Sequence[str]) -> list[int]:
    """The places of an axis in numerical order; in the study's order if some are not numbers."""
    places = list(range(len(labels)))
    return sorted(places, key=lambda place: float(labels[place])) if _are_numbers(labels) else places


def _averaged(summary: Summary) -> str:
    seeds = len(summary.study.seeds)
    return f"means over {seeds} seeds" if seeds > 1 else "one seed"


def _note(figure: Any, notes: Sequence[str]) -> None:
    """Explain the marks of the picture below it."""
    figure.supxlabel("; ".join(notes), fontsize=8)


def heat_map(summary: Summary) -> Figure:
    """Every cell's mean accuracy: rows are all axes but the last, columns the last.

    Numbers grow to the right and upwards, whatever the study's order; missing cells stay white.
    """
    study, cells = summary.study, summary.study.cells()
    columns = study.axes[-1].labels
    across = _growing(columns)
    heads = [", ".join(cell.labels[:-1]) for cell in cells[:: len(columns)]]
    down = _growing(heads)[::-1] if _are_numbers(heads) else list(range(len(heads)))
    places = np.arange(len(cells)).reshape(-1, len(columns))[np.ix_(down, across)]
    grid = _means(summary.points)[places]
    figure: Any = Figure(figsize=(3 + 1.1 * len(columns), 1.8 + 0.5 * len(heads)), layout="constrained")
    axes = figure.subplots()
    # Cells that diverged do not stretch the colours over those that did not.
    shown = np.array(
        [np.nan if _all_diverged(summary, place) else _means(summary.points)[place] for place in places.flat]
    )
    lowest = None if np.isnan(shown).all() else np.nanmin(shown)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=lowest)
    for (row, column), place in np.ndenumerate(places):
        axes.text(column, row, _text(summary, place, grid[row, column]), ha="center", va="center")
    for text in axes.texts:
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
    axes.set_xticks(range(len(columns)), [columns[place] for place in across])
    axes.set_yticks(range(len(heads)), [heads[place] for place in down])
    axes.set_xlabel(study.axes[-1].name)
    axes.set_ylabel(", ".join(axis.name for axis in study.axes[:-1]))
    axes.set_title(_title(summary))
    if not np.isnan(grid).all():
        figure.colorbar(image, label="accuracy, %")
    starred = any(text.get_text().endswith("*") for text in axes.texts)
    notes = ["*: some of the seeds diverged; report.md says what they count as"] if starred else []
    notes += ["white: no result yet"] if np.isnan(grid).any() else []
    _note(figure, [_averaged(summary), *notes])
    return figure


def _text(summary: Summary, place: int, value: float) -> str:
    if np.isnan(value):
        return ""
    if _all_diverged(summary, place):
        return "diverged"
    return f"{value:.2f}" + ("*" if summary.diverged(summary.study.cells()[place]) else "")


def _all_diverged(summary: Summary, place: int) -> bool:
    there = int(np.sum(~np.isnan(summary.points[place])))
    return there > 0 and len(summary.diverged(summary.study.cells()[place])) == there


def learning_rates(summary: Summary) -> Figure | None:
    """Mean ± standard deviation over the learning rate, a line for each place of the other axes.

    A cell whose runs all diverged is a cross at the bottom. Lines are shifted sideways, so that their bars are visible.

    Returns:
        None where no axis of the study is the learning rate.
    """
    study = summary.study
    found = [(place, axis.values_of(_LR)) for place, axis in enumerate(study.axes)]
    rates = next(((place, values) for place, values in found if values is not None), None)
    if rates is None:
        return None
    place, values = rates
    lines = _lines(study, place)
    many, several = len(lines) > 4, len(study.seeds) > 1
    figure: Any = Figure(figsize=(10 if many else 8, 5.5), layout="constrained")
    axes = figure.subplots()
    # In decades; bars at the same place would hide each other.
    apart = [10 ** (several * 0.015 * (number - (len(lines) - 1) / 2)) for number in range(len(lines))]
    for number, (label, cells) in enumerate(lines.items()):
        _draw_line(axes, label, number, apart[number] * np.array(values), summary, cells)
    axes.set_xscale("log")
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.set_xlabel("learning rate (optimizer.lr)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(_title(summary))
    axes.grid(alpha=0.3)
    names = ", ".join(axis.name for number, axis in enumerate(study.axes) if number != place)
    if names:
        drawn = axes.get_legend_handles_labels()
        holder, where = (figure, "outside right upper") if many else (axes, "best")
        holder.legend(*drawn, title=names, loc=where, handlelength=3.5)
    bars = f"{_averaged(summary)}, bars: ± 1 standard deviation (n - 1)" if several else "one seed, no bars"
    crosses = any(_all_diverged(summary, cell) for cell in range(len(summary.points)))
    notes = ["x at the bottom: every seed diverged"] if crosses else []
    notes += ["lines are set apart sideways"] if several and len(lines) > 1 else []
    _note(figure, [bars, *notes])
    return figure


def _draw_line(axes: Any, label: str, number: int, rates: Array, summary: Summary, cells: list[int]) -> None:
    points = summary.points[cells]
    means = _means(points)
    diverged = np.array([_all_diverged(summary, place) for place in cells])
    there = ~np.isnan(means) & ~diverged
    spread = [float(np.nanstd(row, ddof=1)) if np.sum(~np.isnan(row)) > 1 else 0.0 for row in points[there]]
    style, several = line_style(number), len(summary.study.seeds) > 1
    label = label if there.any() or diverged.any() else f"{label}: no result yet"
    axes.errorbar(rates[there], means[there], yerr=spread if several else None, capsize=3, label=label, **style)
    marks = {"marker": "x", "linestyle": "", "color": style["color"], "transform": axes.get_xaxis_transform()}
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
