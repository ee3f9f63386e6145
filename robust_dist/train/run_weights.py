"""The weights in a run's checkpoints: which checkpoint is asked for, and which of its weights count."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.checkpoint.conversion import read_weights
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import ACCURACY, Manifest, read_manifest, verify
from robust_dist.documents import read_json, typed
from robust_dist.train.folder import RunFolder
from robust_dist.train.optimizers import choice_of

# What `robust-dist export` writes: the weights, and what their use needs to know.
WEIGHTS, RECORD = "model.safetensors", "model.json"
# Accelerate's name for the moving average, the one object that a run registers with it.
_AVERAGE = "custom_checkpoint_0.pkl"
_NAMED = 5


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or lies in."""
    places = (folder.absolute(), *folder.absolute().parents)
    return next((place for place in places if (place / "recipe.yaml").is_file()), None)


def why_none(folder: Path) -> str:
    """The reason why a folder is neither a run's nor an export."""
    if not folder.exists():
        return "there is no such folder"
    above = run_of(folder)
    hint = "" if above is None else f"; it belongs to a run: name {above}"
    return f"holds no recipe.yaml of a run and no {RECORD} of an export{hint}"


def data_of(run: RunFolder) -> dict[str, Any]:
    """The content of a run's `data.json`.

    Raises:
        ValueError: There is none.
    """
    try:
        data: dict[str, Any] = read_json(run.data_path, dict[str, Any])
    except FileNotFoundError:
        raise ValueError(
            f"{run.path} has no data.json, which names the classes: start the run's command once more, which writes it"
        ) from None
    return data


def choose(run: RunFolder, checkpoint: str | int) -> tuple[Path, Manifest]:
    """A run's checkpoint and its manifest.

    Args:
        run: The folder.
        checkpoint: "last", "best", or a step.

    Raises:
        CheckpointError: There is none, not this one, or it is torn.
        ValueError: `checkpoint` is none of these.
    """
    store = CheckpointStore(run.checkpoints)
    steps = store.steps()
    if not steps:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint yet")
    there = f"there are those of step {', '.join(map(str, steps))}"
    if checkpoint == "best":
        step = _best(store, steps, run)
    elif checkpoint == "last":
        step = steps[-1]
    elif str(checkpoint).isdigit():
        step = int(checkpoint)
    else:
        raise ValueError(f"checkpoint={checkpoint!r} is none of last, best and a step; {there}")
    if step not in steps:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of step {step}; {there}")
    try:
        verify(store.path_of(step))
        return store.path_of(step), read_manifest(store.path_of(step))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another checkpoint, {there}") from None


def _best(store: CheckpointStore, steps: list[int], run: RunFolder) -> int:
    scored = []
    for step in steps:
        try:
            accuracy = read_manifest(store.path_of(step)).metadata.get(ACCURACY)
        except CheckpointError:
            continue
        if accuracy is not None:
            scored.append((accuracy, step))
    if not scored:
        raise CheckpointError(f"{run.checkpoints} holds no whole checkpoint of an epoch's end, so none has an accuracy")
    return max(scored)[1]


def check_evaluated(place: Path, manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Refuse the weights that a schedule-free optimizer trains, in place of their average."""
    if manifest.metadata.get(ACCURACY) is not None:
        return
    name = (recipe.get("optimizer") or {}).get("name", "")
    choice = choice_of(name) if name else None
    if choice is not None and choice.averages_weights:
        raise CheckpointError(
            f"{place}: was saved within an epoch, so it holds the weights that optimizer.name={name!r} trains and not "
            "the average that is evaluated, whose batch statistics need training data: name a checkpoint of an epoch's "
            "end, or let the run reach one"
        )


def read_average(place: Path) -> dict[str, Any]:
    """The state of a checkpoint's moving average: "n_averaged", and the model's entries below "module."."""
    state: dict[str, Any] = typed(load_file(place / _AVERAGE), dict[str, Any], str(place / _AVERAGE))
    return state


def evaluated_weights(place: Path, recipe: dict[str, Any], known: Iterable[str]) -> dict[str, Tensor]:
    """The weights that a run evaluated: the moving average where its recipe has one.

    Args:
        place: A checkpoint.
        recipe: Of the run.
        known: The model's names.

    Raises:
        CheckpointError: A file is missing or torn.
    """
    if recipe.get("ema_decay") is None:
        return read_weights(place, known)
    return {name.removeprefix("module."): value for name, value in read_average(place).items() if name != "n_averaged"}


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What weights lack, have beyond a model's entries, and have in other shapes; a text for each, names listed.

    Args:
        own: The model's state dict.
        given: The weights.
    """
    # safetensors leaves further names of a shared tensor out, and old files know no counter of batches.
    there = {tensor.data_ptr() for name, tensor in own.items() if name in given}
    lacking = [
        name
        for name, tensor in own.items()
        if name not in given and tensor.data_ptr() not in there and not name.endswith("num_batches_tracked")
    ]
    strange = [name for name in given if name not in own]
    shapes = [
        f"{name} {list(given[name].shape)} in place of {list(own[name].shape)}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    said = {"lacks": lacking, "has beyond it": strange, "has in other shapes": shapes}
    return [f"it {what} {_listed(names)}" for what, names in said.items() if names]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
