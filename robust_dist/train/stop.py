"""A signal that asks the run to stop: all ranks save at one step and leave, and the next start goes on from there."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from robust_dist.schedule.ballot import Ballot

# EX_TEMPFAIL of sysexits.h: not done; the same command goes on.
STATUS = 75
# What SLURM's --signal, Kubernetes, spot notices and launchers send.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# SLURM may signal every process of a step, and a launcher then forwards the same notice once more.
_ECHO_SECONDS = 10.0


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop and has saved.

    Args:
        name: The signal's name.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Where it was saved.
    """

    def __init__(self, name: str, step: int, total_steps: int, checkpoint: str) -> None:
        super().__init__(name, step, total_steps, checkpoint)
        self.name, self.step, self.total_steps, self.checkpoint = name, step, total_steps, checkpoint

    def __str__(self) -> str:
        return (
            f"stopped by {self.name} at step {self.step} of {self.total_steps}; saved in {self.checkpoint}; "
            "the same command goes on from there"
        )


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while it is entered; a second one, 10 s later or more, ends the process at once.

    A thread does the noting, so that the second signal also ends a rank whose main thread hangs in a collective.
    Outside the main thread, where Python lets nobody handle signals, nothing is noted.

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
        # The C handler writes the number; the Python one only has to be there.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(read,), name="stop-signals", daemon=True).start()
        StopSignals._entered = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        elif time.monotonic() - self._at > _ECHO_SECONDS:
            print(f"a second {received.name}: leaving at once, nothing more is saved", file=sys.stderr, flush=True)
            os._exit(128 + received)


def _forget_in_child() -> None:
    """A forked child (a data worker) ends by a signal as ever, and does not speak for its parent."""
    if StopSignals._entered is not None:
        StopSignals._entered = None
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


class Lookout:
    """Whether any rank wants all of them to pause for a word: an answer that comes one step late and waits for nobody.

    Every rank asks once a step; the answer is the same on all of them.
    """

    def __init__(self) -> None:
        self._ballot: Ballot | None = None

    def ask(self, wish: bool) -> bool:
        """Cast this step's vote, and say whether any rank wished at the step before.

        Args:
            wish: Whether this rank has something to say.
        """
        wished = self.close()
        self._ballot = Ballot(wish, None)
        return wished

    def close(self) -> bool:
        """Take in the vote that is still out; says whether any rank wished."""
        ballot, self._ballot = self._ballot, None
        return ballot is not None and ballot.count() > 0
