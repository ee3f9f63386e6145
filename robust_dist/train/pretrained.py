"""Weights that a run begins with: published ones, those of another run, of an export or of a file."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from robust_dist.checkpoint import CheckpointStore
from robust_dist.checkpoint.conversion import read_weights
from robust_dist.checkpoint.plain import load_file
from robust_dist.data.identity import fingerprint
from robust_dist.documents import read_json, read_yaml, typed
from robust_dist.models.weights import head_of, is_below, read_published
from robust_dist.ranks.talk import agree, attempt, on_rank_0
from robust_dist.train.build import preprocessing_of
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import Recipe
from robust_dist.train.run_weights import (
    RECORD,
    WEIGHTS,
    check_evaluated,
    choose,
    data_of,
    evaluated_weights,
    mismatches,
    read_average,
    why_none,
)

_STATE_DICTS = ("model", "model_state_dict", "state_dict")
_WRAPPED = "module."
# Mean and standard deviation, on the scale 0 to 1, are written with three or four digits.
_SAME = 2e-3


@dataclass(frozen=True)
class Weights:
    """Weights from elsewhere.

    Attributes:
        title: What a person knows them by.
        entries: The state dict.
        classes: Names of their classes, by number; None where nothing says them.
        num_classes: How many; None where nothing says it.
        mean: Of each channel of the images that they were trained on, on the scale 0 to 1; None where nothing says it.
        std: Likewise.
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


@dataclass(frozen=True)
class Begun:
    """What became of the weights that a run begins with.

    Attributes:
        lines: For the user, where weights were loaded.
        warnings: Likely mistakes.
        average: The state that the run's own moving average goes on from.
    """

    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    average: dict[str, Any] | None = field(default=None, repr=False)


def begin(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, model: nn.Module, classes: tuple[str, ...]
) -> Begun:
    """Fill a new run's model with the weights that its recipe names; every rank calls this, before any engine wraps it.

    A run that has a checkpoint goes on from that, and what it began with is not looked at again.

    Args:
        recipe: Of the run.
        accelerator: The engine.
        folder: The run's.
        model: Whole, with fresh weights.
        classes: Names of the run's classes.

    Raises:
        ValueError: On every rank: the weights are not there, cannot be fetched, do not fit the model, or are not the
            same on all ranks.
    """
    if recipe.init_from is None and recipe.model.weights is None:
        return Begun()
    if on_rank_0(lambda: bool(CheckpointStore(folder.checkpoints).steps())):
        return Begun()
    first = accelerator.is_local_main_process

    def read() -> Weights:
        return _read(recipe, folder, model, len(classes))

    # Whoever comes first on a host fetches what is missing.
    one = attempt(read, here=first)
    other = attempt(read, here=not first)
    found = one or other
    assert found is not None
    begun = attempt(lambda: load(recipe, model, found, classes))
    assert begun is not None
    problem = "the ranks begin with different weights; give every host the same files"
    agree({_setting(recipe): _checksum(model)}, problem)
    return begun


def load(recipe: Recipe, model: nn.Module, found: Weights, classes: tuple[str, ...]) -> Begun:
    """Copy weights into a model; its head keeps its own where their classes are others.

    Raises:
        ValueError: They do not fit; one message with everything that differs.
    """
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
        problems.insert(0, f"{why}; to begin with all but the head set model.weights in place of init_from")
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
    return f"the head ({', '.join(head)}) is a new one of {num_classes:,}"


def _keeps_head(
    found: Weights, classes: tuple[str, ...], own: Mapping[str, Tensor], head: tuple[str, ...]
) -> tuple[bool, str]:
    """Whether the head of the weights is of the run's classes; and, for a person, why not."""
    if found.classes is not None:
        return found.classes == classes, _classes_differ(found.classes, classes)
    if found.num_classes:
        return found.num_classes == len(classes), f"its classes are {found.num_classes:,}, here are {len(classes):,}"
    entries = {name: value for name, value in own.items() if is_below(name, head)}
    there = [name for name in entries if name in found.entries]
    if not there or found.num_classes == 0:
        return False, f"it has no head for the {len(classes):,} classes here"
    other = next((name for name in there if found.entries[name].shape != entries[name].shape), None)
    return other is None and len(there) == len(entries), "" if other is None else (
        f"its classes are {found.entries[other].shape[0]:,}, here are {len(classes):,}"
    )


def _classes_differ(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    if len(theirs) != len(ours):
        return f"its classes are {len(theirs):,}, here are {len(ours):,}"
    number = next((number for number, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]), 0)
    return f"its classes are others: {number} is {theirs[number]!r}, and {ours[number]!r} here"


def _warnings(recipe: Recipe, found: Weights) -> list[str]:
    """A line where the run normalises images in another way than the weights were trained with."""
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
    return [f"{_setting(recipe)}: these weights were trained on images of {there}; here are {here}: {remedy}"]


def _are_close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) <= _SAME for a, b in zip(ours, theirs, strict=True))


