"""The results of a study as numbers: accuracy in percent by cell and seed, contenders, comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robust_dist.study.figures import Array, PairedTest, bootstrap, figures_of, paired_test
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
