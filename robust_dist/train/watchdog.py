"""Ending a rank that hangs, with the stacks of its threads.

`tick(what)` is called wherever a run makes progress. If there is no tick for DUMP_SHARE of `timeout_seconds`, the rank
writes the stacks of all its threads to RUN/stacks/rank-N.txt, before the collectives' own timeout ends it without
saying where it was. A rank in a collective is ended by that timeout; one that is stuck elsewhere (a dead file system, a
loader, a lock) has no such timeout, and is ended here with HANG_STATUS.

A Python thread does the watching, which needs the interpreter lock; if a stuck extension holds that, the C timer of
`faulthandler`, which the thread keeps resetting, dumps the stacks to stderr. Time in which the whole process was
stopped (SIGSTOP, a debugger, a starved machine) does not count: its peers report that.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from robust_dist.train.failures import Rank

DUMP_SHARE = 0.75
HANG_STATUS = 124
# The descriptor itself: `sys.stderr` may be a notebook's, or a test's.
STDERR = 2
# Modules in which a main thread waits for other ranks (`graph` runs the backward pass, in which DDP and FSDP reduce).
_WAITING = ("torch.distributed", "torch.nn.parallel", "torch.autograd.graph", "accelerate.utils", "deepspeed.comm")
# Time limit for writing a dump or an error, as the disk may be what hangs.
_SECONDS_TO_WRITE = 5.0

_active: "Watchdog | None" = None


class HangError(RuntimeError):
    """No progress for longer than the timeout, and no collective to end the wait."""


def tick(what: str, *, may_be_slow: bool = False) -> None:
    """Tell this process's watchdog, if any, that the run makes progress.

    `what` starts now, worded for a report: "step 12". With `may_be_slow` (a download, a first compilation) it may take
    longer than the timeout: then the stacks are dumped, but the process is not ended.
    """
    if _active is not None:
        _active.note(what, may_be_slow)


class Watchdog:
    """Watches this process while entered.

    Args:
        rank: This process, and its run's folder once that is claimed.
        timeout: Seconds without progress after which a rank is ended.
        on_end: Called with the reason before the process is ended.
    """

    def __init__(self, rank: Rank, timeout: float, on_end: Callable[[str], None] = lambda reason: None) -> None:
        self.rank, self.timeout, self.on_end = rank, timeout, on_end
        # A rank in a collective is left to the collective's own timeout, which starts a little after the last tick.
        self.grace = max(5.0, 0.1 * timeout)
        self._poll = min(1.0, timeout / 20)
        self._last = "the start", True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        global _active
        _active = self
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        _active = None
        self._stop.set()
        self._thread.join(timeout=1)
        faulthandler.cancel_dump_traceback_later()

    def note(self, what: str, may_be_slow: bool = False) -> None:
        """Record progress; see `tick`."""
        self._last = what, may_be_slow

    def _watch(self) -> None:
        seen, silent, dumped, before = self._last, 0.0, False, time.monotonic()
        while not self._stop.wait(self._poll):
            now, last = time.monotonic(), self._last
            if last is not seen:
                seen, silent, dumped = last, 0.0, False
            # After a longer gap between two looks, this process was not running at all.
            silent += min(now - before, 2 * self._poll)
            before = now
            faulthandler.dump_traceback_later(self.timeout, file=STDERR)
            if not dumped and silent >= DUMP_SHARE * self.timeout:
                dumped = True
                self._dump(last[0], silent)
            if silent >= self._limit(may_be_slow=last[1]):
                self._end(last[0], silent)

    def _limit(self, may_be_slow: bool) -> float:
        if may_be_slow:
            return math.inf
        return self.timeout + (self.grace if is_waiting(_main_frame()) else 0)

    def _dump(self, what: str, silent: float) -> None:
        where = describe(_main_frame())
        say(f"{self.rank}: no progress for {silent:.0f} s, since the start of {what}; it is in {where}")
        if not _within(_SECONDS_TO_WRITE, lambda: self._write(f"{what}, for {silent:.0f} s, in {where}")):
            say(f"{self.rank}: {self._path} cannot be written; the stacks:")
            faulthandler.dump_traceback(file=STDERR, all_threads=True)

    @property
    def _path(self) -> Path | None:
        return self.rank.folder and self.rank.folder / "stacks" / f"rank-{self.rank.number}.txt"

    def _write(self, what: str) -> None:
        """Dump into the run's folder; without one, the notice must do."""
        path = self._path
        if path is None:
            return
        path.parent.mkdir(exist_ok=True)
        names = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self.rank}, pid {os.getpid()}\n{what}\n")
            file.write(f"threads: {names}\n{_children()}\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        say(f"{self.rank}: the stacks of its threads are in {path}")

    def _end(self, what: str, silent: float) -> None:
        reason = (
            f"no progress for {silent:.0f} s (timeout_seconds={self.timeout:g}), since the start of {what}; "
            f"it is in {describe(_main_frame())}"
        )
        _within(_SECONDS_TO_WRITE, lambda: self.on_end(reason))
        os._exit(HANG_STATUS)


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Run an action that may hang or fail; returns whether it finished in time."""
    done = threading.Event()

    def act() -> None:
        with contextlib.suppress(Exception):
            action()
            done.set()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def say(text: str) -> None:
    """Write a line to the process's real stderr, at once and in one piece."""
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread with this innermost frame waits for other ranks, as far as Python can see."""
    return frame is not None and frame.f_globals.get("__name__", "").startswith(_WAITING)


def describe(frame: FrameType | None) -> str:
    """The running function, and the innermost caller from this package or the user's code."""
    if frame is None:
        return "an unknown place"
    text, outer = _place(frame), frame
    while outer.f_back is not None and _is_library(outer):
        outer = outer.f_back
    return text if outer is frame else f"{text}, called from {_place(outer)}"


def _is_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    ours = frame.f_globals.get("__name__", "").startswith("robust_dist.")
    return not ours and ("site-packages" in path or path.startswith((os.path.dirname(os.__file__), "<")))


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _children() -> str:
    """Lists children such as loader workers; one in "disk-sleep" waits for a disk or a dead file system."""
    try:
        import psutil

        found = [
            f"{child.pid} {child.name()} ({child.status()})" for child in psutil.Process().children(recursive=True)
        ]
    except Exception as error:
        return f"child processes: unknown ({error})"
    return "child processes: " + (", ".join(found) or "none")
