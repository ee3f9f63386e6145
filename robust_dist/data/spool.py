"""Tables that are fetched once for all processes of a node: Arrow files in a temporary folder, mapped by each."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from robust_dist.data.errors import DataError
from robust_dist.extras import require

MOST_BYTES = 64 * 2**30
LOCKS = 64


class Spool:
    """A folder of tables by name, which a node's processes share; the oldest go when it grows too large.

    The workers of a node read the same row groups at about the same time, a sample here and there. Each of them is
    fetched by one process, while the others that want it wait, and mapped by all. Files stay for the next run.

    Args:
        folder: which is made when it is used; this user's folder in the system's temporary one where not given.
        most_bytes: what all tables may take up; never more than half of the space there is.
    """

    def __init__(self, folder: str | Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir(), f"robust_dist-{os.getuid()}")
        self.most_bytes = most_bytes

    def table(self, name: str, fetch: Callable[[], Any]) -> Any:
        """The `pyarrow.Table` of a name, from its file, or from `fetch` and then put there.

        Raises:
            DataError: the folder is another user's.
        """
        file = self.folder / f"{name}.arrow"
        with contextlib.suppress(OSError, _invalid()):
            return _mapped(file)
        self._make_folder()
        with self._lock(name):
            with contextlib.suppress(OSError, _invalid()):
                return _mapped(file)
            table = fetch()
            # A full disk costs speed, not the run.
            with contextlib.suppress(OSError):
                self._put(file, table)
                return _mapped(file)
            return table

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise DataError(f"the temporary folder {self.folder} is another user's: set spool_dir, or TMPDIR")

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        # The system takes back the lock of a process that is killed.
        with open(self.folder / f"lock-{zlib.crc32(name.encode()) % LOCKS}", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

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


def _mapped(file: Path) -> Any:
    pyarrow = require("pyarrow", extra="data", purpose="parquet files")
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def _invalid() -> Any:
    return require("pyarrow", extra="data", purpose="parquet files").ArrowInvalid
