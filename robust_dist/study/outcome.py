"""The outcome of a study's run."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_dist.data import dataset_info
from robust_dist.documents import DocumentError, read_json
from robust_dist.own_code import is_name
from robust_dist.private import hidden
from robust_dist.surroundings import processor
from robust_dist.train.folder import RunFolder
from robust_dist.train.main import DIVERGED
from robust_dist.train.metrics import last_row
from robust_dist.train.recipe import Recipe, recipe_dict

_LOG_LINES = 15


@dataclass
class Result:
    """A finished run.

    Attributes:
        accuracy: In the last epoch, a share of the evaluation images; None if training stopped before its end.
        diverged: Why the run counts as diverged, or None.
        chance: Accuracy of guessing; None where the number of classes is not known.
        epochs: Number of recorded epochs.
        steps: Optimizer steps in those epochs.
        train_loss: In the last epoch; None if there is none.
        eval_samples: Number of evaluation images.
        images_per_second: Mean over the epochs, in training.
        recipe: `recipe_dict` of the run.
        environment: Recorded by the run's last start: revision, versions, device, threads.
    """

    accuracy: float | None
    diverged: str | None
    chance: float | None
    epochs: int
    steps: int
    train_loss: float | None
    eval_samples: int
    images_per_second: float
    recipe: dict[str, Any] = field(repr=False)
    environment: dict[str, Any] = field(repr=False)


@dataclass
class Failure:
    """A start that failed: its exit status (-N for signal N), and the end of its output."""

    status: int
    log: str


def judge(run_dir: Path, recipe: Recipe, status: int, log: Path) -> Result | Failure:
    """The outcome of a training process that ended with `status` and printed `log`.

    A run has diverged where its loss was no longer finite, or where both losses of the last epoch, in training and in
    evaluation, are above that of guessing, ln(classes), where an untrained classifier starts. (The training loss alone
    is a mean that includes the start; the evaluation loss alone may be high for a classifier that is confidently
    wrong.) The last epoch's accuracy counts, not the best one's: the paper names no other, and choosing an epoch by the
    test images would favour what fluctuates.
    """
    rows = RunFolder(run_dir).metrics()
    if status == DIVERGED:
        return _result(run_dir, recipe, rows, None, "the training loss was no longer finite")
    last = last_row(rows, recipe.epochs)
    if status != 0 or last is None:
        return Failure(status, end_of(log))
    chance = chance_of(recipe, run_dir)
    guessing = math.inf if chance is None else -math.log(chance)
    seen, held_out = (math.nan if last.get(key) is None else last[key] for key in ("train_loss", "eval_loss"))
    why = (
        f"the last losses, {seen:.3f} in training and {held_out:.3f} in evaluation, are above guessing's {guessing:.3f}"
    )
    # Written so that a NaN loss counts.
    learned = seen <= guessing or held_out <= guessing
    return _result(run_dir, recipe, rows, last["eval_accuracy"], None if learned else why)


def chance_of(recipe: Recipe, run_dir: Path) -> float | None:
    """Accuracy of guessing on the recipe's data; None where the number of classes is not known."""
    if recipe.data.num_classes is not None:
        return 1 / recipe.data.num_classes
    try:
        if is_name(recipe.data.name):
            return 1 / len(read_json(RunFolder(run_dir).data_path, dict[str, Any])["classes"])
        return 1 / dataset_info(recipe.data.name).num_classes
    except (ValueError, OSError, KeyError, ZeroDivisionError):
        return None


def end_of(log: Path) -> str:
    """The last lines of a log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_LOG_LINES:])


def _result(
    run_dir: Path, recipe: Recipe, rows: list[dict[str, Any]], accuracy: float | None, diverged: str | None
) -> Result:
    last = rows[-1] if rows else {}
    speeds = [row["images_per_second"] for row in rows if row.get("images_per_second") is not None]
    return Result(
        accuracy=accuracy,
        diverged=diverged,
        chance=chance_of(recipe, run_dir),
        epochs=last.get("epoch", 0),
        steps=last.get("step", 0),
        train_loss=last.get("train_loss"),
        eval_samples=last.get("eval_samples", 0),
        images_per_second=sum(speeds) / len(speeds) if speeds else 0.0,
        # The folder says where the study lies, which is no part of the result.
        recipe={key: value for key, value in hidden(recipe_dict(recipe)).items() if key != "run_dir"},
        environment=_environment(run_dir),
    )


def _environment(run_dir: Path) -> dict[str, Any]:
    try:
        starts = RunFolder(run_dir).starts()
    except DocumentError:
        # A result counts even if the note beside it is missing or damaged.
        starts = []
    noted = {key: value for key, value in (starts[-1] if starts else {}).items() if key not in ("command", "time")}
    return noted | {"processor": processor()}
