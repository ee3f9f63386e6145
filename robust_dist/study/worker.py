"""Workers: each takes the next run, trains it in a process of its own, and records the outcome."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import IO, Any

from robust_dist import own_code
from robust_dist.checkpoint import write_atomically
from robust_dist.documents import dump_yaml
from robust_dist.private import has_options, hidden
from robust_dist.ranks.claim import BEAT_SECONDS, RunClaim
from robust_dist.study.child import GRACE_SECONDS, Launcher, gpus, slot_environment
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import Run, Study
from robust_dist.study.outcome import Result, judge
from robust_dist.train.keys import keys_of
from robust_dist.train.recipe import Recipe, recipe_dict

POLL_SECONDS = 0.5
# How often an idle worker checks whether another worker has died: it reads a file or two for each run.
LOOK_SECONDS = 2.0


@dataclass
class _Training:
    """A run that this process's workers train."""

    run: Run
    claim: RunClaim
    process: BaseProcess
    log: IO[bytes]
    began: float


class Workers:
    """The workers of one command. Others, on any machine that sees the folder, share the same runs.

    Args:
        folder: The study's folder, claimed.
        study: The study.
        recipes: Every cell's recipe by the cell's name.
        num_workers: Runs that are trained at a time.
    """

    def __init__(self, folder: StudyFolder, study: Study, recipes: dict[str, Recipe], num_workers: int) -> None:
        self.folder, self.recipes, self.num_workers = folder, recipes, num_workers
        self.runs = list(study.runs())
        folder.forget_failures(study)
        self.gpus = gpus(os.environ)
        self.launcher = Launcher(forks=not self.gpus)
        self.slots: dict[int, _Training] = {}
        self._beaten = time.monotonic()
        self._look_at = 0.0
        self._told_to_wait = False

    def work(self) -> None:
        """Train until no run is left, here or with other workers; if stopped, end the training processes, too."""
        try:
            while True:
                self._reap()
                self._start()
                if not self.slots and self._is_over():
                    return
                self._beat()
                time.sleep(POLL_SECONDS)
        finally:
            self._stop()

    def _reap(self) -> None:
        for slot, training in list(self.slots.items()):
            status = training.process.exitcode
            if status is not None:
                del self.slots[slot]
                training.log.close()
                self._note(training, status)
                training.claim.release()

    def _note(self, training: _Training, status: int) -> None:
        run, log = training.run, self.folder.of("logs", training.run, ".log")
        outcome = judge(self.folder.of("runs", run), self._recipe(run), status, log)
        seconds = f"{time.monotonic() - training.began:.0f} s"
        if isinstance(outcome, Result):
            self.folder.write_result(run, outcome)
            self._say(run, f"{_came_to(outcome)} ({seconds})")
        else:
            self.folder.write_failure(run, outcome)
            indented = outcome.log.replace("\n", "\n    ")
            self._say(run, f"FAILED with status {status} ({seconds}); {log} ends:\n    {indented}")

    def _start(self) -> None:
        for slot in range(self.num_workers):
            if slot in self.slots:
                continue
            if time.monotonic() < self._look_at:
                return
            # All that is claimed and started must be recorded, so that it can be ended.
            with _interrupted_later():
                taken = self._take()
                if taken is not None:
                    self.slots[slot] = self._launch(slot, *taken)
            if taken is None:
                self._look_at = time.monotonic() + LOOK_SECONDS
                return

    def _take(self) -> tuple[Run, RunClaim] | None:
        """The next run that nobody has: one that was never started, or one whose worker died."""
        mine = {training.run.name for training in self.slots.values()}
        for run in self._left():
            if run.name in mine:
                continue
            path = self.folder.make("claims", run)
            # A worker that ends normally empties its claim.
            is_abandoned = path.exists() and path.stat().st_size > 0
            claim = RunClaim.take(path)
            if claim is None:
                continue
            # Its worker may have finished it between the check and the claim.
            if run.name not in self.folder.ended():
                if is_abandoned:
                    self._say(run, "its worker died; going on with it")
                return run, claim
            claim.release()
        return None

    def _left(self) -> list[Run]:
        """Runs without a result or a failure: nobody's, or a worker's."""
        ended = self.folder.ended()
        return [run for run in self.runs if run.name not in ended]

    def _launch(self, slot: int, run: Run, claim: RunClaim) -> _Training:
        recipe = self.folder.make("recipes", run, ".yaml")
        ours = recipe_dict(self._recipe(run))
        write_atomically(recipe, dump_yaml(hidden(ours)), private=has_options(ours))
        log = self.folder.make("logs", run, ".log").open("ab")
        words = ["--config", str(recipe), *_secret_words(ours), "--run_dir", str(self.folder.of("runs", run))]
        words += [word for module in sorted(own_code.named) for word in ("--import", module)]
        env = slot_environment(slot, self.num_workers, self.gpus, os.environ)
        process = self.launcher.start(words, env, log, claim.fileno)
        return _Training(run, claim, process, log, time.monotonic())

    def _recipe(self, run: Run) -> Recipe:
        return replace(self.recipes[run.cell.name], seed=run.seed)

    def _is_over(self) -> bool:
        others = self._left()
        if others and not self._told_to_wait:
            self._told_to_wait = True
            print(f"waiting for {len(others)} runs of other workers", flush=True)
        return not others

    def _beat(self) -> None:
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            for training in self.slots.values():
                training.claim.beat()

    def _stop(self) -> None:
        """End the processes that still train and release their runs."""
        for training in self.slots.values():
            training.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for training in self.slots.values():
            training.process.join(max(0.0, deadline - time.monotonic()))
            if training.process.exitcode is None:
                training.process.kill()
                training.process.join()
            training.log.close()
            training.claim.release()
        self.slots.clear()

    def _say(self, run: Run, what: str) -> None:
        done = sum(self.folder.result(each) is not None for each in self.runs)
        print(f"[{done}/{len(self.runs)}] {run}: {what}", flush=True)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM, and raise KeyboardInterrupt at the end if one came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda received, _: came.append(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _secret_words(recipe: dict[str, Any]) -> list[str]:
    """Secret settings, which are in no file, as words for the started process."""
    keys, words = keys_of(Recipe), []
    for name in (*keys.mappings, *keys.values):
        section, _, key = name.rpartition(".")
        value = recipe[section][key] if section else recipe[key]
        if hidden(value, key) != value:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _came_to(result: Result) -> str:
    if result.diverged is not None:
        return f"diverged: {result.diverged}"
    return f"{result.accuracy:.2%}"
