"""`robust-dist runs`: the runs below a folder, their outcomes, and their differences."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_dist.data.source import printable
from robust_dist.documents import DocumentError, read_yaml, typed
from robust_dist.ranks.claim import is_held
from robust_dist.train.curves import line_style
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import flatten, keys_of, recipe_dict
from robust_dist.train.metrics import EarlyStoppingConfig, best_row, early_stop, last_row
from robust_dist.train.recipe import Recipe

_STOPS = "early_stopping"
# Characters in a line of the legend, in one column and in two.
_LINE, _HALF_LINE = 120, 55


@dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    Attributes:
        name: Its path below the folder that was named.
        state: finished, running, stopped, stopped early (no longer improving), or damaged and why.
        recipe: Dotted keys and values.
        rows: The epochs of `metrics.jsonl`, oldest first.
    """

    name: str
    state: str
    recipe: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """Epochs and their accuracies."""
        pairs = ((row.get("epoch"), row.get("eval_accuracy")) for row in self.rows)
        return [(epoch, accuracy) for epoch, accuracy in pairs if epoch is not None and accuracy is not None]


def find_runs(folder: str | Path) -> list[Run]:
    """The runs in a folder and below it, by name.

    Raises:
        ValueError: There is no such folder, or no run below it.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise ValueError(f"{top}: there is no such folder")
    found = []
    for above, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "recipe.yaml" in files and ("checkpoints" in folders or "environment.json" in files):
            folders.clear()
            found.append(_run(Path(above), os.path.relpath(above, top)))
    if not found:
        raise ValueError(f"{top}: holds no run, which is a folder with a recipe.yaml and checkpoints")
    return sorted(found, key=lambda run: run.name)


def _run(path: Path, name: str) -> Run:
    name, folder = path.absolute().name if name == "." else name, RunFolder(path)
    try:
        recipe = typed(read_yaml(path / "recipe.yaml").data, dict[str, Any], str(path / "recipe.yaml"))
        flat = keys_of(Recipe).in_our_words(flatten(recipe_dict(Recipe())) | flatten(recipe))
        rows = folder.metrics()
        stops = EarlyStoppingConfig(**{name: flat[f"{_STOPS}.{name}"] for name in vars(EarlyStoppingConfig())})
    except (DocumentError, ValueError, TypeError) as error:
        return Run(name, f"damaged: {error}")
    if is_held(path):
        state = "running"
    elif last_row(rows, flat["epochs"]) is not None:
        state = "finished"
    elif early_stop(rows, stops) is not None:
        state = "stopped early"
    else:
        state = "stopped"
    return Run(name, state, flat, rows)


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs' recipes differ, of those that affect a run's result."""
    known = keys_of(Recipe)
    recipes = [run.recipe for run in runs if run.recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if not known.is_free(key))
    return [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]


def table(runs: Sequence[Run]) -> str:
    """A line for each run, under a heading."""
    # The column of finished epochs also has the recipe's number.
    keys = [key for key in differing(runs) if key != "epochs"]
    rows = [["run", "state", "epochs", "best", "last", "top-5", "images/s", *keys]]
    for run in runs:
        accuracies = [accuracy for _, accuracy in run.accuracies]
        last, best = run.rows[-1] if run.rows else {}, best_row(run.rows)
        speed, top5 = last.get("images_per_second"), last.get("eval_top5_accuracy")
        rows.append(
            [
                run.name,
                run.state,
                f"{last.get('epoch', 0)}/{run.recipe['epochs']}" if run.recipe else "-",
                "-" if best is None else f"{best['eval_accuracy']:.2%}",
                f"{accuracies[-1]:.2%}" if accuracies else "-",
                "-" if top5 is None else f"{top5:.2%}",
                "-" if speed is None else f"{speed:,.0f}",
                *(_value(run, key) for key in keys),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _value(run: Run, key: str) -> str:
    """A setting as written in a recipe."""
    value = run.recipe.get(key, "-")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the runs' accuracies over the epochs into a PNG."""
    figure_of(runs).savefig(path, dpi=120, format="png")


def figure_of(runs: Sequence[Run]) -> Any:
    """A matplotlib figure of the runs' accuracies over the epochs, with a star at each run's best epoch.

    The legend has every setting in which the runs differ, on as many lines as needed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    keys = differing(runs)
    shown = [run for run in runs if run.accuracies]
    said = {run.name: ", ".join(f"{key}={_value(run, key)}" for key in keys) for run in shown}
    labels = [printable(f"{run.name} ({said[run.name]})" if keys else run.name) for run in shown]
    columns = 2 if len(shown) > 4 and max(map(len, labels)) <= _HALF_LINE else 1
    labels = [textwrap.fill(label, _LINE if columns == 1 else _HALF_LINE) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure: Any = Figure(figsize=(10, 6 + 0.15 * max(0, lines - 6)), layout="constrained")
    axes = figure.subplots()
    for number, (run, label) in enumerate(zip(shown, labels, strict=True)):
        epochs, shares = zip(*run.accuracies, strict=True)
        style = line_style(number) | {"markersize": 4, "markevery": max(1, len(epochs) // 20)}
        axes.plot(epochs, [100 * share for share in shares], **style, label=label)
        best = best_row(run.rows)
        if best is not None:
            star = {"marker": "*", "markersize": 13, "color": style["color"], "markeredgecolor": "black"}
            axes.plot([best["epoch"]], [100 * best["eval_accuracy"]], linestyle="", zorder=3, **star)
    axes.set(xlabel="epoch", ylabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        place = {"loc": "outside lower center", "ncols": columns, "title": "runs; stars: best epochs"}
        for text in figure.legend(fontsize=8, handlelength=3.5, **place).get_texts():
            text.set_parse_math(False)
    return figure
