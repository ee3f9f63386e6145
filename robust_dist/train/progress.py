"""The position of a run in its training, and the check for a loss that is no longer finite."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robust_dist.train.recipe import OptimizerConfig


class DivergedError(RuntimeError):
    """The training loss is no longer finite; nothing was saved after it."""


@dataclass
class Progress:
    """The position of a run on this rank; a checkpoint restores it.

    Attributes:
        step: Optimizer steps done.
        loss_sum: 0-d float64: this rank's summed loss since the epoch began.
        lr: Learning rate of the last step.
        weight_decay: Weight decay of the last step.
        bad_images: This rank's images since the epoch began that could not be read.
        forgiven: Bad images of the epoch, on all ranks, over which the run was stopped before.
        unfinished: Figures of an epoch that is trained and not yet recorded, as `metrics.jsonl` has them.
        resumed_step: The step of the checkpoint that this start took up; -1 without one.
    """

    step: int
    loss_sum: Tensor
    lr: float = 0.0
    weight_decay: float = 0.0
    bad_images: int = 0
    forgiven: int = 0
    unfinished: dict[str, Any] | None = None
    resumed_step: int = -1

    def begin_epoch(self) -> None:
        """Forget the epoch that was recorded."""
        self.unfinished = None
        self.loss_sum.zero_()
        self.bad_images = self.forgiven = 0


def check_finite(loss: float, step: int, settings: OptimizerConfig) -> None:
    """Raise a DivergedError that names the settings where the loss by optimizer step `step` is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training loss is {loss} by step {step} (optimizer.lr={settings.lr}, "
            f"optimizer.weight_decay={settings.weight_decay}, optimizer.clip_norm={settings.clip_norm}); nothing was "
            "saved after it went bad: try a smaller optimizer.lr or an optimizer.clip_norm"
        )
