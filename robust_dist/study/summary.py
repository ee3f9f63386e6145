"""The results of a study as numbers: accuracy in percent by cell and seed, contenders, comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from robust_dist.study.figures import Array, PairedTest, bootstrap, figures_of, holm, paired_test
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import Cell, Run, Study, StudyError
from robust_dist.study.outcome import Failure, Result


@dataclass(frozen=True)
class Figure:
    """A figure of robustness: of the cells' means, with its 95 % interval over seeds (None without one)."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """A paired test and the names of what it compared."""

    first: str
    second: str
    test: PairedTest


@dataclass(frozen=True)
class Summary:
    """A study's results.

    Attributes:
        study: The study.
        results: Finished runs by name.
        failures: Failed starts by name.
        points: Accuracy in percent [cells, seeds]; a diverged run counts as `diverged_as` of `summarize`; NaN: missing.
    """

    study: Study
    results: dict[str, Result]
    failures: dict[str, Failure]
    points: Array

    @property
    def is_complete(self) -> bool:
        """Whether every run has a result."""
        return not bool(np.isnan(self.points).any())

    def diverged(self, cell: Cell) -> list[tuple[int, str]]:
        """Seeds with which a cell diverged, and why."""
        found = [(seed, self.results.get(Run(cell, seed).name)) for seed in self.study.seeds]
        return [(seed, result.diverged) for seed, result in found if result is not None and result.diverged]


def summarize(folder: StudyFolder, *, diverged_as: float | None = None) -> Summary:
    """Read a study's results, finished or not.

    Args:
        folder: The study's folder.
        diverged_as: The share that a diverged run counts as; None: the accuracy of guessing, 1/classes.

    Raises:
        StudyError: It is no study's folder, or a run diverged on data whose number of classes is not known.
    """
    study = folder.study()
    runs = {run.name: run for run in study.runs()}
    results = {name: found for name, run in runs.items() if (found := folder.result(run)) is not None}
    unfinished = {name: run for name, run in runs.items() if name not in results}
    failures = {name: failure for name, run in unfinished.items() if (failure := folder.failure(run)) is not None}
    points = [
        [_points(Run(cell, seed), results.get(Run(cell, seed).name), diverged_as) for seed in study.seeds]
        for cell in study.cells()
    ]
    return Summary(study, results, failures, np.array(points))


def _points(run: Run, result: Result | None, diverged_as: float | None) -> float:
    if result is None:
        return float("nan")
    if result.diverged is None and result.accuracy is not None:
        return 100 * result.accuracy
    counted = result.chance if diverged_as is None else diverged_as
    if counted is None:
        raise StudyError(f"{run} diverged, and its data's number of classes is not known: give --diverged-as 0.1, say")
    return 100 * counted


def robustness(summary: Summary) -> dict[str, tuple[int, dict[str, Figure]]]:
    """For each contender, how many of its cells have a result, and the figures over them."""
    found = {}
    for contender, cells in summary.study.contenders().items():
        grid = summary.points[cells]
        grid = grid[~np.isnan(grid).all(axis=1)]
        found[contender] = (len(grid), _figures(grid) if len(grid) > 1 else {})
    return found


def _figures(grid: Array) -> dict[str, Figure]:
    means, whole = np.nanmean(grid, axis=1), not np.isnan(grid).any()
    return {
        name: Figure(float(function(means)), bootstrap(grid, function) if whole else None)
        for name, function in figures_of(len(grid)).items()
    }


def paper_robustness(study: Study, diverged_as: float) -> dict[str, dict[str, float]]:
    """The same figures for the paper's table, if it has every cell; its "diverged" counts as the given percentage."""
    cells, found = study.cells(), {}
    for contender, places in study.contenders().items():
        figures = [study.paper.get(cells[place].labels) for place in places]
        if len(figures) > 1 and None not in figures:
            means = np.array(
                [diverged_as if isinstance(figure, str) else figure for figure in figures], dtype=np.float64
            )
            found[contender] = {name: float(function(means)) for name, function in figures_of(len(means)).items()}
    return found


def against_reference(summary: Summary) -> list[Comparison]:
    """The reference against every other contender, over the cells and seeds that both have."""
    study = summary.study
    if study.compare is None or study.reference is None:
        return []
    groups = study.contenders()
    ours = summary.points[groups[study.reference]]
    others = [name for name in groups if name != study.reference]
    return _comparisons(study.reference, ours, [(name, summary.points[groups[name]]) for name in others])


@dataclass(frozen=True)
class AtDefault:
    """How a contender does at its one setting.

    Attributes:
        points: Accuracy in percent [tasks, seeds].
        regret: On each task [tasks], the best cell's mean over seeds (of any contender, at any rate) less its own.
    """

    points: Array
    regret: Array


