"""Writing checkpoints while training continues; free space, and the size of a checkpoint.

Files are staged on the host and copied by one thread per rank, which calls no collective: each rank records in the
unfinished folder which of its files are on disk, and the first rank completes the checkpoint once every rank has done
so. If one never does, the checkpoint is never completed.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from robust_dist.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    files_in,
    fsync,
    part_path,
    read_part,
    write_atomically,
)
from robust_dist.engines.engine import Engine
from robust_dist.measure.memory import free_memory, text_of
from robust_dist.ranks.talk import ranks_text

SHARED_MEMORY = Path("/dev/shm")
# Headers, random states, the schedule, names.
_SMALL = 1 << 20
_STAGED = "robust_dist-staged-"
_LOCK = ".lock"
_CHUNK = 1 << 22
# Seconds in which a new staging folder must get its lock and its final name.
_BIRTH = 60.0
# How long a run that ends with an error waits for the records of ranks that may be dead.
_LAST_PATIENCE = 20.0


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds, or will hold, `path`."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    try:
        count = free_bytes(path.parent)
        free = f"{text_of(count)} ({count} bytes) are free there"
    except OSError as second:
        free = f"the free space there is unknown ({second.strerror})"
    return CheckpointError(
        f"{path} could not be written: {reason}; {free}. Half-written files are not used, complete checkpoints are "
        "unchanged: make room or fix the disk, then start the same command again"
    )


def _held(param: nn.Parameter) -> int:
    """Elements of a parameter held by this rank."""
    local = param.to_local() if hasattr(param, "to_local") else param
    return int(local.numel())


@dataclass(frozen=True)
class Sizes:
    """The parts of a model that determine the size of its checkpoints.

    Attributes:
        elements: Elements of all parameters.
        held: Those held by this rank.
        bytes_each: Bytes of one element.
        buffers: Bytes of all buffers.
        moments: Bytes of optimizer state per element: two float32 moments.
    """

    elements: int
    held: int
    bytes_each: int
    buffers: int
    moments: int = 2 * 4

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """The sizes of a prepared model, without its outermost wrapper."""
        params = list(model.parameters())
        return cls(
            # Under ZeRO-3 a shard records the size of the whole parameter.
            elements=sum(int(getattr(param, "ds_numel", param.numel())) for param in params),
            held=sum(_held(param) for param in params),
            bytes_each=max((param.element_size() for param in params), default=4),
            buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        )


def checkpoint_bytes(
    engine: Engine,
    model: nn.Module,
    *,
    rank: int,
    world_size: int,
    whole: bool = False,
    averaged: bool = False,
    fast_weights: bool = False,
) -> int:
    """An upper bound on the bytes that this rank writes for one checkpoint.

    The model is the prepared one without its outermost wrapper; `whole` is `Engine.saves_whole`; `averaged`: an
    exponential moving average of the weights is saved too; `fast_weights`: RAdaBeliefW's averaging keeps them.
    """
    sizes = Sizes.of(model)
    if fast_weights:
        sizes = replace(sizes, moments=sizes.moments + 4)
    average = sizes.elements * sizes.bytes_each + sizes.buffers if averaged and rank == 0 else 0
    saved = engine.saved_bytes(sizes, rank, world_size, whole=whole) + sizes.buffers + average
    return int(saved * 1.1) + _SMALL


def unlike_memory(path: Path) -> bool:
    """Whether files at `path` use none of the host's memory."""
    return SHARED_MEMORY not in (path, *path.parents)


