"""Workers: each takes the next run, trains it in a process of its own, and notes what came of it."""

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
from robust_dist.private import has_options, hidden
from robust_dist.ranks.claim import BEAT_SECONDS, RunClaim
from robust_dist.study.child import GRACE_SECONDS, Launcher, gpus, slot_environment
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import Run, Study
from robust_dist.study.outcome import Result, judge
from robust_dist.study.queue import Queue
from robust_dist.train.keys import keys_of
from robust_dist.train.recipe import Recipe, recipe_dict
from robust_dist.yaml_file import dump_yaml

POLL_SECONDS = 0.5
# How often a worker without a run looks whether another's has died: it costs a file or two a run.
LOOK_SECONDS = 2.0


@dataclass
class _Training:
    """A run that this process's workers train."""

    run: Run
    trial: int
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
        self.folder, self.study, self.recipes, self.num_workers = folder, study, recipes, num_workers
        with folder.alone():
            self.queue = Queue(folder.journal, study)
            self.queue.fill(run.name for run in study.runs() if folder.result(run) is not None)
        self.gpus = gpus(os.environ)
        self.launcher = Launcher(forks=not self.gpus)
        self.slots: dict[int, _Training] = {}
        self._beaten = time.monotonic()
        self._look_at = 0.0
        self._told_to_wait = False

    def work(self) -> None:
        """Train until no run is left, here or with other workers; whatever ends this ends the training processes."""
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
            self.queue.finish(training.trial, outcome.accuracy, diverged=outcome.diverged is not None)
            self._say(run, f"{_came_to(outcome)} ({seconds})")
        else:
            self.folder.write_failure(run, outcome)
            self.queue.fail(training.trial)
            indented = outcome.log.replace("\n", "\n    ")
            self._say(run, f"FAILED with status {status} ({seconds}); {log} ends:\n    {indented}")

    def _start(self) -> None:
        for slot in range(self.num_workers):
            if slot in self.slots:
                continue
            if time.monotonic() < self._look_at:
                return
            # Whatever was taken and started must be known to what ends it.
            with _interrupted_later():
                taken = self._take()
                if taken is not None:
                    self.slots[slot] = self._launch(slot, *taken)
            if taken is None:
                self._look_at = time.monotonic() + LOOK_SECONDS
                return

    def _take(self) -> tuple[Run, int, RunClaim] | None:
        """The next run that nobody has: a queued one, or one whose worker died."""
        for run, trial in self.queue.waiting():
            claim = RunClaim.take(self.folder.make("claims", run))
            if claim is not None:
                if self.queue.start(trial) and not self._is_finished(run, trial):
                    return run, trial, claim
                claim.release()
        mine = {training.run.name for training in self.slots.values()}
        for run, trial in self.queue.running():
            claim = None if run.name in mine else RunClaim.take(self.folder.make("claims", run))
            if claim is not None:
                # Its worker may have noted a result, or ended properly, between the look and the claim.
                if not self._is_finished(run, trial) and self.queue.fail(trial):
                    again = self.queue.add(run)
                    if self.queue.start(again):
                        self._say(run, "its worker died; going on with it")
                        return run, again, claim
                claim.release()
        return None

    def _is_finished(self, run: Run, trial: int) -> bool:
        result = self.folder.result(run)
        if result is None:
            return False
        self.queue.finish(trial, result.accuracy, diverged=result.diverged is not None)
        return True

    def _launch(self, slot: int, run: Run, trial: int, claim: RunClaim) -> _Training:
        recipe = self.folder.make("recipes", run, ".yaml")
        ours = recipe_dict(self._recipe(run))
        write_atomically(recipe, dump_yaml(hidden(ours)), private=has_options(ours))
        log = self.folder.make("logs", run, ".log").open("ab")
        words = ["--config", str(recipe), *_secret_words(ours), "--run_dir", str(self.folder.of("runs", run))]
        words += [word for module in sorted(own_code.named) for word in ("--import", module)]
        env = slot_environment(slot, self.num_workers, self.gpus, os.environ)
        process = self.launcher.start(words, env, log, claim.fileno)
        return _Training(run, trial, claim, process, log, time.monotonic())

    def _recipe(self, run: Run) -> Recipe:
        return replace(self.recipes[run.cell.name], seed=run.seed)

    def _is_over(self) -> bool:
        if self.queue.waiting():
            return False
        others = self.queue.running()
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
        """End what still trains and give its runs back."""
        for training in self.slots.values():
            training.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for training in self.slots.values():
            training.process.join(max(0.0, deadline - time.monotonic()))
            if training.process.exitcode is None:
                training.process.kill()
                training.process.join()
            training.log.close()
            if self.queue.fail(training.trial):
                self.queue.add(training.run)
            training.claim.release()
        self.slots.clear()

    def _say(self, run: Run, what: str) -> None:
        runs = list(self.study.runs())
        done = sum(self.folder.result(one) is not None for one in runs)
        print(f"[{done}/{len(runs)}] {run}: {what}", flush=True)


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
    """Secret settings, which no file has, as words for the started process."""
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
