"""The weights of runs, exports and files: which of them to use, and a run's initial weights."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.checkpoint.conversion import read_weights
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import ACCURACY, Manifest, read_manifest, verify
from robust_dist.data.identity import fingerprint
from robust_dist.documents import read_json, read_yaml, typed
from robust_dist.models.weights import check_published, head_of, is_below, read_published
from robust_dist.ranks.talk import agree, attempt, on_rank_0
from robust_dist.train.folder import RunFolder
from robust_dist.train.optimizers import averages_weights
from robust_dist.train.recipe import Recipe
from robust_dist.train.sources import preprocessing_of

# Files of `robust-dist export`: the weights, and a record for their use.
WEIGHTS, RECORD = "model.safetensors", "model.json"
# Accelerate's name for the moving average, the only object that a run registers with it.
_AVERAGE = "custom_checkpoint_0.pkl"
_NAMED = 5
_STATE_DICTS = ("model", "model_state_dict", "state_dict")
_WRAPPED = "module."
# Mean and standard deviation, on the scale 0 to 1, are written with three or four digits.
_SAME = 2e-3


def run_of(folder: Path) -> Path | None:
    """The run that contains, or is, a folder."""
    places = (folder.absolute(), *folder.absolute().parents)
    return next((place for place in places if (place / "recipe.yaml").is_file()), None)


def why_none(folder: Path) -> str:
    """Why a folder is neither a run's nor an export."""
    if not folder.exists():
        return "there is no such folder"
    above = run_of(folder)
    hint = "" if above is None else f"; it belongs to a run: name {above}"
    return f"has neither a run's recipe.yaml nor an export's {RECORD}{hint}"


def data_of(run: RunFolder) -> dict[str, Any]:
    """The content of a run's `data.json`; a ValueError if there is none."""
    try:
        data: dict[str, Any] = read_json(run.data_path, dict[str, Any])
    except FileNotFoundError:
        raise ValueError(
            f"{run.path} has no data.json, which names the classes: run its command once more to write it"
        ) from None
    return data


def choose(run: RunFolder, checkpoint: str | int) -> tuple[Path, Manifest]:
    """A run's checkpoint ("last", "best", or a step) and its manifest.

    Raises:
        CheckpointError: There is no such checkpoint, or it is torn.
        ValueError: `checkpoint` is none of these.
    """
    store = CheckpointStore(run.checkpoints)
    steps = store.steps()
    if not steps:
        raise CheckpointError(f"{run.checkpoints} has no checkpoint yet")
    there = f"there are those of step {', '.join(map(str, steps))}"
    if checkpoint == "best":
        step = _best(store, steps, run)
    elif checkpoint == "last":
        step = steps[-1]
    elif str(checkpoint).isdigit():
        step = int(checkpoint)
    else:
        raise ValueError(f"checkpoint={checkpoint!r} is not last, best or a step; {there}")
    if step not in steps:
        raise CheckpointError(f"{run.checkpoints} has no checkpoint of step {step}; {there}")
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
        raise CheckpointError(
            f"{run.checkpoints} has no complete checkpoint of an epoch's end, so none has an accuracy"
        )
    return max(scored)[1]


