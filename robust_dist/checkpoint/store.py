"""A folder of checkpoints, each either complete or absent.

A checkpoint is written into a `.partial` folder; a manifest with every file's size and CRC-32 comes last, then one
rename makes it visible. A reader trusts only what the manifest confirms. The newest checkpoint is the one with the
highest step; clocks are not used.
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
    """An unusable checkpoint, with the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: its folder, the optimizer steps taken, and the writer's metadata."""

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
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a text file atomically; after a crash the old or the new text is there, never a part.

    With `private`, nobody else may read it, whatever the umask.
    """
    beside = path.with_name(f".{path.name}.partial")
    # A killed process may have left a file that others can read; it is not reused.
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync(path.parent)


def files_in(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint below `folder`, without those added by the store itself."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return (path for path in found if path.name != MANIFEST and not path.name.startswith(PART))


def part_path(folder: Path, rank: int) -> Path:
    """The file in which a rank records which of its files of an unfinished checkpoint are on disk."""
    return folder / f"{PART}{rank:05d}.json"


def read_part(folder: Path, rank: int) -> dict[str, list[int]] | None:
    """A rank's record: name -> [size, CRC-32]; None if it is not there yet."""
    try:
        note: dict[str, list[int]] = read_json(part_path(folder, rank), dict[str, list[int]])
    except FileNotFoundError:
        return None
    return note


@dataclass
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        format: Version of the format.
        step: Optimizer steps taken.
        files: Name -> (size, CRC-32).
        metadata: The writer's JSON values.
        crc32: Checksum of the rest, as computed by `signature`; None in manifests before 0.4.5.
        signed: Whether it was written with a checksum; if so, a missing checksum does not mean an older version.
    """

    format: int
    step: int
    files: dict[str, tuple[int, int]]
    metadata: dict[str, Any]
    crc32: int | None = None
    signed: bool = False

    def signature(self) -> int:
        """The CRC-32 of the manifest's content, independent of its formatting."""
        said = [self.format, self.step, {name: list(entry) for name, entry in self.files.items()}, self.metadata]
        # As it will be read back: numeric keys become text, and sort differently.
        return zlib.crc32(json.dumps(json.loads(json.dumps(said)), sort_keys=True).encode())

    def text(self) -> str:
        """The file, with its checksum on the first line, so no single cut removes both the checksum and a value."""
        return json.dumps({"crc32": 0, **vars(self)} | {"crc32": self.signature(), "signed": True}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked against its own checksum.

    Raises:
        CheckpointError: It is missing, torn, changed or of another format, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        kind: _Format = parse_json(text, str(path), _Format)
        if kind.format != FORMAT:
            raise CheckpointError(f"{path}: format {kind.format}, but this version reads {FORMAT}")
        found: Manifest = parse_json(text, str(path), Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}; it was not completely written") from None
    except DocumentError as error:
        raise CheckpointError(f"{error}; the {MANIFEST} is damaged, or was not completely written") from None
    if found.crc32 != (found.signature() if found.signed or found.crc32 is not None else None):
        raise CheckpointError(f"{path}: changed since it was written (its checksum differs)")
    outside = [name for name in found.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]}, which is outside the folder")
    return found


@dataclass
class _Format:
    """The part of a manifest that is read first, as other formats may have other keys."""

    format: int


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after checking every file's size and CRC-32 against its manifest.

    Raises:
        CheckpointError: The manifest is missing, damaged, of another format or of another step than the folder's name
            says; or a file is missing, short or changed.
    """
    manifest = read_manifest(folder)
    named = _NAMED.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise CheckpointError(
            f"{folder / MANIFEST}: says step {manifest.step}, but the folder's name says step {int(named[1])}"
        )
    check_files(folder, manifest, manifest.files)
    return Checkpoint(folder, manifest.step, manifest.metadata)


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files' size and CRC-32 with the manifest; a CheckpointError names a missing, short or changed file."""
    for name in names:
        path, (size, crc) = folder / name, manifest.files[name]
        try:
            whole = path.is_file() and path.stat().st_size == size and file_crc32(path) == crc
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if not whole:
            raise CheckpointError(f"{path}: missing, short or changed since it was written")


def synced(folder: Path, names: Iterable[str] | None = None) -> dict[str, list[int]]:
    """Flush files below `folder` (`names`, or all), and the folders they are in, to disk.

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
    """The folder in which a checkpoint is built; `token` marks the start that writes it."""
    return folder.with_name(f".{folder.name}{'.' * bool(token)}{token}.partial")


def sign(partial: Path, step: int, files: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, which is a checkpoint from now on, even if the rename fails.

    `files` is what `synced` returned for all its files, `metadata` are the writer's JSON values.
    """
    for note in partial.glob(f"{PART}*"):
        note.unlink()
    entries = {name: (entry[0], entry[1]) for name, entry in files.items()}
    text = Manifest(FORMAT, step, entries, dict(metadata)).text()
    write_atomically(partial / MANIFEST, text, private=has_options(metadata.get("recipe")))


