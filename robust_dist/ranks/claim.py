"""Claims: one live run per folder, and one live worker per run of a study, across hosts.

Within a host, a system lock decides immediately: it ends with the last process that holds it, however that ends. Not
every file system supports such locks between hosts, so a holder also writes heartbeats.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from robust_dist.documents import read_json

_LOCK = ".lock"
_OWNER = ".owner-"
_LENGTH = 512
# A run writes a heartbeat every `_BEAT` seconds; after `_SILENCE` seconds without a change it is considered dead.
_BEAT = 2.0
_SILENCE = 20.0
# A study's worker touches its claim every `BEAT_SECONDS`; after `STALE_SECONDS` without it is considered dead.
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
# A killed process's lock ends with the last of its children.
_LINGER = 30.0
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(ValueError):
    """Another live run holds the folder; the message names it."""


class FolderLostError(RuntimeError):
    """The folder was deleted or renamed, or taken over by another run while this one wrote no heartbeat."""


def host_id() -> str:
    """The host's name and boot, equal for processes that share a kernel."""
    return f"{socket.gethostname()}/{_boot('unknown')[:8]}"


def _boot(default: str) -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return default


class Lock:
    """A system lock (flock) on a file, which is created if it is missing."""

    def __init__(self, path: Path) -> None:
        self.file: IO[str] = path.open("a+", encoding="utf-8")

    def get(self) -> bool | None:
        """Try to take the lock without waiting; returns whether it succeeded, None if the file system has no locks."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return None if error.errno in _NOT_SUPPORTED else False
        return True

    def close(self) -> None:
        """Release it, unless a child process still has the file open."""
        self.file.close()


class FolderClaim:
    """This process's claim on a run's folder, from `take` to `release`.

    The holder writes heartbeats into its own file, and a process starting on another host watches, by its own clock,
    whether the file still changes; written times are ignored. Each holder creates a file with the next number
    exclusively, so of several starts only one wins; a holder that was suspended for so long that it was considered dead
    finds the higher number before it completes a checkpoint, and gives up.

    Args:
        folder: The run's folder; it must exist.
        host: Name of this host.
        locks: Whether to use the file system's locks, too.
        beat: Seconds between heartbeats.
        silence: Seconds without a heartbeat after which a holder on another host is considered dead.
    """

    def __init__(
        self, folder: Path, *, host: str = "", locks: bool = True, beat: float = _BEAT, silence: float = _SILENCE
    ) -> None:
        self.folder, self.host, self.locks = folder, host or host_id(), locks
        self.beat, self.silence = beat, silence
        self._lock: Lock | None = None
        self._mine: Path | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the folder, after a bounded wait if its last holder may be dying.

        Raises:
            FolderInUseError: A live run holds it.
        """
        if self.locks:
            self._take_lock()
        try:
            self._take_number()
        except BaseException:
            self._unlock()
            raise
        self._thread = threading.Thread(target=self._keep_beating, name="run-folder", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that the folder still belongs to this process.

        Raises:
            FolderLostError: It belongs to another run, or no longer exists.
        """
        if not self.folder.is_dir():
            raise FolderLostError(
                f"{self.folder} is gone: it was deleted or renamed while this run was training; nothing was made in "
                "its place. Where it was renamed, the same command with its new run_dir goes on from there"
            )
        newest = self._newest()
        if not self._is_mine(newest):
            raise FolderLostError(
                f"{self.folder} was taken over by another run ({_text(newest)}) while this process gave no sign of "
                f"life for {self.silence:g} s or more; nothing was changed there since"
            )

    def release(self) -> None:
        """Let another run take the folder."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._mine is not None and self._is_mine(self._mine):
            # If the disk can no longer be written, the lock and the missing heartbeat must suffice.
            with contextlib.suppress(OSError):
                self._mine.unlink(missing_ok=True)
        self._mine = None
        self._unlock()

    def _is_mine(self, owner: Path | None) -> bool:
        return owner is not None and owner == self._mine and _read(owner).get("token") == self._token

    def _take_lock(self) -> None:
        self._lock = lock = Lock(self.folder / _LOCK)
        deadline = None
        while (locked := lock.get()) is False:
            holder = self._newest()
            if deadline is None:
                deadline = time.monotonic() + (_LINGER if self._may_be_dead(holder) else 0.0)
            if time.monotonic() >= deadline:
                self._unlock()
                raise FolderInUseError(self._in_use(holder))
            time.sleep(0.1)
        self.locks = locked is True

    def _may_be_dead(self, holder: Path | None) -> bool:
        """Whether the lock may belong to a dying process, of a start that has ended or was killed for a restart."""
        noted = _read(holder) if holder is not None else {}
        if holder is not None and noted.get("host") != self.host:
            # A network file system keeps a lost host's lock for a while.
            self._outlast(holder)
            return True
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or not _alive(noted.get("pid"))

    def _take_number(self) -> None:
        while True:
            newest = self._newest()
            if newest is not None:
                self._outlast(newest)
            number = int(newest.name.removeprefix(_OWNER)) if newest is not None else 0
            if self._create(number + 1):
                break
        for path in self._owners():
            if self._mine is not None and path < self._mine:
                path.unlink(missing_ok=True)

    def _outlast(self, newest: Path) -> None:
        """Wait until the holder is known to be dead or gone.

        Raises:
            FolderInUseError: It is alive.
        """
        noted = _read(newest)
        if noted.get("host") == self.host and (self.locks or not _alive(noted.get("pid"))):
            return
        deadline = time.monotonic() + self.silence
        print(f"{self.folder} was held by {_text(newest)}: watching it for {self.silence:g} s", flush=True)
        while time.monotonic() < deadline:
            time.sleep(min(self.beat / 2, 1.0))
            if _read(newest) != noted and newest.exists():
                raise FolderInUseError(self._in_use(newest))
            if not newest.exists():
                return

    def _create(self, number: int) -> bool:
        """Create the owner's file with this number, unless another start was faster."""
        path = self.folder / f"{_OWNER}{number:06d}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        os.close(descriptor)
        self._token, self._beats, self._mine = secrets.token_hex(8), 0, path
        self._write()
        return True

    def _write(self) -> None:
        assert self._mine is not None
        noted = {"host": self.host, "pid": os.getpid(), "token": self._token, "beats": self._beats}
        # Opened, synced and closed each time, so that another host sees it over NFS.
        descriptor = os.open(self._mine, os.O_WRONLY)
        try:
            os.pwrite(descriptor, json.dumps(noted).ljust(_LENGTH).encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.beat):
            self._beats += 1
            # The run's own writes report a full disk or a lost mount.
            with contextlib.suppress(OSError):
                self._write()

    def _owners(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_OWNER}*"))

    def _newest(self) -> Path | None:
        owners = self._owners()
        return owners[-1] if owners else None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _in_use(self, holder: Path | None) -> str:
        return (
            f"run_dir={str(self.folder)!r} is in use by a live run ({_text(holder)}); wait for it, stop it, or choose "
            "another run_dir"
        )


def is_held(folder: Path) -> bool:
    """Whether a live run holds a folder; if it is on another host, this waits for its heartbeat."""
    owner = max(folder.glob(f"{_OWNER}*"), default=None)
    noted = _read(owner) if owner is not None else {}
    if owner is None or not noted:
        return False
    if noted.get("host") == host_id():
        return _alive(noted.get("pid"))
    deadline = time.monotonic() + 2 * _BEAT
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if _read(owner) != noted:
            return owner.exists()
    return False


@dataclass(frozen=True)
class Worker:
    """The worker that holds a study's run: its machine, its process, and the boot during which its lock is valid."""

    host: str
    pid: int
    kernel: str


class RunClaim:
    """The right to train one run of a study; created by `take`.

    The file is locked and names the worker; the training process inherits the lock, so a run is never trained twice
    at the same time. The worker also touches the file, and another machine's claim is respected until it has not been
    touched for `STALE_SECONDS` by the file system's clock.
    """

    def __init__(self, path: Path, lock: Lock, worker: Worker) -> None:
        self.path, self._lock, self._worker = path, lock, worker

    @classmethod
    def take(cls, path: Path) -> "RunClaim | None":
        """The claim, or None if a live process holds it."""
        lock = Lock(path)
        if not lock.get() or not _is_free(path):
            lock.close()
            return None
        ours = Worker(socket.gethostname(), os.getpid(), _boot(socket.gethostname()))
        path.write_text(json.dumps(vars(ours)))
        return cls(path, lock, ours)

    @staticmethod
    def worker_of(path: Path) -> Worker | None:
        """The live worker that holds the claim, or None."""
        if not path.exists():
            return None
        lock = Lock(path)
        try:
            return None if lock.get() and _is_free(path) else _worker(path)
        finally:
            lock.close()

    @property
    def fileno(self) -> int:
        """The file descriptor that the training process inherits."""
        return self._lock.file.fileno()

    def beat(self) -> None:
        """Show other machines that the worker is alive; errors of the file system are ignored."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let others take it."""
        with contextlib.suppress(OSError):
            if _worker(self.path) == self._worker:
                self.path.write_text("")
        self._lock.close()


def _is_free(path: Path) -> bool:
    """Whether a claim whose lock was obtained is free."""
    worker = _worker(path)
    return worker is None or worker.kernel == _boot(socket.gethostname()) or age(path) > STALE_SECONDS


def _worker(path: Path) -> Worker | None:
    try:
        found: Worker = read_json(path, Worker)
    except (OSError, ValueError):
        # Empty if it was released; incomplete if its writer was killed, which the lock shows.
        return None
    return found


def age(path: Path) -> float:
    """Seconds since the file was touched, by the file system's clock."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as probe:
        return os.stat(probe.name).st_mtime - path.stat().st_mtime


def _read(path: Path) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = read_json(path, dict[str, Any])
    except (OSError, ValueError):
        return {}
    return noted


def _text(path: Path | None) -> str:
    noted = _read(path) if path is not None else {}
    return f"pid {noted['pid']} on {str(noted.get('host')).partition('/')[0]}" if "pid" in noted else "another process"


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OverflowError, ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
