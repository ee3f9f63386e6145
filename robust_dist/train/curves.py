"""The curves of a run as a picture, and the line styles of all our pictures."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from robust_dist.data.source import printable
from robust_dist.train.metrics import best_row
from robust_dist.train.recipe import Recipe

_MARKERS = "os^DvPX*<>ph"
_LINES = ("-", "--", "-.", ":")
_MOST_LETTERS = 60


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dash pattern of a line by number, distinguishable without colours."""
    return {
        "color": f"C{number % 10}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
    }


def plot_curves(rows: list[dict[str, Any]], path: str | Path, recipe: Recipe) -> None:
    """Plot losses, accuracy, learning rate and weight decay over the epochs to a PNG; nothing without epochs."""
    rows = [row for row in rows if row.get("epoch") is not None]
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (losses, accuracy), (rate, decay) = figure.subplots(2, 2, sharex=True)
    epochs = [row["epoch"] for row in rows]
    off = switch_epoch(rows, recipe)
    for number, (key, label) in enumerate({"train_loss": "training", "eval_loss": "evaluation"}.items()):
        losses.plot(epochs, _values(rows, key), **_small(len(rows)) | line_style(number), label=label)
    losses.legend(title="loss")
    accuracy.plot(epochs, [100 * value for value in _values(rows, "eval_accuracy")], **_small(len(rows)), marker="o")
    rate.plot(epochs, _values(rows, "lr"), **_small(len(rows)), marker="o")
    decay.plot(*decay_corners(rows, recipe))
    for axes in (rate, decay):
        axes.set_ylim(bottom=0)
    best = best_row(rows)
    if best is not None:
        _mark_best(accuracy, best)
        accuracy.set_ylim(top=min(101, accuracy.get_ylim()[1]))
    for axes, label in zip(figure.axes, ("loss", "accuracy, %", "learning rate", "weight decay"), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if off is not None:
            axes.axvline(off, color="grey", linestyle=":")
    if off is not None:
        place = {"xy": (off, 0.5), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        left = off > epochs[-1] / 2
        away, side = (-4, "right") if left else (4, "left")
        decay.annotate(f"weight decay off\nafter {off:.4g} epochs", **place, xytext=(away, 0), ha=side)
    for axes in (rate, decay):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, 1.03 * epochs[-1])
    figure.suptitle(_title(rows, path, recipe), parse_math=False)
    figure.savefig(path, dpi=120)


def _small(count: int) -> dict[str, Any]:
    return {"markersize": 4 if count < 50 else 2 if count < 100 else 0}


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    found = [row.get(key) for row in rows]
    return [math.nan if value is None or not math.isfinite(value) else value for value in found]


def _mark_best(axes: Any, best: dict[str, Any]) -> None:
    value = 100 * best["eval_accuracy"]
    star = {"marker": "*", "markersize": 14, "color": "C3", "linestyle": "", "clip_on": False}
    axes.plot([best["epoch"]], [value], **star, label=f"best: {value:.2f} % in epoch {best['epoch']}")
    axes.legend(loc="lower right")


def switch_epoch(rows: list[dict[str, Any]], recipe: Recipe) -> float | None:
    """Number of epochs after which weight decay was switched off; None if it was not, or there is none."""
    if not recipe.optimizer.weight_decay:
        return None
    before = 0
    for row in rows:
        if row.get("weight_decay") == 0:
            planned = recipe.schedule.weight_decay_off_at * recipe.epochs
            return planned if before <= planned <= row["epoch"] else before
        before = row["epoch"]
    return None


def decay_corners(rows: list[dict[str, Any]], recipe: Recipe) -> tuple[list[float], list[float]]:
    """The weight decay over the epochs as a step function: positions and heights of its corners.

    A row has the decay of its epoch's last step; the recipe tells where in the epoch it was switched off.
    """
    off = switch_epoch(rows, recipe)
    there = [(row["epoch"], row["weight_decay"]) for row in rows if row.get("weight_decay") is not None]
    if not there:
        return [], []
    configured = recipe.optimizer.weight_decay
    first = configured if configured != "auto" and off is not None and off <= there[0][0] else there[0][1]
    points = [(0.0, first)]
    for (before, old), (epoch, new) in pairwise([(0, first), *there]):
        if old != new:
            at = off if off is not None and before <= off <= epoch else before
            points += [(at, old), (at, new)]
    points.append(there[-1])
    xs, ys = zip(*points, strict=True)
    return list(xs), list(ys)


def _title(rows: list[dict[str, Any]], path: str | Path, recipe: Recipe) -> str:
    lr = recipe.optimizer.lr
    optimizer = f"{recipe.optimizer.name}, learning rate {lr if isinstance(lr, str) else f'{lr:g}'}"
    run, data = Path(path).absolute().parent.name, recipe.data.title
    lines = [f"{_short(run)}: {recipe.model.name} on {_short(data)}", optimizer]
    last = rows[-1]
    if last.get("eval_accuracy") is not None and not math.isnan(last["eval_accuracy"]):
        said = f"accuracy {last['eval_accuracy']:.2%} of {last.get('eval_samples')} images"
        lines.append(f"epoch {last['epoch']} of {recipe.epochs}: {said}")
    return "\n".join(lines)


def _short(text: str) -> str:
    """The end of a name or path, which is more informative than its beginning."""
    text = printable(text)
    return text if len(text) <= _MOST_LETTERS else f"...{text[-_MOST_LETTERS:]}"
