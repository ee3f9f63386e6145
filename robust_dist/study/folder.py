"""The folder of a study: what it is, its runs, their results."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from robust_dist.checkpoint import write_atomically
from robust_dist.documents import DocumentError, read_json
from robust_dist.private import has_options, hidden
from robust_dist.study.grid import Axis, Run, Study, study_dict, study_from_dict
from robust_dist.study.keys import StudyError
from robust_dist.study.outcome import Failure, Result
from robust_dist.train.recipe import conflicts
from robust_dist.yaml_file import dump_yaml, read_yaml

T = TypeVar("T")


class StudyFolder:
    """A study's folder, shared by all of its workers.

    `study.yaml` (the checked study), `journal.log` (Optuna's), `claims/` (who trains what), `recipes/`, `runs/` (a
    run's folder each), `logs/`, `results/` (a file per finished run), `failed/`, `report/`.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def journal(self) -> Path:
        """Optuna's journal."""
        return self.path / "journal.log"

    def of(self, kind: str, run: Run, suffix: str = "") -> Path:
        """A run's file in one of the folders; nothing is made."""
        return self.path / kind / f"{run.name}{suffix}"

    def make(self, kind: str, run: Run, suffix: str = "") -> Path:
        """The same, to be written: the folder is made."""
        path = self.of(kind, run, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def claim(self, study: Study) -> None:
        """Make the folder this study's, or find that it is.

        Raises:
            StudyError: It holds another study (the differences are named), or files that are no study's.
        """
        path = self.path / "study.yaml"
        if self.path.exists() and any(self.path.iterdir()) and not path.exists() and not self._is_new():
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

    def _is_new(self) -> bool:
        return {entry.name for entry in self.path.iterdir()} <= {".lock", ".study.yaml.partial"}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's own lock, which ends with the process."""
        with (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def study(self) -> Study:
        """The study that the folder holds.

        Raises:
            StudyError: It holds none.
        """
        path = self.path / "study.yaml"
        try:
            return study_from_dict(read_yaml(path).data, str(path))
        except (OSError, ValueError) as error:
            raise StudyError(f"{self.path} is no study's folder: {error}") from error

    def result(self, run: Run) -> Result | None:
        """The result of a run, or None while it is not finished."""
        return _read(self.of("results", run, ".json"), Result)

    def failure(self, run: Run) -> Failure | None:
        """The failure of a run's last start, or None."""
        return _read(self.of("failed", run, ".json"), Failure)

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
        where: What holds the other, for the lines.
        common: Whether seeds, and places of an axis, that one of the two lacks make no difference.
    """
    here, there = study_dict(ours), study_dict(theirs)
    lines = [f"base: {line}" for line in conflicts(here["base"], there["base"], where)]
    places = [{axis.name: _places(axis) for axis in study.axes} for study in (ours, theirs)]
    for name in dict.fromkeys([*places[0], *places[1]]):
        mine, others = (found.get(name) for found in places)
        if common and mine and others:
            shared = [label for label in mine if label in others]
            mine, others = ({label: found[label] for label in shared} for found in (mine, others))
        # Not the dicts themselves, whose equality asks for no order.
        if _listed(mine) != _listed(others):
            lines.append(f"axes.{name}: {_listed(mine)} here, {_listed(others)} in {where}")
    if [axis.name for axis in ours.axes] != [axis.name for axis in theirs.axes] and not lines:
        lines.append("axes: in another order")
    if here["seeds"] != there["seeds"] and not common:
        lines.append(f"seeds: {here['seeds']} here, {there['seeds']} in {where}")
    return lines


def _places(axis: Axis) -> dict[str, str]:
    # A list's labels are its values; rows are told apart by what they set, too.
    named = zip(axis.labels, axis.settings, strict=True)
    return {label: f"{label} {sorted(_numbers(hidden(settings)).items(), key=str)}" for label, settings in named}


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with numbers as numbers: earlier versions kept 1e-3 as a file spelt it."""
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