def room_for_staging(path: Path) -> int:
    """Bytes that may be staged at `path`: at most half of the memory, so that the system does not kill training."""
    free = free_bytes(path)
    return free if unlike_memory(path) else min(free, free_memory() // 2)


class Staging:
    """A folder of this process below `root`, for files on their way to a checkpoint.

    It is locked while the process lives. The next process that stages there removes the remains of killed ones.

    Raises:
        OSError: The folder does not exist or is not writable.
    """

    def __init__(self, root: Path) -> None:
        sweep(root)
        made = Path(tempfile.mkdtemp(prefix=f".{_STAGED}", dir=root))
        self._lock = (made / _LOCK).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only a locked folder has the name that others look for.
        self.path = made.rename(root / f"{_STAGED}{secrets.token_hex(8)}")

    def folder(self, step: int) -> Path:
        """An empty folder for the files of step `step`."""
        folder = self.path / f"{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep(root: Path) -> list[Path]:
    """Remove files staged by this user's dead processes; returns their folders."""
    removed = []
    for path in [*root.glob(f"{_STAGED}*"), *root.glob(f".{_STAGED}*")]:
        # Another process may be removing it.
        with contextlib.suppress(OSError):
            if _is_dead(path):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


def _is_dead(path: Path) -> bool:
    """Whether a staging folder is this user's, is fully set up, and is locked by no process."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    if path.name.startswith(".") and time.time() - found.st_mtime < _BIRTH:
        return False
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def copy_synced(source: Path, target: Path) -> list[int]:
    """Copy a file and flush it to disk; returns [size, CRC-32]."""
    size = crc = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return [size, crc]


def copy_tree(source: Path, target: Path) -> dict[str, list[int]]:
    """Copy all files below `source` into the existing folder `target`; returns name -> [size, CRC-32].

    Raises:
        CheckpointError: A file could not be written; the message names it and the free space.
    """
    files = {}
    for path in files_in(source):
        name = path.relative_to(source)
        try:
            # `target` itself is never created here: a process that lost its run must not bring it back.
            for parent in [*name.parents][-2::-1]:
                (target / parent).mkdir(exist_ok=True)
            files[str(name)] = copy_synced(path, target / name)
        except OSError as error:
            raise write_failure(target / name, error) from None
    for folder in {(target / name).parent for name in files}:
        fsync(folder)
    return files


class Pending:
    """A checkpoint being written: this rank's files are copied, then the first rank completes it.

    Args:
        store: The run's checkpoints.
        staged: This rank's files; removed once they are copied or copying failed.
        partial: What `store.begin(step)` returned on the first rank.
        step: Optimizer steps done.
        metadata: As for `CheckpointStore.commit`.
        rank: This rank.
        world_size: Number of ranks, each of which writes a part.
        patience: Seconds that the first rank waits for parts that do not grow.
    """

    def __init__(
        self,
        store: CheckpointStore,
        staged: Path,
        partial: Path,
        step: int,
        metadata: dict[str, Any],
        *,
        rank: int,
        world_size: int,
        patience: float,
    ) -> None:
        self.step, self.seconds = step, 0.0
        self.error: Exception | None = None
        self.checkpoint: Checkpoint | None = None
        self._store, self._staged, self._partial, self._metadata = store, staged, partial, metadata
        self._rank, self._world_size, self._patience = rank, world_size, patience
        self._copied, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> Exception | None:
        """Wait until this rank's part is on disk; returns the error, if any."""
        self._copied.wait()
        return self.error

    def result(self) -> Checkpoint:
        """Wait for the completed checkpoint; on the first rank only."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.checkpoint is not None
        return self.checkpoint

    def abandon(self) -> None:
        """Abandon the checkpoint and remove what was written; no rank may still be copying."""
        self._cancelled.set()
        self._thread.join()
        if self._rank == 0:
            self._store.abandon(self.step)

    def close(self) -> None:
        """Finish without communicating: other ranks may be dead."""
        self._patience = min(self._patience, _LAST_PATIENCE)
        self._thread.join()
        if self.error is not None and self._rank == 0:
            self._store.abandon(self.step)

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._copy()
            if self._rank == 0:
                self.checkpoint = self._store.commit(self.step, self._metadata, self._all_parts())
        except OSError as error:
            self.error = write_failure(self._partial, error)
        except Exception as error:
            self.error = error
        finally:
            self._copied.set()
            self.seconds = time.perf_counter() - began

    def _copy(self) -> None:
        try:
            files = copy_tree(self._staged, self._partial)
            write_atomically(part_path(self._partial, self._rank), json.dumps(files))
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)
        self._copied.set()

    def _all_parts(self) -> dict[str, list[int]]:
        """The files of all ranks, once every rank has recorded its own."""
        files: dict[str, list[int]] = {}
        missing, growth, changed = set(range(self._world_size)), -1, time.monotonic()
        while True:
            for rank in sorted(missing):
                part = read_part(self._partial, rank)
                if part is not None:
                    files |= part
                    missing.discard(rank)
            if not missing:
                return files
            size = sum(path.stat().st_size for path in files_in(self._partial))
            if size != growth:
                growth, changed = size, time.monotonic()
            if time.monotonic() - changed > self._patience:
                raise CheckpointError(f"{self._partial}: {ranks_text(missing)} wrote nothing for {self._patience:g} s")
            if self._cancelled.wait(0.05 if self._world_size < 16 else 0.5):
                raise CheckpointError(f"{self._partial}: given up")
