"""The run's output: copied to RUN/log.txt, and allowed to fail (a full disk, a closed terminal) before the run ends."""

import contextlib
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from robust_dist.private import hidden_text, hidden_words
from robust_dist.train.failures import Rank

LOG = "log.txt"
# Limit for output from before the run's folder exists; an earlier error belongs to no run.
_MOST_LINES = 10_000
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class LastingOutput:
    """While entered, also writes the first rank's stdout and stderr to RUN/log.txt, without secrets.

    The file is opened once the run has its folder, and starts with what was printed before; each start appends to it. A
    failed write to stdout or stderr ends that stream's output and nothing else; any rank records the first failure in
    the file. If the file itself cannot be written, the console says so once.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._note: str | None = None
        self._noted = False
        self._streams: dict[str, Any] = {}
        self._log = _Log() if rank.number == 0 else None

    def __enter__(self) -> "LastingOutput":
        _occupy_descriptors()
        for name in ("stdout", "stderr"):
            stream = self._streams[name] = getattr(sys, name)
            # None if the process was started with the descriptor closed.
            shown = stream if stream is not None else open(os.devnull, "w")
            setattr(sys, name, _Stream(shown, name, self, self._log))
        return self

    def __exit__(self, *error: object) -> None:
        for name, stream in self._streams.items():
            # Buffered output would otherwise fail at interpreter exit, with an exit status of its own.
            getattr(sys, name).flush()
            setattr(sys, name, stream)
        if self._log is not None:
            self._log.close()

    def claimed(self, folder: Path) -> None:
        """Called once the run's folder belongs to this run."""
        self.rank.claimed(folder)
        if self._log is not None:
            self._log.open(folder / LOG)
        self._write_note()

    def ended(self, name: str, error: Exception) -> None:
        """Record that a stream cannot be written any more."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._note = (
            self._note or f"{now} {self.rank}: {name} cannot be written any more ({error}); training continues\n"
        )
        self._write_note()

    def _write_note(self) -> None:
        if self._note is None or self._noted or self.rank.folder is None:
            return
        self._noted = True
        with contextlib.suppress(OSError), (self.rank.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(self._note)


class _Log:
    """Writes whole lines of output to a file; those from before `open` are kept until then."""

    def __init__(self) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._waiting: list[str] | None = [f"--- {now} {shlex.join(hidden_words(sys.argv))}\n"]
        self._file: Any = None
        self._begun: dict[str, str] = {}
        # Bars are drawn by a thread too, and a warning of ours may be printed while a line is added.
        self._lock = threading.RLock()

    def open(self, path: Path) -> None:
        """Start writing, beginning with what was kept."""
        waiting, self._waiting = self._waiting or [], None
        try:
            # Line-buffered: a killed process leaves every line in the file.
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            self._end(path, error)
        for line in waiting:
            self._put(line)

    def add(self, name: str, text: str) -> None:
        """Add what a stream printed; of a line that was overwritten, such as a bar, only its last state."""
        with self._lock:
            *lines, self._begun[name] = (self._begun.get(name, "") + text).split("\n")
            self._begun[name] = self._begun[name].rpartition("\r")[2]
            for line in lines:
                self._keep(line)

    def close(self) -> None:
        """Write an unfinished last line."""
        for name, rest in self._begun.items():
            if rest:
                self.add(name, "\n")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _keep(self, line: str) -> None:
        states = [state for state in _ESCAPES.sub("", line).split("\r") if state.strip()]
        whole = hidden_text(states[-1].rstrip() if states else "") + "\n"
        if self._waiting is None:
            self._put(whole)
        elif len(self._waiting) < _MOST_LINES:
            self._waiting.append(whole)

    def _put(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            self._end(Path(file.name), error)

    def _end(self, path: Path, error: OSError) -> None:
        print(
            f"warning: {path} cannot be written any more ({error.strerror}); the run continues without it",
            file=sys.stderr,
        )


def _occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if they are closed: another file would get the number, and C code's output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Stream:
    """A text stream copied into the log; its first failure is reported to its `LastingOutput`."""

    def __init__(self, stream: Any, name: str, owner: LastingOutput, log: _Log | None) -> None:
        self._stream, self._name, self._owner, self._log = stream, name, owner, log
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Like the stream's own; text that it cannot write is dropped."""
        self._attempt(lambda: self._stream.write(text))
        if self._log is not None:
            self._log.add(self._name, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Call `write` for each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Like the stream's own; text that it cannot write is dropped."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self._ended:
            return
        try:
            action()
        except UnicodeError:
            raise
        # A ValueError means that somebody has closed the stream.
        except (OSError, ValueError) as error:
            self._ended = True
            self._discard()
            self._owner.ended(self._name, error)

    def _discard(self) -> None:
        """Discard buffered output and what C code prints."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
