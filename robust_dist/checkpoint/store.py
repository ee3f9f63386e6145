"""A folder of checkpoints, each one whole or not there.

A checkpoint is written into a `.partial` folder; a manifest with every file's size and CRC-32 comes last, then one
rename makes it visible. A reader trusts what the manifest confirms and nothing else. The newest is the one of the
highest step: no clock is asked.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_dist.documents import DocumentError, parse_json, read_json, read_text
from robust_dist.private import has_options

MANIFEST = "manifest.json"
FORMAT = 1
PART = ".part-"
ACCURACY = "eval_accuracy"
_PREFIX = "step-"
_NAMED = re.compile(rf"\.?{_PREFIX}([0-9]{{8,}})(?:\..*)?")
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint: its folder, the optimizer steps done, and what the writer noted beside the files."""

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
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a text file by a whole newer one; a crash leaves the old or the new, never a part.

    With `private` nobody else may read it, whatever the umask allows.
    """
    beside = path.with_name(f".{path.name}.partial")
    # A killed process may have left one that others can read; it is not reused.
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync(path.parent)


def files_in(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint below `folder`, without what the store itself adds."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return (path for path in found if path.name != MANIFEST and not path.name.startswith(PART))


def part_path(folder: Path, rank: int) -> Path:
    """The file in which a rank notes the files of an unfinished checkpoint that it has brought to the disk."""
    return folder / f"{PART}{rank:05d}.json"


def read_part(folder: Path, rank: int) -> dict[str, list[int]] | None:
    """A rank's note: name -> [size, CRC-32]; None where it is not there yet."""
    try:
        note: dict[str, list[int]] = read_json(part_path(folder, rank), dict[str, list[int]])
    except FileNotFoundError:
        return None
    return note


@dataclass
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        format: Of the manifest.
        step: Optimizer steps done.
        files: Name -> (size, CRC-32).
        metadata: JSON values that the writer noted.
        crc32: Of the rest, as `signature` computes it; None in manifests before 0.4.5.
        signed: Whether it was written with a checksum; one that has lost it is then no older version's.
    """

    format: int
    step: int
    files: dict[str, tuple[int, int]]
    metadata: dict[str, Any]
    crc32: int | None = None
    signed: bool = False

    def signature(self) -> int:
        """The CRC-32 of the manifest's content, whatever its formatting."""
        said = [self.format, self.step, {name: list(entry) for name, entry in self.files.items()}, self.metadata]
        # As it will be read: keys that are numbers become text, and sort differently.
        return zlib.crc32(json.dumps(json.loads(json.dumps(said)), sort_keys=True).encode())

    def text(self) -> str:
        """The file, with its checksum in the first line, so that no single cut removes the checksum and a value."""
        return json.dumps({"crc32": 0, **vars(self)} | {"crc32": self.signature(), "signed": True}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after it was compared with its own checksum.

    Raises:
        CheckpointError: There is none, it is torn or changed, of another format, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        kind: _Format = parse_json(text, str(path), _Format)
        if kind.format != FORMAT:
            raise CheckpointError(f"{path}: format {kind.format} is not {FORMAT}, which this version reads")
        found: Manifest = parse_json(text, str(path), Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}; it was not written to its end") from None
    except DocumentError as error:
        raise CheckpointError(f"{error}; the {MANIFEST} is damaged, or was not written to its end") from None
    if found.crc32 != (found.signature() if found.signed or found.crc32 is not None else None):
        raise CheckpointError(f"{path}: changed since it was written (its checksum is another)")
    outside = [name for name in found.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]}, which is outside the folder")
    return found


@dataclass
class _Format:
    """The part of a manifest that is read first: other formats may have other keys."""

    format: int


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after every file's size and CRC-32 were compared with its manifest.

    Raises:
        CheckpointError: No manifest, a damaged one, one of another format or of another step than the folder's name
            says, or a file that is missing, short or changed.
    """
    manifest = read_manifest(folder)
    named = _NAMED.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise CheckpointError(
            f"{folder / MANIFEST}: says step {manifest.step}, and the folder is of step {int(named[1])}"
        )
    check_files(folder, manifest, manifest.files)
    return Checkpoint(folder, manifest.step, manifest.metadata)


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files' size and CRC-32 with the manifest; a CheckpointError names a missing, short or changed one."""
    for name in names:
        path, (size, crc) = folder / name, manifest.files[name]
        try:
            whole = path.is_file() and path.stat().st_size == size and file_crc32(path) == crc
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if not whole:
            raise CheckpointError(f"{path}: missing, short or changed since it was written")


def synced(folder: Path, names: Iterable[str] | None = None) -> dict[str, list[int]]:
    """Bring files below `folder` (`names`, or all of them), and the folders that they are in, to the disk.

    Returns:
        Name -> [size, CRC-32].
    """
    if names is None:
        names = [str(path.relative_to(folder)) for path in files_in(folder)]
    files = {name: [(folder / name).stat().st_size, file_crc32(folder / name)] for name in names}
    for name in files:
        fsync(folder / name)
    for below in {(folder / name).parent for name in files}:
        fsync(below)
    return files


