"""Resuming: the newest whole checkpoint of this recipe, fitted to the engine and the ranks of this start."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from robust_dist.checkpoint import Checkpoint, CheckpointError, CheckpointStore, convert, load_state
from robust_dist.data.sets import LabelledSet
from robust_dist.documents import DocumentError, typed
from robust_dist.engines.engine import UNNOTED, engine_of
from robust_dist.ranks.talk import on_rank_0, raise_together
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import Recipe, conflicts, recipe_dict

_CONVERTED = ".converted"


@dataclass
class _Noted:
    """The metadata of a run's checkpoint, as far as it is read again."""

    recipe: dict[str, Any]
    num_processes: int
    loss_sums: list[float]
    engine: str = UNNOTED
    bad_images: int = 0
    train_images: int | None = None


def load_newest(
    accelerator: Accelerator, recipe: Recipe, store: CheckpointStore, train_set: LabelledSet, folder: RunFolder
) -> Checkpoint | None:
    """Load the newest usable checkpoint into what the accelerator prepared; None where there is none at all.

    What dead processes left unfinished beside the checkpoints is removed.

    Args:
        accelerator: The engine, after `prepare`.
        recipe: Of this start.
        store: The run's checkpoints; this process holds the run's folder.
        train_set: The training images of this start.
        folder: The run's, with the epochs that are recorded.

    Raises:
        CheckpointError: On every rank: checkpoints are there, but none can be used; they are gone though epochs are
            recorded; or the newest was written while training on another number of images.
    """
    on_rank_0(lambda: check_not_lost(recipe, store, folder))
    found = on_rank_0(lambda: _find(accelerator, recipe, store))
    if found is None:
        return None
    on_rank_0(lambda: _check_same_set(found, train_set))
    path = on_rank_0(lambda: _fitting(accelerator, store, found))
    error: Exception | None = None
    try:
        load_state(accelerator, path)
    except Exception as caught:
        error = CheckpointError(f"{found.path} could not be loaded: {caught}")
    raise_together(error)
    if path != found.path and accelerator.is_main_process:
        shutil.rmtree(path)
    return found


def loss_of(found: Checkpoint, rank: int, world_size: int) -> float:
    """This rank's summed loss since the epoch began; at another world size the first one carries all of it."""
    losses, before = found.metadata["loss_sums"], found.metadata["num_processes"]
    return float(losses[rank] if before == world_size else sum(losses) * (rank == 0))


def check_not_lost(recipe: Recipe, store: CheckpointStore, folder: RunFolder) -> None:
    """Refuse to begin anew beside the record of a run whose checkpoints somebody took away, or hid.

    Raises:
        CheckpointError: Epochs are recorded, and their checkpoints are gone or cannot be read.
    """
    rows = folder.metrics()
    if not rows:
        return
    missing = _what_is_missing(store.folder)
    due = [row for row in rows if row["epoch"] % recipe.checkpoint.every_epochs == 0 or row["epoch"] == recipe.epochs]
    # Before the second of them was begun the first was complete; a kill before that leaves none.
    if missing is None and (any(store.folder.iterdir()) or (len(due) < 3 and not folder.is_finished)):
        return
    raise CheckpointError(
        f"{folder.metrics_path} has {len(rows)} epochs, but {store.folder} {missing or 'holds no checkpoint'}: bring "
        "it back (is a file system not mounted?), or, to begin anew on purpose, choose another run_dir or move this "
        "one away"
    )


def _what_is_missing(folder: Path) -> str | None:
    try:
        os.listdir(folder)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _find(accelerator: Accelerator, recipe: Recipe, store: CheckpointStore) -> Checkpoint | None:
    ours = recipe_dict(recipe)

    def refuse(checkpoint: Checkpoint) -> str | None:
        try:
            typed(checkpoint.metadata, _Noted, "its metadata")
        except DocumentError as error:
            return f"of no run ({error})"
        differing = conflicts(ours, checkpoint.metadata["recipe"], kind=type(recipe))
        return "of another recipe (" + "; ".join(differing) + ")" if differing else None

    found, rejected = store.newest(refuse)
    store.clean()
    shutil.rmtree(store.folder / _CONVERTED, ignore_errors=True)
    for reason in rejected:
        accelerator.print(f"checkpoint passed over: {reason}")
    if found is None and rejected:
        raise CheckpointError(
            "no checkpoint of this run can be used, and starting again would write over them; move "
            f"{store.folder} away to start from the beginning:\n  " + "\n  ".join(rejected)
        )
    return found


def _check_same_set(found: Checkpoint, train_set: LabelledSet) -> None:
    before = found.metadata.get("train_images", len(train_set))
    if before != len(train_set):
        raise CheckpointError(
            f"{found.path} was written while training on {before} images, and {train_set.name} has {len(train_set)}: "
            "the order of an epoch would be another. Bring the old images back, or choose another run_dir"
        )


def _fitting(accelerator: Accelerator, store: CheckpointStore, found: Checkpoint) -> Path:
    """The checkpoint, or a conversion of it where another engine, or ZeRO at another world size, wrote it."""
    engine, ranks = engine_of(accelerator), accelerator.num_processes
    same_ranks = ranks == found.metadata["num_processes"]
    if found.metadata.get("engine", UNNOTED) == engine.kind and (same_ranks or engine.loads_on_any_ranks):
        return found.path
    converted = store.folder / _CONVERTED
    whole = engine.saves_whole(accelerator)
    convert(found.path, converted, to=engine.kind, world_size=ranks, full_state_dict=whole)
    return converted
