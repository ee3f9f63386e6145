"""Where each sample lies in WebDataset tar shards: read once from the tars' headers, and kept in one file."""

import hashlib
import itertools
import json
import os
import re
import tarfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robust_dist.data.errors import DataError
from robust_dist.data.packed import PackedStrings, bounds_of

VERSION = 1
SCANNERS = 8
BLOCK = 512
NOWHERE = (-1, -1)
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
META = re.compile(r"(^|/)__[^/]*__($|/)")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

Stamp = list[Any]  # A shard's file name, its size and its time of change in nanoseconds.


class Keys(NamedTuple):
    """Which members of a sample count: extensions of images, and the label's extension (with a key, for json)."""

    image: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class ShardIndex:
    """The samples of some shards, in order.

    Attributes:
        names: of each sample's image member; of a sample without an image, its own name.
        labels: each sample's label as text; empty where it has none.
        places: int64 [N, 2], each image's offset in its shard and its size in bytes; -1 where there is none.
        counts: int64 [shards], samples in each shard.
        torn_at: int64 [shards], the byte from which on a shard is no tar file; -1 where it is whole.
    """

    names: PackedStrings
    labels: PackedStrings
    places: np.ndarray
    counts: np.ndarray
    torn_at: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["ShardIndex"]) -> "ShardIndex":
        """The index of all parts' shards, in order."""
        return cls(
            PackedStrings.joined([part.names for part in parts]),
            PackedStrings.joined([part.labels for part in parts]),
            np.concatenate([part.places for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.torn_at for part in parts]),
        )

    def shard(self, number: int) -> "ShardIndex":
        """The index of one of the shards alone."""
        start, stop = bounds_of(self.counts)[[number, number + 1]]
        one = slice(number, number + 1)
        return ShardIndex(
            self.names.part(start, stop),
            self.labels.part(start, stop),
            self.places[start:stop],
            self.counts[one],
            self.torn_at[one],
        )


def index_of(shards: Sequence[str], keys: Keys, folder: Path) -> ShardIndex:
    """The index of shards: from its file in `folder` as far as their sizes and times are those in it, else by reading.

    What had to be read is written there, whole or not at all, so that any number of processes may do it at once.

    Raises:
        DataError: a shard is compressed, or has a member twice in a sample, or the file cannot be written.
        OSError: a shard cannot be read.
    """
    stamps = [_stamp(shard) for shard in shards]
    file = folder / _file_name(shards, keys)
    stored = _load(file)
    kept = [stored[1].shard(k) if stored and stored[0][k] == stamp else None for k, stamp in enumerate(stamps)]
    missing = [shard for shard, part in zip(shards, kept, strict=True) if part is None]
    with ThreadPoolExecutor(SCANNERS) as pool:
        read = pool.map(lambda shard: scan(shard, keys), missing)
        index = ShardIndex.joined([part if part is not None else next(read) for part in kept])
    if missing:
        _save(file, stamps, index)
    return index


def _file_name(shards: Sequence[str], keys: Keys) -> str:
    """A name of its own for each list of shards, keys and version of the file; hosts may see the shards elsewhere."""
    names = ["/".join(Path(shard).parts[-2:]) for shard in shards]
    stated = json.dumps([VERSION, names, keys.image, keys.label])
    return f".index-{hashlib.sha256(stated.encode()).hexdigest()[:16]}.npz"


def scan(shard: str, keys: Keys) -> ShardIndex:
    """Read one shard's headers and labels; what is no tar file at all is torn at byte 0.

    Raises:
        DataError: the shard is compressed, or has a member twice in a sample.
    """
    _check_plain(shard)
    with open(shard, "rb") as file:
        members = _Members(file, keys.label.partition(".")[0])
        samples = [_sample(shard, group, keys) for group in _grouped(members)]
    if members.torn_at >= 0 and samples and (samples[-1].place == NOWHERE or not samples[-1].label):
        # The tear went through it.
        samples.pop()
    return ShardIndex(
        PackedStrings.of(sample.name for sample in samples),
        PackedStrings.of(sample.label for sample in samples),
        np.array([sample.place for sample in samples], dtype=np.int64).reshape(-1, 2),
        np.array([len(samples)], dtype=np.int64),
        np.array([members.torn_at], dtype=np.int64),
    )


