"""The folder of a study: its runs, their results and state, and runs taken from an earlier report."""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from robust_dist.checkpoint import write_atomically
from robust_dist.documents import DocumentError, dump_yaml, read_json, read_yaml, typed
from robust_dist.private import has_options, hidden
from robust_dist.ranks.claim import RunClaim
from robust_dist.study.grid import Axis, Run, Study, StudyError, study_dict, study_from_dict
from robust_dist.study.outcome import Failure, Result
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import conflicts

T = TypeVar("T")


class StudyFolder:
    """A study's folder, shared by all of its workers.

    `study.yaml` (the checked study), `claims/` (who trains what), `recipes/`, `runs/` (a folder for each run), `logs/`,
    `results/` (a file for each finished run), `failed/`, `report/`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def of(self, kind: str, run: Run, suffix: str = "") -> Path:
        """A run's file in one of the folders; nothing is made."""
        return self.path / kind / f"{run.name}{suffix}"

    def make(self, kind: str, run: Run, suffix: str = "") -> Path:
        """The same path, with its folder made."""
        path = self.of(kind, run, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def claim(self, study: Study) -> None:
        """Make this the folder of a study, or check that it is.

        Raises:
            StudyError: It holds another study (the differences are named), or other files.
        """
        path = self.path / "study.yaml"
        others = {entry.name for entry in self.path.glob("*")} - {".lock", ".study.yaml.partial"}
        if others and not path.exists():
            raise StudyError(f"{self.path} holds files but no study.yaml, so it is no study's folder; choose another")
        self.path.mkdir(parents=True, exist_ok=True)
        with self.alone():
            if path.exists():
                differing = differences(study, self.study())
                if differing:
                    raise StudyError(
                        f"{self.path} holds a study with other settings; give the same ones, or another --dir (and "
                        f"--from {self.path}/report/report.json, to take the runs that both have):\n  "
                        + "\n  ".join(differing)
                    )
            write_atomically(path, dump_yaml(hidden(study_dict(study))), private=has_options(study.base))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's own lock, which ends with the process."""
        with (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def study(self) -> Study:
        """The study that the folder holds.

        Raises:
            StudyError: There is none.
        """
        path = self.path / "study.yaml"
        try:
            return study_from_dict(read_yaml(path).data, str(path))
        except FileNotFoundError:
            raise StudyError(f"{self.path} is no study's folder: it has no study.yaml") from None
        except (OSError, ValueError) as error:
            raise StudyError(f"{self.path} is no study's folder: {error}") from error

    def result(self, run: Run) -> Result | None:
        """The result of a run, or None while it is not finished."""
        return _read(self.of("results", run, ".json"), Result)

    def failure(self, run: Run) -> Failure | None:
        """The failure of a run's last start, or None."""
        return _read(self.of("failed", run, ".json"), Failure)

    def ended(self) -> set[str]:
        """Names of the runs that have a result, or failed at their last start."""
        # Listing a folder asks a file server again; looking for one file may not.
        return {path.stem for kind in ("results", "failed") for path in (self.path / kind).glob("*.json")}

    def forget_failures(self, study: Study) -> None:
        """Let failed runs be started again.

        Raises:
            StudyError: A result is damaged.
        """
        with self.alone():
            for run in study.runs():
                if self.result(run) is None:
                    self.of("failed", run, ".json").unlink(missing_ok=True)

    def write_result(self, run: Run, result: Result) -> None:
        """Note a finished run."""
        text = json.dumps(vars(result), indent=1) + "\n"
        write_atomically(self.make("results", run, ".json"), text, private=has_options(result.recipe))
        self.of("failed", run, ".json").unlink(missing_ok=True)

    def write_failure(self, run: Run, failure: Failure) -> None:
        """Note a start that failed."""
        write_atomically(self.make("failed", run, ".json"), json.dumps(vars(failure), indent=1) + "\n")


def differences(ours: Study, theirs: Study, where: str = "the folder", *, common: bool = False) -> list[str]:
    """The differences between two studies that change their results, one line each.

    Args:
        ours: A study.
        theirs: Another.
        where: What the other is read from, for the lines.
        common: Compare only the seeds, and the places of an axis, that both have.
    """
    here, there = study_dict(ours), study_dict(theirs)
    lines = [f"base: {line}" for line in conflicts(here["base"], there["base"], where)]
    places = [{axis.name: _places(axis) for axis in study.axes} for study in (ours, theirs)]
    for name in dict.fromkeys([*places[0], *places[1]]):
        mine, others = (found.get(name) for found in places)
        if common and mine and others:
            shared = [label for label in mine if label in others]
            mine, others = ({label: found[label] for label in shared} for found in (mine, others))
        # Not the dicts themselves: their equality ignores order.
        if _listed(mine) != _listed(others):
            lines.append(f"axes.{name}: {_listed(mine)} here, {_listed(others)} in {where}")
    if [axis.name for axis in ours.axes] != [axis.name for axis in theirs.axes] and not lines:
        lines.append("axes: in another order")
    if here["seeds"] != there["seeds"] and not common:
        lines.append(f"seeds: {here['seeds']} here, {there['seeds']} in {where}")
    return lines


def _places(axis: Axis) -> dict[str, str]:
    # A list's labels are its values; rows also differ by what they set.
    named = zip(axis.labels, axis.settings, strict=True)
    return {label: f"{label} {sorted(_numbers(hidden(settings)).items(), key=str)}" for label, settings in named}


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with numbers as numbers: earlier versions kept 1e-3 as spelt in the file."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with suppress(ValueError):
                found[key] = float(value)
    return found


def _listed(places: dict[str, str] | None) -> str:
    return "(no such axis)" if places is None else ", ".join(places.values())


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        found: T = read_json(path, kind)
    except FileNotFoundError:
        return None
    except DocumentError as error:
        raise StudyError(f"{error}; remove the file, and its run is trained again") from error
    return found


def adopt(folder: StudyFolder, study: Study, found: dict[str, Result]) -> int:
    """Add the finished runs that `read_report` found, except those that the folder has; returns how many."""
    with folder.alone():
        new = [(run, found[run.name]) for run in study.runs() if run.name in found and folder.result(run) is None]
        for run, result in new:
            folder.write_result(run, result)
    return len(new)


def read_report(study: Study, path: str | Path) -> dict[str, Result]:
    """The finished runs of a `report.json` that this study also has, by the run's name.

    The report's study may have other seeds, or other places on an axis.

    Raises:
        StudyError: The file is no report, or its study has other settings (the differences are named), or no cell or no
            seed of this one.
    """
    try:
        theirs, found = _read_runs(path)
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
    """A study's folder, made at the empty folder `where`, with the finished runs of a `report.json`.

    Raises:
        StudyError: The file is no report.
    """
    try:
        study, found = _read_runs(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is no study's folder and no report.json: {error}") from error
    folder = StudyFolder(where)
    folder.claim(study)
    keys = {run.name: (run.cell.labels, run.seed) for run in study.runs()}
    adopt(folder, study, {name: found[key] for name, key in keys.items() if key in found})
    return folder


def _read_runs(path: str | Path) -> tuple[Study, dict[tuple[tuple[str, ...], int], Result]]:
    """The study of a `report.json`, and its finished runs by their labels and seed."""
    noted: _Report = read_json(path, _Report)
    runs = [(run, f"{path}: runs[{i}]") for i, run in enumerate(noted.runs) if not run.get("missing")]
    found = {_key(run, where): typed(run, Result, where) for run, where in runs}
    return study_from_dict(noted.study, f"{path}: study"), found


@dataclass
class _Report:
    """The part of a `report.json` that is read back."""

    study: dict[str, Any]
    runs: list[dict[str, Any]]


def _key(run: dict[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    labels: list[str] = typed(run.get("labels"), list[str], f"{where}: labels")
    return tuple(labels), typed(run.get("seed"), int, f"{where}: seed")


def status(folder: StudyFolder) -> str:
    """The state of all runs, as text.

    Raises:
        StudyError: It is no study's folder.
    """
    study = folder.study()
    counts: Counter[str] = Counter()
    lines = []
    for run in study.runs():
        kind, line = _state(folder, run, study.base.get("epochs", "?"))
        counts[kind] += 1
        if line:
            lines.append(line)
    names = ("finished", "diverged", "failed", "running", "waiting")
    head = f"{study.name}: {sum(counts.values())} runs, " + ", ".join(f"{counts[name]} {name}" for name in names)
    return "\n".join([head, *lines])


def _state(folder: StudyFolder, run: Run, epochs: object) -> tuple[str, str]:
    result = folder.result(run)
    if result is not None:
        return ("diverged", f"{run}: diverged: {result.diverged}") if result.diverged else ("finished", "")
    worker = RunClaim.worker_of(folder.of("claims", run))
    if worker is not None:
        rows = RunFolder(folder.of("runs", run)).metrics()
        accuracy = rows[-1].get("eval_accuracy") if rows else None
        seen = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        of = run.cell.settings.get("epochs", epochs)
        where = f"process {worker.pid} on {worker.host}"
        return "running", f"{run}: epoch {rows[-1].get('epoch') if rows else 0} of {of}{seen} ({where})"
    failure = folder.failure(run)
    if failure is not None:
        end = failure.log.splitlines()[-1] if failure.log else ""
        return "failed", f"{run}: failed with status {failure.status}: {end}"
    return "waiting", ""
