"""A folder of checkpoints, each one whole or not there.

A checkpoint is written into a `.partial` folder; a manifest with every file's size and CRC-32 comes last, then one
rename makes it visible. A reader trusts what the manifest confirms and nothing else.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_PREFIX = "step-"
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps done.
        metadata: What the writer noted beside the files.
    """

    path: Path
    step: int
    metadata: dict[str, Any]


def file_crc32(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file by a whole newer one; a crash leaves the old or the new, never a part."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync(path.parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after every file's size and CRC-32 were compared with its manifest.

    Raises:
        CheckpointError: No manifest, a manifest of another format, or a file that is missing, short or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error}); it was not written to its end") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.get('format')!r} is not {FORMAT}, which this version reads")
    for name, (size, crc) in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or file_crc32(path) != crc:
            raise CheckpointError(f"{path}: missing, short or changed since it was written")
    return Checkpoint(folder, manifest["step"], manifest["metadata"])


class CheckpointStore:
    """Whole checkpoints under one folder, the newest `keep` of them.

    Args:
        folder: Where they lie; made when the first one is begun.
        keep: How many stay after a newer one is complete.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty folder into which the files of step `step` are to be written."""
        partial = self._partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, metadata: dict[str, Any]) -> Checkpoint:
        """Make the files of `begin(step)` a checkpoint, and let go of the oldest ones.

        Args:
            step: Optimizer steps done.
            metadata: JSON values to note beside the files.
        """
        partial, final = self._partial(step), self.folder / f"{_PREFIX}{step:08d}"
        files = {str(path.relative_to(partial)): [path.stat().st_size, file_crc32(path)] for path in _files(partial)}
        for path in _files(partial):
            fsync(path)
        manifest = {"format": FORMAT, "step": step, "files": files, "metadata": metadata}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
        self._discard(final)
        os.replace(partial, final)
        fsync(self.folder)
        # A torn folder of a later step must not push out what was just written.
        for old in [name for name in self._names() if name.name <= final.name][self.keep :]:
            self._discard(old)
        return Checkpoint(final, step, metadata)

    def newest(
        self, refuse: Callable[[Checkpoint], str | None] = lambda _: None
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and why newer folders were passed over.

        Args:
            refuse: Says why a whole checkpoint is not to be used, or None.
        """
        rejected = []
        self._recover()
        for folder in self._names():
            try:
                found = verify(folder)
            except CheckpointError as error:
                rejected.append(str(error))
                continue
            reason = refuse(found)
            if reason is None:
                return found, rejected
            rejected.append(f"{folder}: {reason}")
        return None, rejected

    def _recover(self) -> None:
        """Finish a commit that was cut off between its manifest and its rename."""
        for partial in self.folder.glob(f".{_PREFIX}*.partial"):
            final = self.folder / partial.name[1:].removesuffix(".partial")
            if not final.exists() and (partial / MANIFEST).exists():
                os.replace(partial, final)

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_PREFIX}{step:08d}.partial"

    def _names(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)

    def _discard(self, folder: Path) -> None:
        """Remove a folder in two moves, so that a half-removed one never has a checkpoint's name."""
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.partial-removed")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
