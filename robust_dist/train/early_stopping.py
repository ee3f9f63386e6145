"""Early stopping: the end of a run whose figures no longer improve, decided from `metrics.jsonl` alone."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from robust_dist.train.settings import require_number


@dataclass
class EarlyStoppingConfig:
    """The end of a run that no longer improves.

    Attributes:
        patience: Stop after so many epochs in a row without an improvement; null trains all epochs.
        metric: The key of metrics.jsonl that must improve: an accuracy upwards, a loss downwards.
        min_delta: By how much the metric must improve on its best value (accuracies are shares: 0.001 is 0.1 %).
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
    """The reason to train no further after the last of `rows`, or None.

    A value that is missing or no number is no improvement.

    Args:
        rows: Objects of `metrics.jsonl`, oldest first.
        config: What must improve, and how soon.
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
