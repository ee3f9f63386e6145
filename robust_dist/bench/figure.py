"""The picture beside a benchmark's table: bars with their spread, a panel for each size or set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, THEIRS, LIMIT = "tab:blue", "tab:gray", "tab:red"


@dataclass(frozen=True)
class Bar:
    """One contender.

    Attributes:
        name: Beside the bar.
        value: Its length.
        low: Where its spread begins.
        high: Where its spread ends.
        ours: Whether it is drawn in our colour.
    """

    name: str
    value: float
    low: float
    high: float
    ours: bool


@dataclass(frozen=True)
class Panel:
    """Bars on one scale of their own.

    Attributes:
        title: Above them.
        bars: From above to below.
        limit: Where a line marks what is possible; None for no line.
    """

    title: str
    bars: Sequence[Bar]
    limit: float | None = None


def draw_bars(panels: Sequence[Panel], path: str | Path, *, label: str, note: str, log: bool = False) -> None:
    """Draw the panels one above the other into a PNG.

    Args:
        panels: At least one.
        path: The PNG to write; its folder is made.
        label: Of the values, with their unit.
        note: Above all panels: what was measured, and where.
        log: Whether values are on a logarithmic scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    counts = [len(panel.bars) for panel in panels]
    figure = Figure(figsize=(10, 1.0 + sum(0.26 * count + 0.9 for count in counts)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(note, fontsize=9)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 3 for count in counts])
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw(axes, panel, log)
    grid[-1, 0].set_xlabel(label)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, panel: Panel, log: bool) -> None:
    places = range(len(panel.bars))
    values = [bar.value for bar in panel.bars]
    # Rounding may turn a spread of nothing below 0, which matplotlib refuses.
    below = [max(0.0, bar.value - bar.low) for bar in panel.bars]
    above = [max(0.0, bar.high - bar.value) for bar in panel.bars]
    colours = [OURS if bar.ours else THEIRS for bar in panel.bars]
    axes.barh(places, values, xerr=[below, above], color=colours, ecolor="black", error_kw={"linewidth": 0.8})
    axes.set_yticks(places, [bar.name for bar in panel.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)
    if panel.limit is not None:
        axes.axvline(panel.limit, color=LIMIT, linewidth=1)
    if log:
        axes.set_xscale("log")