def _rounded(values: Sequence[float] | None) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values or ())}]"


def _checksum(model: nn.Module) -> str:
    tensors = (tensor.detach().reshape(-1).contiguous() for tensor in model.state_dict().values())
    return fingerprint(*(tensor.view(torch.uint8).numpy() for tensor in tensors if tensor.numel()))


def _read(recipe: Recipe, folder: RunFolder, model: nn.Module, num_classes: int) -> Weights:
    given = recipe.init_from or recipe.model.weights
    assert given is not None
    path = Path(given).expanduser()
    is_run = (path / "recipe.yaml").is_file() and not (path / RECORD).is_file()
    if recipe.init_checkpoint != "last" and not is_run:
        raise ValueError(f"init_checkpoint={recipe.init_checkpoint!r} is for a run, and {_setting(recipe)} is none")
    if not path.exists() and recipe.init_from is None and not _is_path(given):
        channels = len(preprocessing_of(recipe.data).mean)
        published = read_published(recipe.model.name, given, num_classes, channels, recipe.model.options)
        return Weights(**vars(published), model=None)
    try:
        return _read_path(recipe, path, folder, model)
    except (ValueError, OSError) as error:
        raise ValueError(f"{_setting(recipe)}: {error}") from None


def _is_path(given: str) -> bool:
    return os.sep in given or given.startswith("~") or Path(given).suffix in (*_FILES,)


def _read_path(recipe: Recipe, path: Path, folder: RunFolder, model: nn.Module) -> Weights:
    if path.is_file():
        if recipe.init_from is not None:
            raise ValueError("is a file; name a run's folder, or set model.weights in place of init_from")
        return Weights(str(path), _bare(_read_file(path), model))
    if (path / RECORD).is_file():
        return _read_export(path)
    if (path / "recipe.yaml").is_file():
        if path.resolve() == folder.path.resolve():
            raise ValueError("is the folder of this run, which goes on by itself; give another run_dir")
        return _read_run(recipe, path, model)
    if recipe.init_from is None and path.is_dir() and " belongs to a run" not in why_none(path):
        return Weights(str(path), read_weights(path, model.state_dict()))
    raise ValueError(why_none(path))


def _read_run(recipe: Recipe, path: Path, model: nn.Module) -> Weights:
    run = RunFolder(path)
    theirs = typed(read_yaml(path / "recipe.yaml").data, dict[str, Any], str(path / "recipe.yaml"))
    data = data_of(run)
    place, manifest = choose(run, recipe.init_checkpoint)
    check_evaluated(place, manifest, theirs)
    known = model.state_dict()
    goes_on = recipe.init_from is not None and recipe.ema_decay is not None and theirs.get("ema_decay") is not None
    return Weights(
        f"{path}, step {manifest.step}" + ("" if theirs.get("ema_decay") is None or goes_on else " (moving average)"),
        read_weights(place, known) if goes_on else evaluated_weights(place, theirs, known),
        classes=tuple(typed(data.get("classes"), list[str], f"{run.data_path}: classes")),
        **_pixels(data.get("preprocessing")),
        model=(theirs.get("model") or {}).get("name"),
        average=read_average(place) if goes_on else None,
    )


def _read_export(path: Path) -> Weights:
    record: dict[str, Any] = read_json(path / RECORD, dict[str, Any])
    return Weights(
        str(path),
        _read_safetensors(path / WEIGHTS),
        classes=tuple(typed(record.get("classes"), list[str], f"{path / RECORD}: classes")),
        **_pixels(record.get("preprocessing")),
        model=(record.get("recipe", {}).get("model") or {}).get("name"),
    )


def _pixels(noted: Any) -> dict[str, Any]:
    """Mean and standard deviation, as far as they are noted."""
    values = noted if isinstance(noted, dict) else {}
    return {key: tuple(values[key]) for key in ("mean", "std") if isinstance(values.get(key), list)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: torn, or no safetensors file ({str(error).splitlines()[0]})") from None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    content = load_file(path)
    for _ in range(2):
        inner = [content[key] for key in _STATE_DICTS if isinstance(content, Mapping) and key in content]
        content = inner[0] if inner and isinstance(inner[0], Mapping) else content
    found = {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        has = f"it has {', '.join(list(found)[:5])}" if found else f"it is a {type(content).__name__}"
        raise ValueError(f"{path}: holds no state dict, nor one called {', '.join(_STATE_DICTS)}; {has}")
    return found


_FILES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_state_dict),
}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _FILES:
        raise ValueError(f"{path}: weights are files that end in {', '.join(_FILES)}")
    return _FILES[path.suffix](path)


def _bare(entries: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries without the "module." that DDP puts in front of all names."""
    wrapped = all(name.startswith(_WRAPPED) for name in entries)
    if wrapped and not any(name.startswith(_WRAPPED) for name in model.state_dict()):
        return {name.removeprefix(_WRAPPED): value for name, value in entries.items()}
    return entries