def partial_of(folder: Path, token: str = "") -> Path:
    """The folder into which a checkpoint's files are written first; `token` marks the start that writes them."""
    return folder.with_name(f".{folder.name}{'.' * bool(token)}{token}.partial")


def sign(partial: Path, step: int, files: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> None:
    """Write the manifest of a complete folder: from here on it is a checkpoint, whatever happens to the rename.

    `files` is what `synced` gave of all its files, `metadata` are JSON values to note beside them.
    """
    for note in partial.glob(f"{PART}*"):
        note.unlink()
    entries = {name: (entry[0], entry[1]) for name, entry in files.items()}
    text = Manifest(FORMAT, step, entries, dict(metadata)).text()
    write_atomically(partial / MANIFEST, text, private=has_options(metadata.get("recipe")))


def publish(partial: Path, folder: Path) -> None:
    """Give a signed folder its name, in place of an older checkpoint of that name."""
    discard(folder)
    os.replace(partial, folder)
    fsync(folder.parent)


def recover(partial: Path, folder: Path) -> None:
    """Finish a publication that was cut off between the manifest and the rename."""
    if not folder.exists() and (partial / MANIFEST).is_file():
        os.replace(partial, folder)


def discard(folder: Path) -> None:
    """Remove a folder in two moves, so that a half-removed one never has a checkpoint's name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.partial-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class CheckpointStore:
    """Whole checkpoints under one folder: the newest `keep` of them and the best `keep_best`.

    Args:
        folder: Where they lie; made when the first one is begun.
        keep: How many of the newest stay after a newer one is complete.
        keep_best: How many of the highest `metadata["eval_accuracy"]` stay beside these.
        token: Marks the unfinished folders of this start, so that a process of an earlier one that is still alive
            somewhere can never write into them.
        guard: Called before a checkpoint is begun and before it becomes whole; raises where the folder has gone to
            another run.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        *,
        keep_best: int = 0,
        token: str = "",
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = Path(folder)
        self.keep, self.keep_best, self.token, self.guard = keep, keep_best, token, guard

    def path_of(self, step: int) -> Path:
        """The folder of a step's checkpoint, once it is whole."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, whole or torn, oldest first."""
        return [step for step, _ in map(_order, reversed(self._names())) if step >= 0]

    def begin(self, step: int) -> Path:
        """An empty folder into which the files of step `step` are to be written."""
        self.guard()
        partial = self._partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written since `begin(step)`, so that its space is free again."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def commit(self, step: int, metadata: dict[str, Any], files: dict[str, list[int]] | None = None) -> Checkpoint:
        """Make the files of `begin(step)` a checkpoint, and let go of the oldest ones.

        Args:
            step: Optimizer steps done.
            metadata: JSON values to note beside the files.
            files: Name -> [size, CRC-32] of all of them, where they were brought to the disk already; None: done here.

        Raises:
            CheckpointError: One of `files` is missing or short.
        """
        partial, final = self._partial(step), self.path_of(step)
        if files is None:
            files = synced(partial)
        _check_sizes(partial, files)
        # Once there is a manifest, readers take it for whole, even if the rename was cut off.
        self.guard()
        sign(partial, step, files, metadata)
        self.guard()
        publish(partial, final)
        self._retire(final)
        return Checkpoint(final, step, metadata)

    def clean(self) -> None:
        """Remove what dead processes left half-written or half-removed; only for the one that holds the folder."""
        for pattern in (f".{_PREFIX}*.partial", f".{_PREFIX}*.partial-removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def newest(
        self, refuse: Callable[[Checkpoint], str | None] = lambda _: None
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint that `refuse` gives no reason against, and why newer folders were skipped."""
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
            recover(partial, self.folder / partial.name[1:].partition(".")[0])

    def _partial(self, step: int) -> Path:
        return partial_of(self.path_of(step), self.token)

    def _names(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"), key=_order, reverse=True)

    def _retire(self, final: Path) -> None:
        # A torn folder of a later step must not push out what was just written.
        known = [folder for folder in self._names() if _order(folder) <= _order(final)]
        kept = {*known[: self.keep], *self._best(known)}
        for folder in known:
            if folder not in kept:
                discard(folder)

    def _best(self, folders: list[Path]) -> list[Path]:
        """The `keep_best` of highest accuracy; the newer one where two are equal."""
        scored = [(score, *_order(folder), folder) for folder in folders if (score := _accuracy(folder)) is not None]
        return [folder for *_, folder in sorted(scored, reverse=True)[: self.keep_best]]


def _check_sizes(folder: Path, files: dict[str, list[int]]) -> None:
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: missing or short when the checkpoint was to be completed")


def _order(folder: Path) -> tuple[int, str]:
    """A sort key by step number, as names differ in digits; a folder of no step is the oldest."""
    named = _NAMED.fullmatch(folder.name)
    return (int(named[1]) if named else -1), folder.name


def _accuracy(folder: Path) -> float | None:
    """The accuracy that a checkpoint notes; None for a torn one, and for one written within an epoch."""
    try:
        score = read_manifest(folder).metadata.get(ACCURACY)
    except CheckpointError:
        return None
    return float(score) if isinstance(score, (int, float)) else None
