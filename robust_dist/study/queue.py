"""Optuna's journal, from which workers take the next run."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from robust_dist.documents import DocumentError, parse_json, read_text
from robust_dist.extras import require
from robust_dist.study.grid import Run, Study
from robust_dist.study.keys import StudyError

_RUN = "run"
_REMEDY = "while no worker runs, the file can be removed: the results tell what is left to train"


class Queue:
    """The runs of a study as trials of an Optuna study in a journal file.

    Every run is queued once, as a trial with its parameters set, and a worker takes one by bringing it from WAITING to
    RUNNING, which the journal grants to one worker. That is the grid of GridSampler without its one flaw: it hands
    out a cell by what has finished, and so may give the same one to two workers. COMPLETE is a result, PRUNED one that
    diverged, FAIL a start that failed or whose worker died; the results themselves are files of the study's folder, so
    that the journal can be deleted when no worker runs.

    Args:
        path: The journal.
        study: The study.

    Raises:
        ImportError: Optuna is not installed.
        StudyError: The journal is damaged.
    """

    def __init__(self, path: Path, study: Study) -> None:
        optuna = require("optuna", extra="study", purpose="a study")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._states = optuna, optuna.trial.TrialState
        self._study, self._runs = study, {run.name: run for run in study.runs()}
        lock = optuna.storages.journal.JournalFileSymlinkLock(str(path))
        _check(path, lock)
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
            self._storage = optuna.storages.JournalStorage(backend)
            self._optuna_study = optuna.create_study(
                storage=self._storage, study_name=study.name, direction="maximize", load_if_exists=True
            )
            self._id = self._storage.get_study_id_from_name(study.name)
            self._trials(*self._states)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise StudyError(f"{path}: is no journal of this study ({error!r}); {_REMEDY}") from error

    def fill(self, finished: Iterable[str]) -> None:
        """Queue every run that is neither finished nor queued nor running; failed ones get another start."""
        states = (self._states.WAITING, self._states.RUNNING)
        there = {name for name, _ in self._trials(*states)} | set(finished)
        for run in self._runs.values():
            if run.name not in there:
                self.add(run)

    def add(self, run: Run) -> int:
        """Queue a run; returns its trial."""
        categorical = self._optuna.distributions.CategoricalDistribution
        distributions = {axis.name: categorical(axis.labels) for axis in self._study.axes}
        distributions["seed"] = categorical(self._study.seeds)
        names = [axis.name for axis in self._study.axes]
        trial = self._optuna.trial.create_trial(
            state=self._states.WAITING,
            params=dict(zip(names, run.cell.labels, strict=True)) | {"seed": run.seed},
            distributions=distributions,
            user_attrs={_RUN: run.name},
        )
        return self._storage.create_new_trial(self._id, template_trial=trial)

    def waiting(self) -> list[tuple[Run, int]]:
        """Queued runs with their trials, in order."""
        return [(self._runs[name], trial) for name, trial in self._trials(self._states.WAITING)]

    def running(self) -> list[tuple[Run, int]]:
        """Runs that a worker has, or had when it died, with their trials."""
        return [(self._runs[name], trial) for name, trial in self._trials(self._states.RUNNING)]

    def start(self, trial: int) -> bool:
        """Take a queued trial; False where another worker was first."""
        try:
            return self._storage.set_trial_state_values(trial, self._states.RUNNING)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return False

    def finish(self, trial: int, accuracy: float | None, *, diverged: bool) -> None:
        """Note a result."""
        state = self._states.PRUNED if diverged else self._states.COMPLETE
        self._end(trial, state, None if diverged or accuracy is None else [accuracy])

    def fail(self, trial: int) -> bool:
        """Note a failed start; False where another worker has ended the trial."""
        return self._end(trial, self._states.FAIL, None)

    def _end(self, trial: int, state: object, values: list[float] | None) -> bool:
        try:
            return self._storage.set_trial_state_values(trial, state, values)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _trials(self, *states: object) -> list[tuple[str, int]]:
        trials = self._storage.get_all_trials(self._id, deepcopy=False, states=states)
        # A run that the study no longer has, or a trial that somebody else put in, is nobody's to take.
        named = [(trial.user_attrs.get(_RUN), trial._trial_id) for trial in trials]
        return [(name, trial) for name, trial in named if name in self._runs]


def _check(path: Path, lock: Any) -> None:
    """Refuse a journal with a line that is no JSON, and cut off a last one that a killed worker did not end.

    Optuna would write the next line behind it, and never read the two again.
    """
    try:
        lines = read_text(path).split("\n")
        if lines[-1]:
            # Not while another worker writes it.
            lock.acquire()
            try:
                lines = read_text(path).split("\n")
                os.truncate(path, path.stat().st_size - len(lines[-1].encode()))
            finally:
                lock.release()
    except FileNotFoundError:
        return
    except DocumentError as error:
        raise StudyError(f"{error}; {_REMEDY}") from error
    for number, line in enumerate(lines[:-1], start=1):
        try:
            parse_json(line, "the line", dict[str, Any])
        except DocumentError as error:
            raise StudyError(f"{path}, line {number}: {error}; {_REMEDY}") from error
