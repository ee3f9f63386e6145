"""Who trains what: a lock per run that ends with its holder, on this machine and on others."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from robust_dist.documents import read_json

BEAT_SECONDS = 10.0
# A holder on another machine that has not touched its claim for so long is taken for dead.
STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """Who has a claim.

    Attributes:
        host: Its machine's name.
        pid: Its process there.
        kernel: The machine's boot, within which a lock is decisive.
    """

    host: str
    pid: int
    kernel: str


class Claim:
    """The right to train one run.

    The file is locked (flock), so that on one machine the claim ends when its last holder does, however it ends; the
    training process inherits the lock, and so a run is never trained twice at a time. File systems may not show other
    machines this lock: the holder also touches the file, and another machine's claim is left alone until it has not
    been touched for `STALE_SECONDS` by the file system's own clock.
    """

    def __init__(self, path: Path, file: IO[str], holder: Holder) -> None:
        self.path, self._file, self._holder = path, file, holder

    @property
    def fileno(self) -> int:
        """What the training process inherits."""
        return self._file.fileno()

    def beat(self) -> None:
        """Show other machines that the holder is alive; a file system that is away for a moment ends no study."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let others have it."""
        with contextlib.suppress(OSError):
            if _holder(self.path) == self._holder:
                self.path.write_text("")
        self._file.close()


def take(path: Path) -> Claim | None:
    """Take the claim, or None where a live process has it."""
    file = path.open("a+")
    if not _lock(file) or not _is_free(path):
        file.close()
        return None
    ours = Holder(socket.gethostname(), os.getpid(), _kernel())
    path.write_text(json.dumps(vars(ours)))
    return Claim(path, file, ours)


def look(path: Path) -> Holder | None:
    """Who holds the claim and is alive, or None."""
    if not path.exists():
        return None
    with path.open("a+") as file:
        return None if _lock(file) and _is_free(path) else _holder(path)


def _lock(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether a claim whose lock could be had is nobody's."""
    holder = _holder(path)
    return holder is None or holder.kernel == _kernel() or _age(path) > STALE_SECONDS


def _holder(path: Path) -> Holder | None:
    try:
        found: Holder = read_json(path, Holder)
    except (OSError, ValueError):
        # Empty where it was given back; torn where its writer was killed, which the lock tells better.
        return None
    return found


def _age(path: Path) -> float:
    """Seconds since the file was touched; its file system's clock says what the time is, not this machine's."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as probe:
        return os.stat(probe.name).st_mtime - path.stat().st_mtime


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
