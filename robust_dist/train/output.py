"""Output that may end before the run does: a full disk, a reader that is gone, a terminal that was closed."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from robust_dist.train.rank_info import Rank

LOG = "log.txt"


class LastingOutput:
    """While it is entered, a write to stdout or stderr that fails ends that stream's output and nothing else.

    The first one that fails is noted in a line of RUN/log.txt, as soon as the run has its folder.

    Args:
        rank: Who this process is, and where its run's folder is once that is claimed.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._note: str | None = None
        self._noted = False
        self._streams: dict[str, Any] = {}

    def __enter__(self) -> "LastingOutput":
        _occupy_descriptors()
        for name in ("stdout", "stderr"):
            stream = self._streams[name] = getattr(sys, name)
            # A process that was started with the descriptor closed has none.
            shown = stream if stream is not None else open(os.devnull, "w")
            setattr(sys, name, _Stream(shown, name, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, stream in self._streams.items():
            # What is still buffered would otherwise fail at the interpreter's end, with an exit status of its own.
            getattr(sys, name).flush()
            setattr(sys, name, stream)

    def claimed(self, folder: Path) -> None:
        """The run's folder belongs to this run from now on."""
        self.rank.claimed(folder)
        self._write_note()

    def ended(self, name: str, error: Exception) -> None:
        """Note that a stream takes no more."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._note = self._note or f"{now} {self.rank}: {name} takes no more output ({error}); training goes on\n"
        self._write_note()

    def _write_note(self) -> None:
        if self._note is None or self._noted or self.rank.folder is None:
            return
        self._noted = True
        with contextlib.suppress(OSError), (self.rank.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(self._note)


def _occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 where they are closed: a file would get the number, and the prints of C code."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Stream:
    """A text stream whose failures are told to its `LastingOutput`, once."""

    def __init__(self, stream: Any, name: str, owner: LastingOutput) -> None:
        self._stream, self._name, self._owner = stream, name, owner
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own; what it does not take is dropped."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`, for each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As the stream's own; what it does not take is dropped."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self._ended:
            return
        try:
            action()
        except UnicodeError:
            raise
        # A ValueError is a stream that somebody has closed.
        except (OSError, ValueError) as error:
            self._ended = True
            self._discard()
            self._owner.ended(self._name, error)

    def _discard(self) -> None:
        """Let what is buffered, and what C code prints, go nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
