"""A study's axes, cells and runs: what is trained, and under which names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from robust_dist.documents import DocumentError, typed


class StudyError(ValueError):
    """A study's file, folder or command that cannot be used; the message says what would be right."""


@dataclass(frozen=True)
class Axis:
    """One direction of the grid.

    Attributes:
        name: A recipe key, or any word where a label sets several keys together.
        labels: The names of its places, in order.
        settings: For each place, recipe keys (dotted) and their values.
    """

    name: str
    labels: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]

    def values_of(self, key: str) -> list[float] | None:
        """The numbers that this axis gives to a recipe key; None where it does not set it."""
        try:
            return [float(settings[key]) for settings in self.settings]
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Cell:
    """One place of the grid: its label on every axis, and the recipe keys that it sets."""

    labels: tuple[str, ...]
    settings: dict[str, Any] = field(hash=False, compare=False)

    @property
    def name(self) -> str:
        """The labels as a file name."""
        return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", label).strip("-") or "x" for label in self.labels)


@dataclass(frozen=True)
class Run:
    """One training run: a cell with a seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """The name of its files and of its folder."""
        return f"{self.cell.name}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{', '.join(self.cell.labels)}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        name: Its name.
        description: Its question, in one line.
        base: `recipe_dict` of the recipe that the cells change.
        axes: The grid's directions.
        seeds: Every cell is trained once with each.
        compare: The axis whose places are contenders; figures of robustness are over the other axes. None: one grid.
        reference: The contender that the others are tested against.
        paper: The paper's figure by a cell's labels: a percentage, or "diverged".
        tasks: The axis whose places are tasks, on each of which the contenders are judged anew. None: one task.
        defaults: Each contender's default on the axis of rates, the one that is neither `compare` nor `tasks`. Empty:
            there is no such axis, or no default.
    """

    name: str
    description: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    compare: str | None = None
    reference: str | None = None
    paper: dict[tuple[str, ...], float | str] = field(default_factory=dict)
    tasks: str | None = None
    defaults: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Every cell; the last axis varies fastest."""
        places = [zip(axis.labels, axis.settings, strict=True) for axis in self.axes]
        return [_cell(combination) for combination in product(*places)]

    def runs(self) -> Iterator[Run]:
        """Every run: the whole grid with the first seed, then with the next, and so on."""
        cells = self.cells()
        for seed in self.seeds:
            for cell in cells:
                yield Run(cell, seed)

    def contenders(self) -> dict[str, list[int]]:
        """Indices of the cells by contender; one contender, "all cells", where nothing is compared."""
        cells = self.cells()
        if self.compare is None:
            return {"all cells": list(range(len(cells)))}
        place = [axis.name for axis in self.axes].index(self.compare)
        labels = self.axes[place].labels
        return {label: [i for i, cell in enumerate(cells) if cell.labels[place] == label] for label in labels}


def _cell(places: tuple[tuple[str, dict[str, Any]], ...]) -> Cell:
    settings: dict[str, Any] = {}
    for _, more in places:
        settings |= more
    return Cell(tuple(label for label, _ in places), settings)


def study_dict(study: Study) -> dict[str, Any]:
    """The study as plain YAML values."""
    return {
        "name": study.name,
        "description": study.description,
        "base": study.base,
        "axes": [
            {"name": axis.name, "labels": list(axis.labels), "settings": list(axis.settings)} for axis in study.axes
        ],
        "seeds": list(study.seeds),
        "compare": study.compare,
        "reference": study.reference,
        "paper": [[*labels, figure] for labels, figure in study.paper.items()],
        "tasks": study.tasks,
        "defaults": study.defaults,
    }


@dataclass
class _Noted:
    """A study from the dict that `study_dict` writes."""

    name: str
    description: str
    base: dict[str, Any]
    axes: list[Axis]
    seeds: list[int]
    compare: str | None
    reference: str | None
    paper: list[list[Any]]
    tasks: str | None = None
    defaults: dict[str, str] = field(default_factory=dict)


def study_from_dict(data: Any, where: str = "study") -> Study:
    """Read the study that `study_dict` wrote.

    Raises:
        DocumentError: It is not a study; the message begins with `where`.
    """
    noted: _Noted = typed(data, _Noted, where)
    if any(len(axis.labels) != len(axis.settings) for axis in noted.axes):
        raise DocumentError(f"{where}: axes: labels and settings are not equally many")
    if not all(0 < len(row) == len(noted.axes) + 1 for row in noted.paper):
        raise DocumentError(f"{where}: paper: each row must have a label of every axis, and a figure")
    paper = {tuple(map(str, row[:-1])): row[-1] for row in noted.paper}
    for axis in (noted.compare, noted.tasks):
        if axis is not None and axis not in [known.name for known in noted.axes]:
            raise DocumentError(f"{where}: {axis!r} is no axis")
    rest = {
        key: getattr(noted, key) for key in ("name", "description", "base", "compare", "reference", "tasks", "defaults")
    }
    return Study(axes=tuple(noted.axes), seeds=tuple(noted.seeds), paper=paper, **rest)
