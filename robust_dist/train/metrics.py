"""The rows of `metrics.jsonl`: reading, fitting to a step, best, last and early stopping."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robust_dist.documents import DocumentError, parse_json, read_text, typed
from robust_dist.train.keys import require_number

Rows = list[dict[str, Any]]
# With fewer classes, five guesses are hardly ever wrong.
LEAST_FOR_TOP5 = 6
# More classes would make lines too long to read; `robust-dist evaluate` lists them all.
MOST_LISTED = 1000
# Figures of an epoch that depend on the machine and the moment, and so differ between equal runs.
MEASURED = frozenset(
    {
        "images_per_second",
        "images_per_second_per_rank",
        "data_wait_share",
        "checkpoint_seconds",
        "peak_memory_gib",
        "mfu",
    }
)


@dataclass
class EarlyStoppingConfig:
    """When to end a run that no longer improves.

    Attributes:
        patience: Stop after this many epochs in a row without an improvement; null trains all epochs.
        metric: The key of metrics.jsonl that must improve: an accuracy upwards, a loss downwards.
        min_delta: The least improvement that counts, over the best value (accuracies are fractions: 0.001 is 0.1 %).
    """

    patience: int | None = None
    metric: Literal["eval_accuracy", "eval_top5_accuracy", "eval_mean_class_accuracy", "eval_loss", "train_loss"] = (
        "eval_accuracy"
    )
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience is not None:
            require_number("early_stopping.patience", self.patience, 1)
        require_number("early_stopping.min_delta", self.min_delta, 0)

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self.metric.endswith("loss")


def early_stop(rows: list[dict[str, Any]], config: EarlyStoppingConfig) -> str | None:
    """The reason to stop training after the last of the rows (oldest first), or None.

    A missing value or NaN is not an improvement.
    """
    best: float | None = None
    best_epoch, waited = 0, 0
    for row in rows:
        value = row.get(config.metric)
        if value is not None and _improves(value, best, config):
            best, best_epoch, waited = value, row["epoch"], 0
        else:
            waited += 1
    if config.patience is None or waited < config.patience:
        return None
    by = f" by more than {config.min_delta:g}" if config.min_delta else ""
    shown = "" if best is None else f"; its best value, {_text(best, config)}, is that of epoch {best_epoch}"
    return f"stopped early: {config.metric} has not improved{by} for {waited} epoch{'s' * (waited != 1)}{shown}"


def _improves(value: float, best: float | None, config: EarlyStoppingConfig) -> bool:
    if best is None:
        return not math.isnan(value)
    return value < best - config.min_delta if config.is_loss else value > best + config.min_delta


def _text(value: float, config: EarlyStoppingConfig) -> str:
    return f"{value:.4g}" if config.is_loss else f"{value:.2%}"


@dataclass
class _Row:
    """The keys that readers of a row rely on."""

    step: int
    epoch: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    eval_samples: int | None = None
    images_per_second: float | None = None
    lr: float | None = None
    weight_decay: float | None = None


def read_rows(path: Path) -> tuple[Rows, list[tuple[str, str]]]:
    """The rows of a file, in order, and for each line that is not a row what is wrong with it, and the line.

    Raises:
        DocumentError: The file cannot be read.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return [], []
    rows: Rows = []
    faults = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"line {number}")
            typed(row, _Row, f"line {number}")
            rows.append(row)
        except DocumentError as error:
            faults.append((str(error), line))
    return rows, faults


def sort_rows(rows: Rows, step: int, steps_per_epoch: int | None) -> tuple[Rows, Rows, list[str]]:
    """Sort the rows of a run at an optimizer step.

    Without `steps_per_epoch`, missing and odd rows are not looked for.

    Returns:
        The rows to keep, one per epoch, oldest first; those to remove; and a line for each irregularity.
    """
    erased: Rows = [row for row in rows if row["step"] > step]
    notes: list[str] = []
    kept: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["step"] > step:
            continue
        if steps_per_epoch and not _is_end(row, steps_per_epoch):
            notes.append(f"a row of epoch {row.get('epoch')} and step {row['step']} is not at an epoch's end")
            erased.append(row)
            continue
        if row["step"] in kept:
            notes.append(f"step {row['step']} has several rows; the last one is kept")
            erased.append(kept[row["step"]])
        kept[row["step"]] = row
    if steps_per_epoch:
        ends = range(steps_per_epoch, step + 1, steps_per_epoch)
        missing = [str(end // steps_per_epoch) for end in ends if end not in kept]
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            notes.append(f"has no row for epoch {shown}, but the checkpoint is at step {step}")
    return [kept[end] for end in sorted(kept)], erased, notes


def _is_end(row: dict[str, Any], steps_per_epoch: int) -> bool:
    epoch, rest = divmod(row["step"], steps_per_epoch)
    return rest == 0 and epoch >= 1 and row.get("epoch", epoch) == epoch


def last_row(rows: Rows, epochs: int, stops: EarlyStoppingConfig | None = None) -> dict[str, Any] | None:
    """The row of a run's last epoch, or of the one at which it stops early, if it is there with an accuracy."""
    found = rows[-1] if rows else {}
    ends = found.get("epoch") == epochs or (stops is not None and early_stop(rows, stops) is not None)
    return found if ends and found.get("eval_accuracy") is not None else None


def without_measured(row: dict[str, Any]) -> dict[str, Any]:
    """An epoch's row without its measured figures: two equal runs agree on it bit for bit."""
    return {key: value for key, value in row.items() if key not in MEASURED}


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the highest eval_accuracy, the newest in a tie; None if no row has one."""
    there = [row for row in rows if row.get("eval_accuracy") is not None and not math.isnan(row["eval_accuracy"])]
    return max(reversed(there), key=lambda row: row["eval_accuracy"], default=None)