def check_evaluated(place: Path, manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Reject the weights that a schedule-free optimizer trains, as opposed to their average."""
    if manifest.metadata.get(ACCURACY) is not None:
        return
    section = recipe.get("optimizer") or {}
    if averages_weights(section):
        raise CheckpointError(
            f"{place}: was saved within an epoch, so it holds the weights that optimizer.name={section['name']!r} "
            "trains and not the average that is evaluated, whose batch statistics need training data: name a "
            "checkpoint of an epoch's end, or let the run reach one"
        )


def read_average(place: Path) -> dict[str, Any]:
    """The state of a checkpoint's moving average: "n_averaged", and the model's entries below "module."."""
    state: dict[str, Any] = typed(load_file(place / _AVERAGE), dict[str, Any], str(place / _AVERAGE))
    return state


def evaluated_weights(place: Path, recipe: dict[str, Any], known: Iterable[str]) -> dict[str, Tensor]:
    """The weights that a run evaluated, from a checkpoint: the moving average if its recipe has one.

    `known` are the model's names. A missing or torn file is a CheckpointError.
    """
    if recipe.get("ema_decay") is None:
        return read_weights(place, known)
    return {name.removeprefix("module."): value for name, value in read_average(place).items() if name != "n_averaged"}


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What weights lack, have in addition to a model's entries, and have in other shapes; one text each, with names."""
    # safetensors omits other names of a shared tensor, and old files have no counter of batches.
    there = {tensor.data_ptr() for name, tensor in own.items() if name in given}
    lacking = [
        name
        for name, tensor in own.items()
        if name not in given and tensor.data_ptr() not in there and not name.endswith("num_batches_tracked")
    ]
    strange = [name for name in given if name not in own]
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    said = {"lacks": lacking, "has in addition": strange, "has with other shapes": shapes}
    return [f"it {what} {_listed(names)}" for what, names in said.items() if names]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class Weights:
    """Weights from elsewhere; None for unknown values.

    Attributes:
        title: A readable name.
        entries: The state dict.
        classes: Names of their classes, in label order.
        num_classes: Number of their classes.
        mean: Per channel, of their training images, on the scale 0 to 1.
        std: Per channel, likewise.
        model: The recipe's name of their model.
        average: The state of a moving average beside them.
    """

    title: str
    entries: dict[str, Tensor]
    classes: tuple[str, ...] | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    model: str | None = None
    average: dict[str, Any] | None = None


# From the whole model with fresh weights, and its classes, to the weights to be loaded into it.
Reader = Callable[[nn.Module, int], Weights]


@dataclass(frozen=True)
class Begun:
    """The outcome of `begin`.

    Attributes:
        lines: For the user, if weights were loaded.
        warnings: Likely mistakes.
        average: The state from which the run's own moving average continues.
    """

    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    average: dict[str, Any] | None = field(default=None, repr=False)


def begin(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, model: nn.Module, classes: tuple[str, ...]
) -> Begun:
    """Fill a new run's model with the weights that its recipe names; a collective, before any engine wraps the model.

    A run that has a checkpoint resumes from that and ignores its initial weights.

    Args:
        recipe: The run's.
        accelerator: The engine.
        folder: The run's.
        model: Whole, with fresh weights.
        classes: Names of the run's classes.

    Raises:
        ValueError: On every rank: the weights are missing, cannot be downloaded, do not fit the model, or differ
            between ranks.
    """
    if not on_rank_0(lambda: _are_wanted(recipe, folder)):
        return Begun()
    first = accelerator.is_local_main_process

    def read() -> Weights:
        return _reader(recipe, folder)(model, len(classes))

    # The first rank of a host downloads what is missing.
    one = attempt(read, here=first)
    other = attempt(read, here=not first)
    found = one or other
    assert found is not None
    begun = attempt(lambda: load(recipe, model, found, classes))
    assert begun is not None
    problem = "the ranks start from different weights; give every host the same files"
    agree({_setting(recipe): _checksum(model)}, problem)
    return begun


def check_there(recipe: Recipe, folder: RunFolder) -> None:
    """Reject initial weights that do not exist; the ValueError names the setting."""
    if _are_wanted(recipe, folder):
        _reader(recipe, folder)


def _are_wanted(recipe: Recipe, folder: RunFolder) -> bool:
    named = recipe.init_from is not None or recipe.model.weights is not None
    return named and not CheckpointStore(folder.checkpoints).steps()


def load(recipe: Recipe, model: nn.Module, found: Weights, classes: tuple[str, ...]) -> Begun:
    """Copy weights into a model; if their classes differ, the head stays. A ValueError lists mismatches."""
    own, head = model.state_dict(), head_of(model, len(classes))
    keeps, why = _keeps_head(found, classes, own, head)
    strict = recipe.init_from is not None
    skipped = () if keeps or strict else head
    given = {name: value for name, value in found.entries.items() if not is_below(name, skipped)}
    wanted = {name: value for name, value in own.items() if not is_below(name, skipped)}
    problems = mismatches(wanted, given)
    if found.model not in (None, recipe.model.name) and problems:
        problems.insert(0, f"its model is {found.model}")
    if strict and not keeps:
        problems.insert(0, f"{why}; to keep all but the head, set model.weights instead of init_from")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"{_setting(recipe)}: the weights ({found.title}) do not fit model.name={recipe.model.name!r} with "
            f"model.options={recipe.model.options} and {len(classes):,} classes:\n  {listed}"
        )
    model.load_state_dict({**own, **given})
    line = f"weights: {found.title}" + (f"; {why}: {_head_line(head, len(classes))}" if skipped else ", head included")
    return Begun((line,), _warnings(recipe, found), found.average)


