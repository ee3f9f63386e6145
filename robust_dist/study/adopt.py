"""Runs that an earlier report has are not trained again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_dist.documents import read_json, typed
from robust_dist.study.folder import StudyFolder, differences
from robust_dist.study.grid import Run, Study, study_from_dict
from robust_dist.study.keys import StudyError
from robust_dist.study.outcome import Result


def adopt(folder: StudyFolder, study: Study, found: dict[str, Result]) -> int:
    """Take finished runs into a study's folder; those that the folder has stay as they are.

    Args:
        folder: The study's folder, claimed.
        study: The study.
        found: What `read_report` gave.

    Returns:
        How many runs were taken.
    """
    with folder.alone():
        new = [(run, found[run.name]) for run in study.runs() if run.name in found and folder.result(run) is None]
        for run, result in new:
            folder.write_result(run, result)
    return len(new)


def read_report(study: Study, path: str | Path) -> dict[str, Result]:
    """The finished runs of a `report.json` that a study has, too, by the run's name.

    The report's study may have other seeds, or other places on an axis: what both have is taken.

    Args:
        study: The study.
        path: A `report.json`, of a finished study or not.

    Raises:
        StudyError: The file is no report, or one of a study with other settings (the differences are named), or with no
            cell or no seed of this one.
    """
    try:
        theirs, found = _read(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"--from {path} is no study's report.json: {error}") from error
    differing = differences(study, theirs, "the report", common=True)
    if differing:
        raise StudyError(f"--from {path} is of a study with other settings:\n  " + "\n  ".join(differing))
    keys = [(Run(cell, seed).name, (tuple(cell.labels), seed)) for cell in study.cells() for seed in study.seeds]
    if not {key for _, key in keys} & {(cell.labels, seed) for cell in theirs.cells() for seed in theirs.seeds}:
        raise StudyError(
            f"--from {path} has no cell and seed of this study: it has the seeds {list(theirs.seeds)} and "
            + "; ".join(f"{axis.name} {', '.join(axis.labels)}" for axis in theirs.axes)
        )
    return {name: found[key] for name, key in keys if key in found}


def folder_of_report(path: str | Path, where: str | Path) -> StudyFolder:
    """A study's folder with the finished runs of a `report.json`, from which the report can be made again.

    Args:
        path: The `report.json`.
        where: An empty folder, which becomes the study's.

    Raises:
        StudyError: The file is no report.
    """
    try:
        study, found = _read(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is no study's folder and no report.json: {error}") from error
    folder = StudyFolder(where)
    folder.claim(study)
    keys = {run.name: (run.cell.labels, run.seed) for run in study.runs()}
    adopt(folder, study, {name: found[key] for name, key in keys.items() if key in found})
    return folder


def _read(path: str | Path) -> tuple[Study, dict[tuple[tuple[str, ...], int], Result]]:
    """The study of a `report.json`, and its finished runs by their labels and seed."""
    noted: _Report = read_json(path, _Report)
    runs = [(run, f"{path}: runs[{i}]") for i, run in enumerate(noted.runs) if not run.get("missing")]
    found = {_key(run, where): typed(run, Result, where) for run, where in runs}
    return study_from_dict(noted.study, f"{path}: study"), found


@dataclass
class _Report:
    """The part of a `report.json` that is read."""

    study: dict[str, Any]
    runs: list[dict[str, Any]]


def _key(run: dict[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    labels: list[str] = typed(run.get("labels"), list[str], f"{where}: labels")
    return tuple(labels), typed(run.get("seed"), int, f"{where}: seed")
