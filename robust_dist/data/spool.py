"""Tables fetched once for all processes of a node: Arrow files in a temporary folder, mapped by each process."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from robust_dist.data.errors import DataError
from robust_dist.extras import require

MOST_BYTES = 64 * 2**30
LOCKS = 64


class Spool:
    """A folder of named tables shared by a node's processes; the oldest are removed when it grows too large.

    The workers of a node read the same row groups at about the same time, in scattered samples. Each is fetched by one
    process while the others that want it wait, and mapped by all. Files stay for the next run.

    Args:
        folder: created when it is used. By default `robust_dist-UID` in the system's temporary folder or, if that name
            is a link or belongs to another user, a private folder removed with this process.
        most_bytes: limit for all tables; never more than half of the free space.
    """

    def __init__(self, folder: str | Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = Path(folder) if folder is not None else self._shared_or_private()
        self._named = folder is not None
        self.most_bytes = most_bytes

    def table(self, name: str, fetch: Callable[[], Any]) -> Any:
        """The `pyarrow.Table` with this name, from its file, or from `fetch` and then stored.

        Raises:
            DataError: the folder belongs to another user, or is a link made by another user.
        """
        self.check_folder()
        file = self.folder / f"{name}.arrow"
        with contextlib.suppress(OSError, _invalid()):
            return _mapped(file)
        with locked(self.folder / f"lock-{zlib.crc32(name.encode()) % LOCKS}"):
            with contextlib.suppress(OSError, _invalid()):
                return _mapped(file)
            table = fetch()
            # A full disk costs speed, not the run.
            with contextlib.suppress(OSError):
                self._put(file, table)
                return _mapped(file)
            return table

    def _shared_or_private(self) -> Path:
        """Anybody can create the shared name first, so it is used only if it is this user's own folder."""
        shared = Path(tempfile.gettempdir(), f"robust_dist-{os.getuid()}")
        reason = _not_ours(shared)
        if reason is None:
            return shared
        private = Path(tempfile.mkdtemp(prefix="robust_dist-"))
        print(f"{shared} is not used: {reason}; this process keeps its row groups in {private}", flush=True)
        weakref.finalize(self, _remove_in, os.getpid(), private)
        return private

    def check_folder(self) -> None:
        """Create the folder; raises a DataError if it is another user's, or a link made by another user."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _not_ours(self.folder, links=self._named)
        if reason is not None:
            raise DataError(f"the folder {self.folder} is not used: {reason}; set spool_dir, or TMPDIR")

    def _put(self, file: Path, table: Any) -> None:
        ipc = require("pyarrow.ipc", extra="data", purpose="parquet files")
        beside = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            with ipc.new_file(str(beside), table.schema) as writer:
                writer.write_table(table)
            self._make_room(beside.stat().st_size)
            os.replace(beside, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _make_room(self, wanted: int) -> None:
        """Remove the oldest tables; a process that has one mapped keeps it until it lets go."""
        found = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".arrow")]
        stats = []
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                stats.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        used = sum(size for _, size, _ in stats) + wanted
        limit = min(self.most_bytes, (shutil.disk_usage(self.folder).free + used) // 2)
        for _, size, path in sorted(stats):
            if used <= limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes out; the system releases a killed process's lock."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _not_ours(folder: Path, *, links: bool = False) -> str | None:
    """Why `folder` cannot be trusted with files; None if it can, or does not exist yet.

    Args:
        folder: the folder to inspect.
        links: whether a link that this user made to a folder of theirs is acceptable; they then named it themselves.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode) and not (links and found.st_uid == os.getuid() and folder.is_dir()):
        return "it is a link"
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    if found.st_uid != os.getuid():
        return "it belongs to another user"
    return "other users can write to it" if found.st_mode & 0o022 and not links else None


def _remove_in(pid: int, folder: Path) -> None:
    """Remove the folder, unless this is a worker forked from the process that created it."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _mapped(file: Path) -> Any:
    pyarrow = require("pyarrow", extra="data", purpose="parquet files")
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def _invalid() -> Any:
    return require("pyarrow", extra="data", purpose="parquet files").ArrowInvalid