def publish(partial: Path, folder: Path) -> None:
    """Give a signed folder its final name, replacing an older checkpoint of that name."""
    discard(folder)
    os.replace(partial, folder)
    fsync(folder.parent)


def recover(partial: Path, folder: Path) -> None:
    """Finish a publication interrupted between the manifest and the rename."""
    if not folder.exists() and (partial / MANIFEST).is_file():
        os.replace(partial, folder)


def discard(folder: Path) -> None:
    """Remove a folder in two steps, so that a half-removed one never has a checkpoint's name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.partial-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class CheckpointStore:
    """Complete checkpoints in one folder: the newest `keep` and the best `keep_best`.

    Args:
        folder: The checkpoints' folder; created with the first checkpoint.
        keep: Number of newest checkpoints kept.
        keep_best: Number of checkpoints with the highest `metadata["eval_accuracy"]` kept in addition.
        token: Marks the unfinished folders of this start, so that a process left over from an earlier one can never
            write into them.
        guard: Called before a checkpoint is begun and before it is completed; raises if another run has taken the
            folder.
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
        """The folder of a step's completed checkpoint."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints on disk, complete or torn, oldest first."""
        return [step for step, _ in map(_order, reversed(self._names())) if step >= 0]

    def begin(self, step: int) -> Path:
        """An empty folder for the files of step `step`."""
        self.guard()
        partial = self._partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written since `begin(step)` to free its space."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def commit(self, step: int, metadata: dict[str, Any], files: dict[str, list[int]] | None = None) -> Checkpoint:
        """Turn the files of `begin(step)` into a checkpoint, and remove the oldest ones.

        Args:
            step: Optimizer steps taken.
            metadata: JSON values stored with the files.
            files: Name -> [size, CRC-32] of all files, if they have already been flushed; None: flush them here.

        Raises:
            CheckpointError: One of `files` is missing or short.
        """
        partial, final = self._partial(step), self.path_of(step)
        if files is None:
            files = synced(partial)
        _check_sizes(partial, files)
        # With a manifest, readers take it as complete even if the rename is interrupted.
        self.guard()
        sign(partial, step, files, metadata)
        self.guard()
        publish(partial, final)
        self._retire(final)
        return Checkpoint(final, step, metadata)

    def clean(self) -> None:
        """Remove what dead processes left half-written or half-removed; only for the holder of the folder."""
        for pattern in (f".{_PREFIX}*.partial", f".{_PREFIX}*.partial-removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def newest(
        self, refuse: Callable[[Checkpoint], str | None] = lambda _: None
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint for which `refuse` gives no reason, and why newer folders were skipped."""
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
        """Finish commits interrupted between the manifest and the rename."""
        for partial in self.folder.glob(f".{_PREFIX}*.partial"):
            recover(partial, self.folder / partial.name[1:].partition(".")[0])

    def _partial(self, step: int) -> Path:
        return partial_of(self.path_of(step), self.token)

    def _names(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"), key=_order, reverse=True)

    def _retire(self, final: Path) -> None:
        # A torn folder of a later step must not push out the new checkpoint.
        known = [folder for folder in self._names() if _order(folder) <= _order(final)]
        kept = {*known[: self.keep], *self._best(known)}
        for folder in known:
            if folder not in kept:
                discard(folder)

    def _best(self, folders: list[Path]) -> list[Path]:
        """The `keep_best` of highest accuracy; ties go to the newer."""
        scored = [(score, *_order(folder), folder) for folder in folders if (score := _accuracy(folder)) is not None]
        return [folder for *_, folder in sorted(scored, reverse=True)[: self.keep_best]]


def _check_sizes(folder: Path, files: dict[str, list[int]]) -> None:
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: missing or short when the checkpoint was to be completed")


def _order(folder: Path) -> tuple[int, str]:
    """A sort key by step number, since step names differ in digits; a folder without a step sorts first."""
    named = _NAMED.fullmatch(folder.name)
    return (int(named[1]) if named else -1), folder.name


def _accuracy(folder: Path) -> float | None:
    """The accuracy recorded in a checkpoint; None for a torn one or one written within an epoch."""
    try:
        score = read_manifest(folder).metadata.get(ACCURACY)
    except CheckpointError:
        return None
    return float(score) if isinstance(score, (int, float)) else None
