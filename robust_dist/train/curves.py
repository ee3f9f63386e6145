"""The curves of a run as a picture."""

import math
from pathlib import Path
from typing import Any


def plot_curves(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw loss, accuracy, learning rate and weight decay over the epochs into a PNG; nothing where there are none.

    Args:
        rows: Objects of `metrics.jsonl`, oldest first.
        path: The PNG to write.
    """
    rows = [row for row in rows if row.get("epoch") is not None]
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "train_loss": "training loss",
        "eval_accuracy": "accuracy",
        "lr": "learning rate",
        "weight_decay": "decay",
    }
    epochs = [row["epoch"] for row in rows]
    for axes, (key, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        axes.plot(
            epochs,
            [math.nan if row.get(key) is None else row[key] for row in rows],
            marker="." if len(rows) < 50 else None,
        )
        axes.set_title(title)
        axes.grid(alpha=0.3)
    for axes in figure.axes[2:]:
        axes.set_xlabel("epoch")
    last = rows[-1]
    if last.get("eval_accuracy") is not None:
        figure.suptitle(
            f"epoch {last['epoch']}: accuracy {last['eval_accuracy']:.2%} of {last.get('eval_samples')} images"
        )
    figure.savefig(path, dpi=120)