def _setting(recipe: Recipe) -> str:
    return f"init_from={recipe.init_from!r}" if recipe.init_from else f"model.weights={recipe.model.weights!r}"


def _head_line(head: tuple[str, ...], num_classes: int) -> str:
    return f"the head ({', '.join(head)}) is new, with {num_classes:,} outputs"


def _keeps_head(
    found: Weights, classes: tuple[str, ...], own: Mapping[str, Tensor], head: tuple[str, ...]
) -> tuple[bool, str]:
    """Whether the head of the weights is for the run's classes; and, for a person, why not."""
    if found.classes is not None:
        return found.classes == classes, _classes_differ(found.classes, classes)
    if found.num_classes:
        return found.num_classes == len(classes), f"it has {found.num_classes:,} classes, this run {len(classes):,}"
    entries = {name: value for name, value in own.items() if is_below(name, head)}
    there = [name for name in entries if name in found.entries]
    if not there or found.num_classes == 0:
        return False, f"it has no head for the {len(classes):,} classes of this run"
    other = next((name for name in there if found.entries[name].shape != entries[name].shape), None)
    return other is None and len(there) == len(entries), "" if other is None else (
        f"it has {found.entries[other].shape[0]:,} classes, this run {len(classes):,}"
    )


def _classes_differ(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    if len(theirs) != len(ours):
        return f"it has {len(theirs):,} classes, this run {len(ours):,}"
    number = next((number for number, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]), 0)
    return f"its classes differ: {number} is {theirs[number]!r}, but {ours[number]!r} in this run"


def _warnings(recipe: Recipe, found: Weights) -> list[str]:
    """A warning if the run normalises images differently than in the training of the weights."""
    image = preprocessing_of(recipe.data)
    pairs = {"mean": (found.mean, tuple(image.mean)), "std": (found.std, tuple(image.std))}
    if all(theirs is None or _are_close(theirs, ours) for theirs, ours in pairs.values()):
        return []
    there, here = (
        ", ".join(f"{name} {_rounded(pair[place])}" for name, pair in pairs.items() if pair[0]) for place in (0, 1)
    )
    remedy = (
        "set data.mean and data.std to theirs" if recipe.data.source else f"data.name={recipe.data.name} fixes them"
    )
    return [f"{_setting(recipe)}: these weights were trained on images with {there}; this run has {here}: {remedy}"]


def _are_close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) <= _SAME for a, b in zip(ours, theirs, strict=True))


def _rounded(values: Sequence[float] | None) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values or ())}]"


def _checksum(model: nn.Module) -> str:
    tensors = (tensor.detach().reshape(-1).contiguous() for tensor in model.state_dict().values())
    return fingerprint(*(tensor.view(torch.uint8).numpy() for tensor in tensors if tensor.numel()))


def _reader(recipe: Recipe, folder: RunFolder) -> Reader:
    """The reader of the weights that a recipe names; anything wrong with the name is reported before."""
    given = recipe.init_from or recipe.model.weights
    assert given is not None
    path = Path(given).expanduser()
    is_run = (path / "recipe.yaml").is_file() and not (path / RECORD).is_file()
    if recipe.init_checkpoint != "last" and not is_run:
        raise ValueError(f"init_checkpoint={recipe.init_checkpoint!r} is for a run, which {_setting(recipe)} is not")
    if not path.exists() and recipe.init_from is None and not _is_path(given):
        check_published(recipe.model.name, given)
        return partial(_read_published, recipe, given)
    with _setting_named(recipe):
        reader = _reader_of_path(recipe, path, folder)

    def read(model: nn.Module, num_classes: int) -> Weights:
        with _setting_named(recipe):
            return reader(model, num_classes)

    return read


