"""A study's YAML file, checked to the last cell before anything runs."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_dist.documents import Document, DocumentError, Place, config_names, find_config, read_yaml
from robust_dist.study.grid import Axis, Cell, Study, StudyError
from robust_dist.train.build import check_own
from robust_dist.train.keys import keys_of
from robust_dist.train.optimizers import check_fits
from robust_dist.train.parse import Settings, fitted
from robust_dist.train.recipe import Recipe, recipe_dict

_KEYS = ("description", "base", "set", "budget", "seeds", "axes", "compare", "reference", "paper", "tasks", "defaults")
_MOST_CELLS = 10_000
# Characters of a file's name, with the seed and the suffix added to it.
_MOST_LETTERS = 200
# The study's own lines show its runs, the last checkpoint is enough to resume, and all runs train equally
# long.
_QUIET = {"tracking.progress": False, "tracking.trackers": [], "checkpoint.keep": 1, "early_stopping.patience": None}
# A study sets these itself.
OWN = ("seed", "run_dir")
_STOPS = "early_stopping."


def load_study(path: str | Path) -> tuple[Study, dict[str, Recipe]]:
    """Read and check a study.

    Args:
        path: The YAML file, or the name of one of the package's studies; its `base` is relative to it, or the name of
            one of the package's recipes.

    Returns:
        The study, and every cell's recipe by the cell's name (seed and run_dir are the runs' own).

    Raises:
        StudyError: An unknown key, an axis that is no recipe key, an empty axis, a value of the wrong type in any cell,
            ...; the message names it.
    """
    path = find_config("studies", path)
    document = _read(path)
    data = _mapping(document.data, str(path))
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise StudyError(f"{document.where((unknown[0],))}: unknown key {unknown[0]!r}; a study has {', '.join(_KEYS)}")
    missing = [key for key in ("base", "axes", "seeds") if key not in data]
    if missing:
        raise StudyError(f"{path}: {missing[0]!r} is missing")
    for key in ("description", "base"):
        if key in data and not isinstance(data[key], str):
            raise StudyError(f"{document.where((key,))}: {key}={data[key]!r} must be text")
    axes = _axes(document, path)
    base, shared = _shared(document, axes, path)
    study = Study(
        name=path.stem,
        description=data.get("description", ""),
        base=recipe_dict(_recipe(base, shared, f"{path}: base and set")),
        axes=axes,
        seeds=_seeds(data["seeds"], path),
        **_comparison(data, axes, path),
        **_judged(data, axes, path),
        paper=_paper(data.get("paper"), axes, path),
    )
    return study, _recipes(study.cells(), base, shared, path)


def _read(path: Path, *, doubts: bool = False) -> Document:
    advice = f"give a study's YAML file, or one of the package's: {', '.join(config_names('studies'))}"
    try:
        return read_yaml(path, doubts=doubts)
    except FileNotFoundError:
        raise StudyError(f"{path}: there is no such file; {advice}") from None
    except DocumentError as error:
        raise StudyError(f"{error}; {advice}") from error


def _mapping(data: Any, where: str) -> dict[Any, Any]:
    if not isinstance(data, dict):
        raise StudyError(f"{where} must be a mapping of keys to values, not {type(data).__name__}")
    return data


def _axes(document: Document, path: Path) -> tuple[Axis, ...]:
    rows = _mapping(document.data["axes"], f"{document.where(('axes',))}: axes")
    axes = tuple(_axis(document, name, f"{path}: axes.{name}") for name in rows)
    if not axes:
        raise StudyError(f"{path}: axes is empty; name at least one")
    cells = math.prod(len(axis.labels) for axis in axes)
    if cells > _MOST_CELLS:
        raise StudyError(f"{path}: axes make {cells} cells, and a study has at most {_MOST_CELLS}")
    owners: dict[str, str] = {}
    for axis in axes:
        for key in dict.fromkeys(key for settings in axis.settings for key in settings):
            if owners.setdefault(key, axis.name) != axis.name:
                raise StudyError(f"{path}: {key!r} is set by the axes {owners[key]!r} and {axis.name!r}")
    return axes


def _axis(document: Document, name: Any, where: str) -> Axis:
    places, place = document.data["axes"][name], ("axes", name)
    if isinstance(places, list):
        key = check_key(name, where, moves_weights=True)
        settings = [{key: fitted(Recipe, document, (*place, i), value, key)} for i, value in enumerate(places)]
        labels = [label_of(setting[key]) for setting in settings]
    else:
        rows = _mapping(places, f"{where} (values, or rows by their labels)")
        labels = [label_of(label) for label in rows]
        settings = [_row(document, (*place, label), row, where) for label, row in rows.items()]
    if not labels:
        raise StudyError(f"{where} is empty; give at least one value")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise StudyError(f"{where} has {twice[0]!r} twice")
    return Axis(str(name), tuple(labels), tuple(settings))


def _row(document: Document, place: Place, row: Any, where: str, *, moves_weights: bool = True) -> dict[str, Any]:
    """A mapping of recipe keys to values; an empty one sets nothing."""
    given = {} if row is None else _mapping(row, where)
    keys = {check_key(key, where, moves_weights=moves_weights): value for key, value in given.items()}
    return {key: fitted(Recipe, document, (*place, key), value, key) for key, value in keys.items()}


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise StudyError(f"{path}: seeds={seeds!r} must be a list of whole numbers, as [0, 1, 2]")
    if max(seeds) >= 2**63:
        raise StudyError(f"{path}: seeds={seeds!r} must be below 2**63")
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: seeds={seeds!r} has a number twice")
    return tuple(seeds)


def _comparison(data: Mapping[str, Any], axes: tuple[Axis, ...], path: Path) -> dict[str, Any]:
    compare, reference = data.get("compare"), data.get("reference")
    named = {axis.name: axis for axis in axes}
    if compare is None:
        if reference is not None:
            raise StudyError(f"{path}: reference={reference!r} needs compare, the axis that it is a place of")
        return {"compare": None, "reference": None}
    if not isinstance(compare, str) or compare not in named:
        raise StudyError(f"{path}: compare={compare!r} is no axis; there are {', '.join(named)}")
    labels = named[compare].labels
    reference = labels[0] if reference is None else label_of(reference)
    if reference not in labels:
        raise StudyError(f"{path}: reference={reference!r} is no place of {compare!r}; there are {', '.join(labels)}")
    return {"compare": compare, "reference": reference}


def _judged(data: Mapping[str, Any], axes: tuple[Axis, ...], path: Path) -> dict[str, Any]:
    """The axis of tasks, and the contenders' defaults on the axis of rates."""
    tasks, defaults, compare = data.get("tasks"), data.get("defaults"), data.get("compare")
    given = [key for key in ("tasks", "defaults") if data.get(key) is not None]
    if given and compare is None:
        raise StudyError(f"{path}: {given[0]} needs compare, the axis of what is judged")
    others = [axis for axis in axes if axis.name != compare]
    if tasks is not None and (not isinstance(tasks, str) or tasks not in [axis.name for axis in others]):
        names = ", ".join(axis.name for axis in others) or "none"
        raise StudyError(f"{path}: tasks={tasks!r} must be an axis beside compare; there are {names}")
    rates = [axis for axis in others if axis.name != tasks]
    if defaults is None:
        if tasks is not None and rates:
            raise StudyError(f"{path}: tasks needs defaults, each contender's place on the axis {rates[0].name!r}")
        return {"tasks": tasks, "defaults": {}}
    found = {label_of(key): label_of(value) for key, value in _mapping(defaults, f"{path}: defaults").items()}
    if len(rates) != 1:
        raise StudyError(f"{path}: defaults needs one axis beside compare and tasks; there are {len(rates)}")
    (contenders,) = (axis.labels for axis in axes if axis.name == compare)
    if set(found) != set(contenders):
        strange = [name for name in found if name not in contenders]
        unknown = f"; {', '.join(strange)} is no place of {compare!r}" if strange else ""
        raise StudyError(
            f"{path}: defaults must have a place of {rates[0].name!r} for each of {', '.join(contenders)}{unknown}"
        )
    wrong = [f"{key}: {value}" for key, value in found.items() if value not in rates[0].labels]
    if wrong:
        raise StudyError(
            f"{path}: defaults: {', '.join(wrong)} is no place of {rates[0].name!r} ({', '.join(rates[0].labels)})"
        )
    return {"tasks": tasks, "defaults": found}


def _paper(data: Any, axes: tuple[Axis, ...], path: Path) -> dict[tuple[str, ...], float | str]:
    """The paper's figures: mappings as deep as there are axes, or deeper by none."""
    found: dict[tuple[str, ...], float | str] = {}

    def walk(node: Any, labels: tuple[str, ...]) -> None:
        where = f"{path}: paper" + "".join(f".{label}" for label in labels)
        if len(labels) == len(axes):
            if node != "diverged" and (type(node) not in (int, float) or not 0 <= node <= 100):
                raise StudyError(f"{where}={node!r} must be a percentage or 'diverged'")
            found[labels] = node
            return
        for key, inner in _mapping(node, where).items():
            axis, label = axes[len(labels)], label_of(key)
            if label not in axis.labels:
                raise StudyError(f"{where}: {label!r} is no place of {axis.name!r} ({', '.join(axis.labels)})")
            walk(inner, (*labels, label))

    walk({} if data is None else data, ())
    return found


def _shared(document: Document, axes: tuple[Axis, ...], path: Path) -> tuple[Document, dict[str, Any]]:
    """What all cells share: the base recipe, and settings from `set` and the budget."""
    data = document.data
    base = path.parent / os.path.expanduser(data["base"])
    base = base if base.is_file() else find_config("recipes", data["base"])
    if not base.is_file():
        raise StudyError(f"{path}: base={data['base']!r} is no file beside it ({base}), and no recipe of the package")
    settings = _row(document, ("set",), data.get("set"), f"{path}: set", moves_weights=False)
    settings |= _budget(data.get("budget"), axes, settings, path)
    twice = [key for axis in axes for places in axis.settings for key in places if key in settings]
    if twice:
        raise StudyError(f"{path}: {twice[0]!r} is set for all cells and by an axis, too")
    return _read(base, doubts=True), _QUIET | settings


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


def _recipes(cells: list[Cell], base: Document, shared: dict[str, Any], path: Path) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for cell in cells:
        if cell.name in found:
            raise StudyError(f"{path}: two cells would share the file name {cell.name!r}; choose other labels")
        if len(cell.name) > _MOST_LETTERS:
            raise StudyError(
                f"{path}: the file name {cell.name[:40]!r}... of a cell is too long; choose shorter labels"
            )
        found[cell.name] = _recipe(base, shared | cell.settings, f"{path}: cell {', '.join(cell.labels)}")
    return found


def _recipe(base: Document, given: dict[str, Any], where: str) -> Recipe:
    """The base recipe with settings; an error names the place in the study."""
    settings = Settings(Recipe)
    try:
        settings.take(base, base.data, (), "")
        for key, value in given.items():
            settings.set(key, Document(value, key), value)
        recipe: Recipe = settings.recipe()
        check_own(recipe)
        check_fits(recipe)
    except ValueError as error:
        raise StudyError(f"{where}: {error}") from error
    return recipe


def check_key(key: Any, where: str, *, moves_weights: bool) -> str:
    """`key` as a recipe key.

    Args:
        key: The key in the file.
        where: The place in the file, for the message.
        moves_weights: Refuse settings that change no result.

    Raises:
        StudyError: It is no recipe key, or one that a study sets itself.
    """
    known = keys_of(Recipe)
    if not isinstance(key, str) or key in known.sections or not known.is_known(key):
        raise StudyError(f"{where}: {key!r} is no key of a recipe{known.did_you_mean(str(key))}")
    if key in OWN or key.startswith(_STOPS) or (moves_weights and known.is_free(key)):
        raise StudyError(f"{where}: {key!r} cannot be set here ({_why_not(key)})")
    return key


def _why_not(key: str) -> str:
    if key == "seed":
        return "give the study's seeds"
    if key.startswith(_STOPS):
        return "all runs of a study train equally long"
    return "every run has a folder of its own" if key == "run_dir" else "it changes no result"


def label_of(value: Any) -> str:
    """A value's name in tables and file names: numbers as %g, regardless of their spelling in the file."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value)