def at_defaults(summary: Summary) -> dict[str, AtDefault]:
    """Each contender at its default on every task; empty where the study names neither tasks nor defaults."""
    study = summary.study
    if not study.tasks and not study.defaults:
        return {}
    grids = {name: _by_task(summary, name) for name in study.contenders()}
    best = np.max(
        [_mean(grid).max(axis=1, initial=-np.inf, where=~np.isnan(_mean(grid))) for grid in grids.values()], 0
    )
    found = {}
    for name, grid in grids.items():
        own = grid[:, _rates(study).index(study.defaults[name]) if study.defaults else 0]
        found[name] = AtDefault(own, best - _mean(own))
    return found


def in_units(summary: Summary) -> dict[str, dict[float, float]]:
    """Mean accuracy over tasks and seeds by the multiple of the contender's default rate; empty without numbers."""
    study = summary.study
    try:
        rates = [float(label) for label in _rates(study)] if study.defaults else []
        units = {name: float(label) for name, label in study.defaults.items()}
    except ValueError:
        return {}
    if not rates or min(rates) <= 0:
        return {}
    found = {}
    for name in study.contenders():
        means = _mean(_by_task(summary, name).swapaxes(0, 1).reshape(len(rates), -1))
        found[name] = {float(f"{rate / units[name]:.1g}"): float(mean) for rate, mean in zip(rates, means, strict=True)}
    return found


def default_against_reference(summary: Summary) -> list[Comparison]:
    """The reference at its default against the others at theirs, p by Holm; a pair is a task, else a seed."""
    found, study = at_defaults(summary), summary.study
    if not found or study.reference is None:
        return []
    units = {name: _mean(one.points) if study.tasks else one.points[0] for name, one in found.items()}
    ours = units.pop(study.reference)
    tests = _comparisons(study.reference, ours, list(units.items()))
    adjusted = holm([test.test.p for test in tests])
    return [replace(test, test=replace(test.test, p=p)) for test, p in zip(tests, adjusted, strict=True)]


def _rates(study: Study) -> tuple[str, ...]:
    """The places of the axis of rates; one without a name where there is none."""
    return next((axis.labels for axis in study.axes if axis.name not in (study.compare, study.tasks)), ("",))


def _by_task(summary: Summary, contender: str) -> Array:
    """A contender's points [tasks, rates, seeds]."""
    study = summary.study
    shape = [len(axis.labels) for axis in study.axes if axis.name != study.compare]
    points = np.array([summary.points[place] for place in study.contenders()[contender]])
    grid = points.reshape(*shape, -1)
    if study.tasks is None:
        return grid[None]
    others = [axis.name for axis in study.axes if axis.name != study.compare]
    return grid[:, None] if len(others) == 1 else np.moveaxis(grid, others.index(study.tasks), 0)


def _mean(points: Array) -> Array:
    """The mean over the last dimension of what is there; NaN where nothing is."""
    there = ~np.isnan(points)
    count = there.sum(axis=-1)
    return np.where(count > 0, np.nansum(points, axis=-1) / np.maximum(count, 1), np.nan)


def against_study(summary: Summary, other: Summary) -> list[Comparison]:
    """This study against another, over their common cells and seeds: as a whole, and by contender.

    Raises:
        StudyError: They have no cell and seed in common.
    """
    cells = [cell.labels for cell in summary.study.cells()]
    theirs = _aligned(summary, other)
    first, second = summary.study.name, f"{other.study.name} (--against)"
    whole = _comparisons(f"{first}: all cells", summary.points, [(second, theirs)])
    if not whole:
        raise StudyError(f"{first} and {other.study.name} have no cell and seed in common ({cells[0]}, ...)")
    if summary.study.compare is None:
        return whole
    groups = summary.study.contenders().items()
    parts = [_comparisons(f"{first}: {name}", summary.points[at], [(second, theirs[at])]) for name, at in groups]
    return whole + [comparison for part in parts for comparison in part]


def _aligned(summary: Summary, other: Summary) -> Array:
    """The other study's points in the cells and seeds of this one; NaN where it has none."""
    places = {cell.labels: index for index, cell in enumerate(other.study.cells())}
    columns = {seed: index for index, seed in enumerate(other.study.seeds)}
    aligned = np.full(summary.points.shape, np.nan)
    for row, cell in enumerate(summary.study.cells()):
        for column, seed in enumerate(summary.study.seeds):
            if cell.labels in places and seed in columns:
                aligned[row, column] = other.points[places[cell.labels], columns[seed]]
    return aligned


def _comparisons(first: str, ours: Array, others: Sequence[tuple[str, Array]]) -> list[Comparison]:
    found = []
    for second, theirs in others:
        both = ~np.isnan(ours) & ~np.isnan(theirs)
        if both.any():
            found.append(Comparison(first, second, paired_test(ours[both], theirs[both])))
    return found
