"""A study's YAML file, checked to the last cell before anything runs."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import yaml

from robust_dist.study.grid import Axis, Cell, Study
from robust_dist.study.keys import StudyError, check_key, label_of, word_of
from robust_dist.train.optimizers import check_fits
from robust_dist.train.recipe import Recipe, parse_recipe, recipe_dict

_KEYS = ("description", "base", "set", "budget", "seeds", "axes", "compare", "reference", "paper")
# A run of a study shows itself in the study's own lines, and its last checkpoint is enough to go on.
_QUIET = {"tracking.progress": False, "tracking.trackers": [], "checkpoint.keep": 1}


def load_study(path: str | Path) -> tuple[Study, dict[str, Recipe]]:
    """Read a study.

    Args:
        path: The YAML file; its `base` is relative to it.

    Returns:
        The study, and every cell's recipe by the cell's name (seed and run_dir are the runs' own).

    Raises:
        StudyError: An unknown key, an axis that is no recipe key, an empty axis, a value of the wrong type in any
            cell, ...; the message names it.
    """
    path = Path(path)
    data = _mapping(yaml.safe_load(_read(path)), str(path))
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise StudyError(f"{path}: unknown key {unknown[0]!r}; a study has {', '.join(_KEYS)}")
    missing = [key for key in ("base", "axes", "seeds") if key not in data]
    if missing:
        raise StudyError(f"{path}: {missing[0]!r} is missing")
    axes = _axes(data["axes"], path)
    words = _shared_words(data, axes, path)
    study = Study(
        name=path.stem,
        description=str(data.get("description", "")),
        base=recipe_dict(_recipe(words, f"{path}: base and set")),
        axes=axes,
        seeds=_seeds(data["seeds"], path),
        **_comparison(data, axes, path),
        paper=_paper(data.get("paper"), axes, path),
    )
    return study, _recipes(study.cells(), words, path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}; give a study's YAML file, as those of configs/studies") from error


def _mapping(data: Any, where: str) -> dict[Any, Any]:
    if not isinstance(data, dict):
        raise StudyError(f"{where} must be a mapping of keys to values, not {type(data).__name__}")
    return data


def _axes(data: Any, path: Path) -> tuple[Axis, ...]:
    axes = tuple(_axis(str(name), places, f"{path}: axes.{name}") for name, places in _mapping(data, "axes").items())
    if not axes:
        raise StudyError(f"{path}: axes is empty; name at least one")
    owners: dict[str, str] = {}
    for axis in axes:
        for key in dict.fromkeys(key for settings in axis.settings for key in settings):
            if owners.setdefault(key, axis.name) != axis.name:
                raise StudyError(f"{path}: {key!r} is set by the axes {owners[key]!r} and {axis.name!r}")
    return axes


def _axis(name: str, places: Any, where: str) -> Axis:
    if isinstance(places, list):
        key = check_key(name, where, moves_weights=True)
        labels, settings = [label_of(value) for value in places], [{key: value} for value in places]
    else:
        rows = _mapping(places, f"{where} (values, or rows by their labels)")
        labels, settings = [label_of(label) for label in rows], [_row(row, where) for row in rows.values()]
    if not labels:
        raise StudyError(f"{where} is empty; give at least one value")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise StudyError(f"{where} has {twice[0]!r} twice")
    return Axis(name, tuple(labels), tuple(settings))


def _row(row: Any, where: str) -> dict[str, Any]:
    return {check_key(key, where, moves_weights=True): value for key, value in _mapping(row or {}, where).items()}


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise StudyError(f"{path}: seeds={seeds!r} must be a list of whole numbers, as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: seeds={seeds!r} has a number twice")
    return tuple(seeds)


def _comparison(data: dict[str, Any], axes: tuple[Axis, ...], path: Path) -> dict[str, str | None]:
    compare, reference = data.get("compare"), data.get("reference")
    named = {axis.name: axis for axis in axes}
    if compare is None:
        if reference is not None:
            raise StudyError(f"{path}: reference={reference!r} needs compare, the axis that it is a place of")
        return {"compare": None, "reference": None}
    if compare not in named:
        raise StudyError(f"{path}: compare={compare!r} is no axis; there are {', '.join(named)}")
    labels = named[compare].labels
    reference = labels[0] if reference is None else label_of(reference)
    if reference not in labels:
        raise StudyError(f"{path}: reference={reference!r} is no place of {compare!r}; there are {', '.join(labels)}")
    return {"compare": compare, "reference": reference}


def _paper(data: Any, axes: tuple[Axis, ...], path: Path) -> dict[tuple[str, ...], float | str]:
    """The paper's figures: mappings as deep as there are axes, or deeper by none."""
    found: dict[tuple[str, ...], float | str] = {}

    def walk(node: Any, labels: tuple[str, ...]) -> None:
        where = f"{path}: paper" + "".join(f".{label}" for label in labels)
        if len(labels) == len(axes):
            if node != "diverged" and not isinstance(node, (int, float)):
                raise StudyError(f"{where}={node!r} must be a percentage or 'diverged'")
            found[labels] = node
            return
        for key, inner in _mapping(node, where).items():
            axis, label = axes[len(labels)], label_of(key)
            if label not in axis.labels:
                raise StudyError(f"{where}: {label!r} is no place of {axis.name!r} ({', '.join(axis.labels)})")
            walk(inner, (*labels, label))

    walk(data or {}, ())
    return found


def _shared_words(data: dict[str, Any], axes: tuple[Axis, ...], path: Path) -> list[str]:
    """The command line that all cells share: the base recipe, `set`, and the budget."""
    base = path.parent / str(data["base"])
    if not base.is_file():
        raise StudyError(f"{path}: base={data['base']!r} is no file beside it ({base})")
    where = f"{path}: set"
    settings = {check_key(k, where, moves_weights=False): v for k, v in _mapping(data.get("set") or {}, where).items()}
    settings |= _budget(data.get("budget"), axes, settings, path)
    twice = [key for axis in axes for places in axis.settings for key in places if key in settings]
    if twice:
        raise StudyError(f"{path}: {twice[0]!r} is set for all cells and by an axis, too")
    return ["--config", str(base), *_words(_QUIET | settings)]


def _budget(budget: Any, axes: tuple[Axis, ...], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    moved = any("epochs" in places for axis in axes for places in axis.settings)
    if budget is None:
        if moved:
            return {}
        raise StudyError(f"{path}: budget is missing; every cell trains equally long, as budget: {{epochs: 30}}")
    given = _mapping(budget, f"{path}: budget")
    if set(given) != {"epochs"} or moved or "epochs" in settings:
        raise StudyError(
            f"{path}: budget={budget!r} must be {{epochs: N}}, which alone sets the epochs; leave it out where epochs "
            "is an axis"
        )
    return given


def _words(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", word_of(value))]


def _recipes(cells: list[Cell], words: list[str], path: Path) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for cell in cells:
        if cell.name in found:
            raise StudyError(f"{path}: two cells would share the file name {cell.name!r}; choose other labels")
        found[cell.name] = _recipe([*words, *_words(cell.settings)], f"{path}: cell {', '.join(cell.labels)}")
    return found


def _recipe(words: list[str], where: str) -> Recipe:
    """The recipe's own parser; what it finds is said with the place in the study."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            recipe = parse_recipe(words)
        check_fits(recipe)
    except SystemExit as error:
        message = re.sub(r"(?s)^.*?error: ", "", said.getvalue(), count=1).strip()
        raise StudyError(f"{where}: {message}") from error
    except ValueError as error:
        raise StudyError(f"{where}: {error}") from error
    return recipe
