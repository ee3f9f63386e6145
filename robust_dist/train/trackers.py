"""Experiment trackers, by Accelerate's names: checked before the run, started once, never fatal to a run."""

import difflib
import json
import uuid
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from robust_dist.checkpoint import write_atomically
from robust_dist.documents import read_json
from robust_dist.private import hidden
from robust_dist.ranks.talk import on_rank_0
from robust_dist.train.recipe import Recipe, flatten, recipe_dict

_PIP = {"comet_ml": "comet-ml"}
_MODULES = {"tensorboard": "torch.utils.tensorboard"}


def check_trackers(names: list[str]) -> None:
    """Reject a tracker that is unknown, or whose package is broken or missing (Accelerate would silently skip it).

    Raises:
        ValueError: Names it, and what would be right.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"tracking.trackers={names!r}: no tracker {name!r}; {hint}known are {', '.join(known)}")
    there = {str(name) for name in get_available_trackers()}
    builtin = {name for name, kind in LOGGER_TYPE_TO_CLASS.items() if kind.__module__ == GeneralTracker.__module__}
    missing = [name for name in names if name in builtin and name not in there]
    if missing:
        packages = " ".join(_PIP.get(name, name) for name in missing)
        raise ValueError(
            f"tracking.trackers={names!r}: {' and '.join(missing)} cannot be used, because the package is not "
            f"installed: pip install {packages}, or leave it out"
        )
    for name in builtin.intersection(names):
        try:
            import_module(_MODULES.get(name, name))
        except Exception as error:
            raise ValueError(
                f"tracking.trackers={names!r}: {name} is installed but cannot be imported ({error}); fix it, or "
                "leave it out"
            ) from error


class Trackers:
    """The trackers of one run; only the main process logs.

    Their runs are recorded in `trackers/runs.json`, so that the next start in the same folder continues them.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.folder, self.notes = folder / "trackers", folder / "trackers" / "runs.json"
        self._silent: set[str] = set()

    def start(self, done: int) -> None:
        """Start every tracker, or resume its run after `done` steps; a ValueError on every rank if one cannot start."""
        on_rank_0(lambda: self._start(done))

    def log(self, row: dict[str, Any]) -> None:
        """Log an epoch's row; a tracker that fails is named once, and the run continues without it."""
        values = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for tracker in self.accelerator.trackers:
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:
                self._complain(tracker.name, error)

    def _start(self, done: int) -> None:
        known, started, names = self._known_runs(), [], self.recipe.tracking.trackers
        settings = {key: _scalar(value) for key, value in flatten(hidden(recipe_dict(self.recipe))).items()}
        for name in names:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One at a time, so that an error can be attributed.
            self.accelerator.log_with, self.accelerator.trackers = [name], []
            options = {name: self._options(name, known.get(name), done)}
            try:
                self.accelerator.init_trackers(self.recipe.tracking.project, init_kwargs=options)
                started += self.accelerator.trackers
                if name not in known:
                    started[-1].store_init_configuration(settings)
            except Exception as error:
                raise ValueError(
                    f"tracking.trackers={names!r}: {name} could not start ({type(error).__name__}: {error}); fix it, "
                    "let it work offline, or leave it out"
                ) from error
        if names:
            self.accelerator.trackers = started
            runs = {tracker.name: _run_of(tracker) for tracker in started}
            write_atomically(self.notes, json.dumps(known | runs, indent=1) + "\n")

    def _known_runs(self) -> dict[str, Any]:
        try:
            found: dict[str, str | None] = read_json(self.notes, dict[str, str | None])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.accelerator.print(
                f"the trackers start new runs, because the record of this run's own is damaged: {error}"
            )
            return {}
        return found

    def _options(self, name: str, run: str | None, done: int) -> dict[str, Any]:
        """The options for starting a tracker: ours, overridden by the user's."""
        label = self.folder.resolve().parent.name
        ours: dict[str, dict[str, Any]] = {
            # Hides what an interrupted start logged after the step from which this one resumes.
            "tensorboard": {"purge_step": done + 1},
            "wandb": {"name": label, "dir": str(self.folder), "resume": "allow"} | ({"id": run} if run else {}),
            "mlflow": {"run_id": run} if run else {"run_name": label},
            # Trackio identifies runs only by name.
            "trackio": {"name": run or f"{label}-{uuid.uuid4().hex[:6]}", "resume": "allow"},
        }
        return ours.get(name, {}) | self.recipe.tracking.options.get(name, {})

    def _complain(self, name: str, error: Exception) -> None:
        if name not in self._silent:
            self._silent.add(name)
            reason = f"{type(error).__name__}: {error}"
            self.accelerator.print(f"the tracker {name} failed and may miss epochs; metrics.jsonl has all ({reason})")


def _run_of(tracker: GeneralTracker) -> str | None:
    """The name by which the tracker resumes a run, if it has one."""
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if tracker.name == "wandb":
        return str(tracker.tracker.id)
    return str(tracker.tracker.name) if tracker.name == "trackio" else None


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