@contextmanager
def _setting_named(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{_setting(recipe)}: {error}") from None


def _read_published(recipe: Recipe, given: str, model: nn.Module, num_classes: int) -> Weights:
    channels = len(preprocessing_of(recipe.data).mean)
    published = read_published(recipe.model.name, given, num_classes, channels, recipe.model.options)
    return Weights(**vars(published), model=None)


def _is_path(given: str) -> bool:
    return os.sep in given or given.startswith("~") or Path(given).suffix in (*_FILES,)


def _reader_of_path(recipe: Recipe, path: Path, folder: RunFolder) -> Reader:
    if path.is_file():
        if recipe.init_from is not None:
            raise ValueError("is a file; name a run's folder, or set model.weights instead of init_from")
        if path.suffix not in _FILES:
            raise ValueError(f"{path}: weight files end in {', '.join(_FILES)}")
        return lambda model, _: Weights(str(path), _bare(_FILES[path.suffix](path), model))
    if (path / RECORD).is_file():
        return lambda *_: _read_export(path)
    if (path / "recipe.yaml").is_file():
        if path.resolve() == folder.path.resolve():
            raise ValueError("is the folder of this run, which resumes by itself; give another run_dir")
        return _reader_of_run(recipe, path)
    if recipe.init_from is None and path.is_dir() and run_of(path) is None:
        return lambda model, _: Weights(str(path), read_weights(path, model.state_dict()))
    if recipe.init_from is None and not path.exists():
        raise ValueError("there is no such file or folder")
    raise ValueError(why_none(path))


def _reader_of_run(recipe: Recipe, path: Path) -> Reader:
    run = RunFolder(path)
    theirs = typed(read_yaml(path / "recipe.yaml").data, dict[str, Any], str(path / "recipe.yaml"))
    data = data_of(run)
    place, manifest = choose(run, recipe.init_checkpoint)
    check_evaluated(place, manifest, theirs)
    averages = theirs.get("ema_decay") is not None
    goes_on = averages and recipe.init_from is not None and recipe.ema_decay is not None

    def read(model: nn.Module, _: int) -> Weights:
        known = model.state_dict()
        return Weights(
            f"{path}, step {manifest.step}" + (" (moving average)" if averages and not goes_on else ""),
            read_weights(place, known) if goes_on else evaluated_weights(place, theirs, known),
            classes=tuple(typed(data.get("classes"), list[str], f"{run.data_path}: classes")),
            **_noted_pixels(data.get("preprocessing")),
            model=(theirs.get("model") or {}).get("name"),
            average=read_average(place) if goes_on else None,
        )

    return read


def _read_export(path: Path) -> Weights:
    record: dict[str, Any] = read_json(path / RECORD, dict[str, Any])
    return Weights(
        str(path),
        _read_safetensors(path / WEIGHTS),
        classes=tuple(typed(record.get("classes"), list[str], f"{path / RECORD}: classes")),
        **_noted_pixels(record.get("preprocessing")),
        model=(record.get("recipe", {}).get("model") or {}).get("name"),
    )


def _noted_pixels(noted: Any) -> dict[str, Any]:
    """Mean and standard deviation, as far as they are recorded."""
    values = noted if isinstance(noted, dict) else {}
    return {key: tuple(values[key]) for key in ("mean", "std") if isinstance(values.get(key), list)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: torn, or not a safetensors file ({str(error).splitlines()[0]})") from None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    content = load_file(path)
    for _ in range(2):
        inner = [content[key] for key in _STATE_DICTS if isinstance(content, Mapping) and key in content]
        content = inner[0] if inner and isinstance(inner[0], Mapping) else content
    found = {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        has = f"it has {', '.join(list(found)[:5])}" if found else f"it is a {type(content).__name__}"
        raise ValueError(f"{path}: has no state dict, nor one called {', '.join(_STATE_DICTS)}; {has}")
    return found


def _bare(entries: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries without the "module." prefix that DDP adds to all names."""
    wrapped = all(name.startswith(_WRAPPED) for name in entries)
    if wrapped and not any(name.startswith(_WRAPPED) for name in model.state_dict()):
        return {name.removeprefix(_WRAPPED): value for name, value in entries.items()}
    return entries


_FILES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_state_dict),
}