class _Member(NamedTuple):
    """A file in a shard: the sample's name, the rest of its name, where it lies, and what a label's file holds."""

    key: str
    ending: str
    place: tuple[int, int]
    content: bytes


class _Sample(NamedTuple):
    name: str
    label: str
    place: tuple[int, int]


class _Members:
    """The files of an open tar file that belong to samples, and from which byte on it is torn (-1: it is whole)."""

    def __init__(self, file: Any, read: str) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.read = read
        self.torn_at = -1

    def __iter__(self) -> Iterator[_Member]:
        end = 0
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    if info.offset_data + info.size > self.size:
                        self.torn_at = info.offset
                        return
                    end = info.offset_data + info.size
                    if (member := self._member(info)) is not None:
                        yield member
                    # TarFile would keep millions of them.
                    tar.members = []  # type: ignore[attr-defined]
                self._check_end(tar.offset)
        except tarfile.ReadError:
            self.torn_at = end

    def _member(self, info: tarfile.TarInfo) -> _Member | None:
        match = MEMBER.fullmatch(info.name)
        if not info.isfile() or match is None or META.search(info.name):
            return None
        ending = match[2].lower()
        content = b""
        if ending == self.read:
            self.file.seek(info.offset_data)
            content = self.file.read(info.size)
        return _Member(match[1], ending, (info.offset_data, info.size), content)

    def _check_end(self, offset: int) -> None:
        """Whether the archive ends where tarfile stops, which it also does at a header that makes no sense."""
        self.file.seek(offset)
        if self.file.read(BLOCK) != bytes(BLOCK):
            self.torn_at = offset


def _grouped(members: Iterable[_Member]) -> Iterator[list[_Member]]:
    """Consecutive members of the same name before the first dot, as the webdataset package groups them."""
    return (list(group) for _, group in itertools.groupby(members, key=lambda member: member.key))


def _sample(shard: str, members: list[_Member], keys: Keys) -> _Sample:
    found = {member.ending: member for member in members}
    if len(found) < len(members):
        raise DataError(f"{shard} has a member twice in its sample {members[0].key}")
    ending, _, path = keys.label.partition(".")
    label = _label(found[ending].content, path) if ending in found else ""
    image = next((found[key] for key in keys.image if key in found), None)
    if image is None:
        return _Sample(members[0].key, label, NOWHERE)
    return _Sample(f"{image.key}.{image.ending}", label, image.place)


def _label(content: bytes, path: str) -> str:
    """The label's text; empty where the member has none."""
    try:
        if not path:
            return content.decode().strip()
        value = json.loads(content)
        for step in path.split("."):
            value = value[step]
        return str(value)
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _check_plain(shard: str) -> None:
    with open(shard, "rb") as file:
        start = file.read(BLOCK)
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            raise DataError(
                f"{shard} is compressed ({kind}), so no sample can be reached alone: unpack it to a plain .tar"
            )


def _stamp(shard: str) -> Stamp:
    stat = os.stat(shard)
    return [os.path.basename(shard), stat.st_size, stat.st_mtime_ns]


def _save(file: Path, stamps: Sequence[Stamp], index: ShardIndex) -> None:
    """Write beside the file and rename: whoever reads sees the old one or the new one, whole."""
    arrays = {
        "stamps": np.frombuffer(json.dumps(stamps).encode(), dtype=np.uint8),
        "names": index.names.data,
        "name_bounds": index.names.bounds,
        "labels": index.labels.data,
        "label_bounds": index.labels.bounds,
        "places": index.places,
        "counts": index.counts,
        "torn_at": index.torn_at,
    }
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(beside, file)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise DataError(f"the shards' index cannot be written to {file.parent} ({error}): set index_dir") from error


def _load(file: Path) -> tuple[list[Stamp], ShardIndex] | None:
    """The stamps of the shards in the file, and their index; None where there is no file, or a torn one."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            stamps = json.loads(stored["stamps"].tobytes())
            index = ShardIndex(
                PackedStrings(stored["names"], stored["name_bounds"]),
                PackedStrings(stored["labels"], stored["label_bounds"]),
                stored["places"],
                stored["counts"],
                stored["torn_at"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return stamps, index
