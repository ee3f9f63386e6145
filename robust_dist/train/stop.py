"""Stopping on a signal: all ranks save at the same step and exit, and the next start resumes there."""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from robust_dist.ranks.claim import host_id
from robust_dist.ranks.talk import Ballot, gather, on_rank_0
from robust_dist.train.folder import RunFolder
from robust_dist.train.saving import Saver

# EX_TEMPFAIL of sysexits.h: not done; the same command resumes.
STOPPED_STATUS = 75
# Sent by SLURM's --signal, Kubernetes, spot notices and launchers; and by a terminal: Ctrl-C, and hang-up.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# SLURM may signal every process of a step, and a launcher then forwards the same notice again.
_ECHO_SECONDS = 10.0
# A launcher forwards a terminal's first Ctrl-C within this time; a later one is a person's second.
_TYPED_ECHO_SECONDS = 1.0


class Stopped(Exception):
    """The run was asked to stop by the signal `name` and has saved, at `step` of `total_steps`, in `checkpoint`."""

    def __init__(self, name: str, step: int, total_steps: int, checkpoint: str) -> None:
        super().__init__(name, step, total_steps, checkpoint)
        self.name, self.step, self.total_steps, self.checkpoint = name, step, total_steps, checkpoint

    def __str__(self) -> str:
        return (
            f"stopped by {self.name} at step {self.step} of {self.total_steps}; saved in {self.checkpoint}; "
            "the same command resumes from there"
        )


def launcher() -> list[Any]:
    """The identity of the process that started this rank."""
    return [host_id(), os.getppid()]


def launchers() -> list[list[Any]]:
    """The distinct launchers of all ranks."""
    return [list(pair) for pair in sorted({tuple(pair) for pair in gather(launcher())})]


def check_not_stopped(note: dict[str, Any]) -> None:
    """Exit again (raise Stopped) if a launcher restarts its ranks after a signal stopped the run."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and launcher() in note.get("launchers", []):
        raise Stopped(note["signal"], note["step"], note["total_steps"], note["checkpoint"])


class StopSignals:
    """Records SIGTERM, SIGUSR1, SIGINT and SIGHUP while entered; a second one ends the process at once.

    A second SIGINT counts from 1 s after the first, any other pair from 10 s: launchers forward the same notice.
    Signals that the process was started ignoring (nohup, a shell's background job) stay ignored. A thread does the
    recording, so that the second signal also ends a rank whose main thread hangs in a collective. Outside the main
    thread nothing is recorded.

    Attributes:
        received: The first signal, or None.
    """

    _entered: "StopSignals | None" = None

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._write = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # The C handler writes the number; the Python one only has to exist.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *_: None) for number in heard}
        threading.Thread(target=self._listen, args=(read,), name="stop-signals", daemon=True).start()
        StopSignals._entered = self
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before:
            return
        StopSignals._entered = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)

    def _listen(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(signal.Signals(number))
        os.close(read)

    def _note(self, received: signal.Signals) -> None:
        if self.received is None:
            self.received, self._at = received, time.monotonic()
            return
        typed = received is self.received is signal.SIGINT
        if time.monotonic() - self._at > (_TYPED_ECHO_SECONDS if typed else _ECHO_SECONDS):
            print(f"a second {received.name}: exiting at once, nothing more is saved", file=sys.stderr, flush=True)
            os._exit(128 + received)


def _forget_in_child() -> None:
    """Restore default signals in a forked child (a data worker), which does not speak for its parent."""
    if StopSignals._entered is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in StopSignals._entered._before:
                signal.signal(number, signal.SIG_DFL)
        StopSignals._entered = None


class Stopper:
    """Pauses all ranks at the same step if one was signalled, or could not write its part of a checkpoint.

    At each step the ranks vote on whether any of them wants to pause. None waits for the others: the answer comes one
    step later, and is the same on all of them.

    Attributes:
        stop: The signal's name once the ranks agree to stop.
    """

    def __init__(self, saver: Saver) -> None:
        self.saver = saver
        self.stop: str | None = None
        self._signals = StopSignals()
        self._vote: Ballot | None = None

    def __enter__(self) -> "Stopper":
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._is_pause_wanted()
        self._signals.__exit__(*error)

    def ask(self) -> bool:
        """After each step: whether the run should stop; the same on every rank.

        Raises:
            CheckpointError: On every rank: one of them could not write the last checkpoint.
        """
        signalled = self._signals.received is not None and self.stop is None
        is_wanted = self._is_pause_wanted()
        self._vote = Ballot(signalled or self.saver.has_failed(), None)
        if is_wanted:
            self._confer()
        return self.stop is not None

    def _is_pause_wanted(self) -> bool:
        """Read the vote of the previous step."""
        vote, self._vote = self._vote, None
        return vote is not None and vote.count() > 0

    def _confer(self) -> None:
        received = self._signals.received
        found = gather((None if received is None else received.name, self.saver.has_failed()))
        self.stop = next((name for name, _ in found if name is not None), None)
        if any(failed for _, failed in found):
            self.saver.wait()

    def leave(self, folder: RunFolder, step: int, total_steps: int) -> None:
        """Record the stop in the run's folder, and raise Stopped."""
        assert self.stop is not None
        checkpoint = str(self.saver.store.path_of(step))
        note = {"signal": self.stop, "step": step, "total_steps": total_steps, "checkpoint": checkpoint}
        note["launchers"] = launchers()
        on_rank_0(lambda: folder.note_stop(note))
        raise Stopped(self.stop, step, total_steps, checkpoint)


os.register_at_fork(after_in_child=_forget_in_child)
