"""The folder of a run: its lock, recipe, environment and metrics."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from robust_dist.checkpoint import write_atomically
from robust_dist.checkpoint.background import write_failure
from robust_dist.documents import DocumentError, dump_yaml, read_json, read_yaml, typed
from robust_dist.private import has_options, hidden, hidden_words
from robust_dist.ranks.claim import FolderClaim, FolderInUseError
from robust_dist.surroundings import PACKAGES
from robust_dist.train.data_record import Record, differences
from robust_dist.train.metrics import read_rows, sort_rows
from robust_dist.train.parse import fitted
from robust_dist.train.recipe import Recipe, conflicts, flatten, recipe_dict

STOPPED = "stopped.json"
# Files that a start may leave before its recipe.yaml, if it dies or the disk is full.
_LEFT_OVER = {".lock", ".recipe.yaml.partial", "errors", "stacks", "log.txt"}


class RunFolderError(ValueError):
    """A run folder that this start must not touch, with the reason."""


class RunFolder:
    """The files of one run: `recipe.yaml`, `data.json`, `environment.json`, `metrics.jsonl`, `checkpoints/`, ..."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._claim: FolderClaim | None = None

    @property
    def _recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per epoch and line."""
        return self.path / "metrics.jsonl"

    @property
    def is_finished(self) -> bool:
        """Whether a run finished here: the curves are drawn then."""
        return (self.path / "curves.png").exists()

    @property
    def data_path(self) -> Path:
        """The record of what the run is trained on."""
        return self.path / "data.json"

    def decoder(self) -> str | None:
        """The decoder of the images that the run was trained on; "" if none is recorded, None before any training."""
        if not self._has_begun():
            return None
        try:
            noted = json.loads(self.data_path.read_text(encoding="utf-8"))["decode"]
        except (OSError, ValueError, TypeError, KeyError):
            return ""
        return noted if isinstance(noted, str) else ""

    def claim(self, recipe: Recipe, environment: dict[str, Any], data: Record | None = None) -> None:
        """Take the folder for this process, or raise why not; nothing is written unless everything fits.

        Args:
            recipe: The recipe to run here.
            environment: This start's entry in `environment.json`.
            data: The content of `data.json`; None leaves it unchanged.

        Raises:
            RunFolderError: Another live run holds the folder, or it contains a run with other settings or data, or
                files that are not from a run.
        """
        try:
            self._claim_for(recipe, environment, data)
        except OSError as error:
            self.release()
            raise self._unwritable(error) from None

    def check_usable(self, recipe: Recipe) -> None:
        """Raise as `claim` would for the folder and its settings; nothing is taken or written."""
        try:
            self._check_is_run_or_empty()
            if self._recipe_path.exists():
                self._check_same(recipe_dict(recipe), self._recipe_path, type(recipe))
        except OSError as error:
            raise self._unwritable(error) from None

    def check(self) -> None:
        """Raise a FolderLostError if another run took over the claimed folder without sign of life from this one."""
        if self._claim is not None:
            self._claim.check()

    def note_stop(self, note: dict[str, Any]) -> None:
        """Record in `stopped.json` that a signal stopped the run."""
        write_atomically(self.path / STOPPED, json.dumps(note, indent=1) + "\n")

    def stop_note(self) -> dict[str, Any]:
        """The content of `stopped.json`; empty if no signal stopped the run."""
        try:
            note: _Stop = read_json(self.path / STOPPED, _Stop)
        except (OSError, ValueError):
            return {}
        return vars(note)

    def _claim_for(self, recipe: Recipe, environment: dict[str, Any], data: Record | None) -> None:
        self._check_is_run_or_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        ours = recipe_dict(recipe)
        if self._recipe_path.exists():
            self._check_same(ours, self._recipe_path, type(recipe))
        is_new_data = data is not None and self._is_new_data(data)
        # Others may read how a run went, but not the accounts and hosts in its options.
        private = has_options(ours)
        # Written first: it marks the folder as a run's.
        write_atomically(self._recipe_path, dump_yaml(hidden(ours)), private=private)
        if is_new_data:
            write_atomically(self.data_path, json.dumps(data, indent=1) + "\n")
        if not self.metrics():
            # If it is missing later, somebody removed it.
            self.checkpoints.mkdir(exist_ok=True)
        self._note_start(hidden(environment), private)
        (self.path / STOPPED).unlink(missing_ok=True)

    def release(self) -> None:
        """Let another run take the folder."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs recorded so far, oldest first; lines that are not epochs are skipped."""
        return read_rows(self.metrics_path)[0]

    def rewind(self, step: int, steps_per_epoch: int | None = None) -> list[str]:
        """Rewind `metrics.jsonl` to the step of the checkpoint being resumed: later epochs are trained again.

        What is removed (later epochs, lines that are not rows, rows of repeated steps or not at an epoch's end) is
        first appended to `metrics.erased.jsonl`. Without `steps_per_epoch`, missing and odd rows are not looked for.

        Returns:
            A line for each irregularity.
        """
        rows, faults = read_rows(self.metrics_path)
        kept, erased, notes = sort_rows(rows, step, steps_per_epoch)
        notes = [f"{self.metrics_path}, {said}" for said, _ in faults] + [f"{self.metrics_path}: {x}" for x in notes]
        texts = [text for _, text in faults] + [json.dumps(row) for row in erased]
        if texts:
            beside = self.metrics_path.with_name("metrics.erased.jsonl")
            with beside.open("a", encoding="utf-8") as file:
                file.write("".join(text + "\n" for text in texts))
                file.flush()
                os.fsync(file.fileno())
        if notes:
            notes.append(f"what was removed from {self.metrics_path.name} is in {self.path / 'metrics.erased.jsonl'}")
        write_atomically(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return notes

    def append(self, row: dict[str, Any]) -> None:
        """Append one epoch's row and flush it to disk.

        Raises:
            CheckpointError: The disk cannot store it.
            FolderLostError: Another run has taken the folder.
        """
        self.check()
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_failure(self.metrics_path, error) from None

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"run_dir={str(self.path)!r} is not writable: {error}; fix that, or choose another run_dir"
        )

    def _check_is_run_or_empty(self) -> None:
        path = self.path.absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            which = "is a file" if there == path else f"is below {there}, which is a file"
            raise RunFolderError(f"run_dir={str(self.path)!r} {which}; name a folder")
        if not os.access(there, os.W_OK):
            raise PermissionError(f"no permission to write to {there}")
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        foreign = {name for name in names if name not in _LEFT_OVER and not name.startswith(".owner-")}
        if foreign and "recipe.yaml" not in names:
            raise RunFolderError(
                f"run_dir={str(self.path)!r} contains files but no recipe.yaml, so it is not a run's folder; "
                "choose an empty or a new one"
            )

    def _take(self) -> None:
        claim = FolderClaim(self.path)
        try:
            claim.take()
        except FolderInUseError as error:
            raise RunFolderError(str(error)) from None
        self._claim = claim

    def _check_same(self, recipe: dict[str, Any], path: Path, kind: type[Recipe]) -> None:
        try:
            document = read_yaml(path)
            there: dict[str, Any] = typed(document.data, dict[str, Any], str(path))
        except DocumentError as error:
            self.release()
            raise RunFolderError(
                f"run_dir={str(self.path)!r} has a damaged recipe.yaml, which says what runs there: {error}; restore "
                f"it from a copy, or choose another run_dir"
            ) from None
        spelt = {k: fitted(kind, document, tuple(k.split(".")), value, k) for k, value in flatten(there).items()}
        differing = conflicts(recipe, spelt, kind=kind)
        if differing:
            self.release()
            raise RunFolderError(
                f"run_dir={str(self.path)!r} contains a run with other settings; use the same ones, or another "
                "run_dir:\n  " + "\n  ".join(differing)
            )

    def _is_new_data(self, data: Record) -> bool:
        """Whether the folder does not record its data yet; data other than the recorded one is an error."""
        if not self.data_path.exists() or not self._has_begun():
            return True
        try:
            there = json.loads(self.data_path.read_text(encoding="utf-8"))
            differing = differences(data, there)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            differing = [f"{self.data_path} cannot be read: {error!r}"]
        if differing:
            self.release()
            raise RunFolderError(
                f"run_dir={str(self.path)!r} contains a run on other data; restore its data, or choose another run_dir "
                f"(to continue with the new data, remove {self.data_path}):\n  " + "\n  ".join(differing)
            )
        return False

    def _has_begun(self) -> bool:
        """Whether anything was trained here."""
        steps = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return bool(self.metrics()) or any(step.strip("0") for step in steps)

    def starts(self) -> list[dict[str, Any]]:
        """The starts recorded in `environment.json`, oldest first; a damaged file is a DocumentError."""
        try:
            noted: _Starts = read_json(self.path / "environment.json", _Starts)
        except FileNotFoundError:
            return []
        return noted.starts

    def _note_start(self, environment: dict[str, Any], private: bool) -> None:
        path = self.path / "environment.json"
        try:
            starts = self.starts()
        except DocumentError as error:
            aside = path.with_name("environment.damaged.json")
            print(f"warning: {error}; it is kept as {aside}", flush=True)
            os.replace(path, aside)
            starts = []
        text = json.dumps({"starts": [*starts, environment]}, indent=1) + "\n"
        write_atomically(path, text, private=private)


@dataclass
class _Stop:
    """The content of `stopped.json`."""

    signal: str
    step: int
    total_steps: int
    checkpoint: str
    launchers: list[str] = field(default_factory=list)


@dataclass
class _Starts:
    """The content of `environment.json`."""

    starts: list[dict[str, Any]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit of this package's checkout, if it is one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(num_processes: int, device: torch.device, engine: str) -> dict[str, Any]:
    """Facts needed to judge or repeat a run: versions, devices, ranks, command, revision.

    `device` is rank 0's, `engine` Accelerate's distributed type.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": hidden_words(sys.argv),
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("robust_dist", "torch", *PACKAGES)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_processes": num_processes,
        "threads_per_process": torch.get_num_threads(),
        "engine": engine,
    }
