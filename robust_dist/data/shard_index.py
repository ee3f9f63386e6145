"""The position of each sample in WebDataset tar shards: read once from the tar headers and kept in one file."""

import hashlib
import itertools
import json
import math
import os
import re
import tarfile
import uuid
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robust_dist.data.classes import NAMED, some
from robust_dist.data.errors import DataError
from robust_dist.data.source import PackedStrings, bounds_of

BLOCK = 512
NOWHERE = (-1, -1)
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
META = re.compile(r"(^|/)__[^/]*__($|/)")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

COMPRESSED = "shards are compressed, so single samples cannot be reached; unpack them to plain .tar files"
TWICE = "samples have a member twice"
APART = "samples have members that are not next to each other; repack the shards with tar --sort=name"
UNNAMED = "samples have images, but none with an ending in image_keys; set image_keys to the right ending"
ENCODING = "labels are not UTF-8 text"
KIND = "labels are a list, an object or a fraction; they must be a whole number or a name"
VERSION = 2
SCANNERS = 8
Stamp = list[Any]  # A shard's file name, size and modification time in nanoseconds.


class Keys(NamedTuple):
    """The members of a sample that are used, by their lower-case endings.

    Attributes:
        image: endings of images; a sample's first match is used.
        label: ending of the label.
        path: the nested keys of the label within a .json member; empty if the member is the label.
    """

    image: tuple[str, ...]
    label: str
    path: tuple[str, ...]

    @classmethod
    def of(cls, image_keys: Sequence[str], label_key: str) -> "Keys":
        """The keys as written by a user: in any case, with or without a leading dot, "json.KEY" for one in a .json.

        Raises:
            DataError: a .json member has no key.
        """
        parts = label_key.lstrip(".").split(".")
        images, small = tuple(key.lstrip(".").lower() for key in image_keys), [part.lower() for part in parts]
        if "json" not in small:
            return cls(images, ".".join(small), ())
        end = small.index("json") + 1
        if len(parts) == end:
            raise DataError(f"label_key={label_key!r} must name a key of the .{label_key} member: '{label_key}.label'")
        return cls(images, ".".join(small[:end]), tuple(parts[end:]))


class Faults:
    """What is wrong with samples: for each kind the number of them, and the first few."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count one more of a kind."""
        self.counts[kind] += count
        if len(self.examples[kind]) < NAMED:
            self.examples[kind].append(where)

    @staticmethod
    def refuse(found: Iterable["Faults"], name: str) -> None:
        """Report everything that is wrong in one message.

        Raises:
            DataError: something is wrong.
        """
        counts: Counter[str] = Counter()
        examples: defaultdict[str, list[str]] = defaultdict(list)
        for faults in found:
            counts += faults.counts
            for kind, named in faults.examples.items():
                examples[kind] += named
        if counts:
            said = [f"{count:,} {kind} ({some(examples[kind], count)})" for kind, count in counts.items()]
            raise DataError(f"{name}: {'. '.join(said)}")


class Sample(NamedTuple):
    """A sample in a shard.

    Attributes:
        key: its members' common name.
        name: its image's name in the shard; the key if there is no image.
        label: as text; empty if there is none.
        place: the image's offset in the shard and its size in bytes, or `NOWHERE`.
        whole: whether it has both members.
    """

    key: str
    name: str
    label: str
    place: tuple[int, int]
    whole: bool


class _Member(NamedTuple):
    """A file in a shard: its name, the parts before and after the first dot, its place, and a label's content."""

    name: str
    key: str
    ending: str
    place: tuple[int, int]
    content: bytes


def samples_of(shard: str, keys: Keys) -> tuple[list[Sample], int, Faults]:
    """A shard's samples, the byte at which it is torn (-1: whole), and what is wrong."""
    faults = Faults()
    with open(shard, "rb") as file:
        if kind := _compression(file):
            faults.add(COMPRESSED, f"{shard}: {kind}")
            return [], -1, faults
        members = _Members(file, keys.label)
        samples = [sample for group in _grouped(members) for sample in _samples(shard, group, keys, faults)]
    if members.torn_at >= 0 and samples and not samples[-1].whole:
        # The tear went through it.
        samples.pop()
    parted = {sample.key for sample in samples if not sample.whole}
    for key, count in Counter(sample.key for sample in samples if sample.key in parted).items():
        if count > 1:
            faults.add(APART, f"{shard}: {key}")
    return samples, members.torn_at, faults


def first_members(shard: str, keys: Keys) -> str:
    """What the first sample of a shard has, for a message: its members' endings, and a .json's keys."""
    with open(shard, "rb") as file:
        members = next(_grouped(_Members(file, keys.label)), [])
    inside = {member.ending: _json_keys(member.content) for member in members if keys.path and member.content}
    return ", ".join(f".{member.ending}{inside.get(member.ending, '')}" for member in members)


class _Members:
    """The files in an open tar file that belong to samples, and the byte at which it is torn (-1: whole)."""

    def __init__(self, file: Any, read: str) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.read, self.dotted = read, f".{read}"
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
        if ending == self.read or ending.endswith(self.dotted):
            self.file.seek(info.offset_data)
            content = self.file.read(info.size)
        return _Member(info.name, match[1], ending, (info.offset_data, info.size), content)

    def _check_end(self, offset: int) -> None:
        """Check that the archive ends where tarfile stops, since it also stops at an invalid header."""
        self.file.seek(offset)
        if self.file.read(BLOCK) != bytes(BLOCK):
            self.torn_at = offset


def _compression(file: Any) -> str | None:
    start = file.read(BLOCK)
    file.seek(0)
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def _grouped(members: Iterable[_Member]) -> Iterator[list[_Member]]:
    """Consecutive members with the same name before the first dot, grouped as in the webdataset package."""
    return (list(group) for _, group in itertools.groupby(members, key=lambda member: member.key))


def _samples(shard: str, members: list[_Member], keys: Keys, faults: Faults) -> list[Sample]:
    """The sample of a group, and further ones whose names contain dots, and so share the part before the first.

    Such are "dsc.0001.jpg" and "dsc.0001.cls"; "b.seg.png" beside "b.png" is not a sample.
    """
    found = {member.ending: member for member in members}
    key = members[0].key
    if len(found) < len(members):
        faults.add(TWICE, f"{shard}: {key}")
    image, label = _pair(found, keys)
    if len(found) == 2 and image is not None and label is not None:
        return [_sample(shard, key, image, label, keys, faults)]
    dotted = _dotted(found, keys)
    if image is None and label is not None:
        unnamed = [one.ending for one, others in dotted.values() if one is not None and others is None]
        if unnamed:
            faults.add(UNNAMED, f"{shard}: {key} ({some(unnamed)})")
    alone = image is None and label is None
    samples = [
        _sample(shard, f"{key}.{stem}", *pair, keys, faults)
        for stem, pair in dotted.items()
        if alone or None not in pair
    ]
    if not alone or not samples:
        samples.insert(0, _sample(shard, key, image, label, keys, faults))
    return samples


_Pair = tuple[_Member | None, _Member | None]


def _pair(found: Mapping[str, _Member], keys: Keys) -> _Pair:
    """The image and the label among members, by ending."""
    return next((found[key] for key in keys.image if key in found), None), found.get(keys.label)


def _dotted(found: Mapping[str, _Member], keys: Keys) -> dict[str, _Pair]:
    """Images and labels whose endings have more dots than the keys, by the part before the keys."""
    named = {*keys.image, keys.label}
    stems: defaultdict[str, dict[str, _Member]] = defaultdict(dict)
    for ending, member in found.items():
        dots = [] if ending in named else [at for at, one in enumerate(ending) if one == "."]
        for at in dots:
            if ending[at + 1 :] in named:
                stems[ending[:at]][ending[at + 1 :]] = member
                break
    return {stem: _pair(of_stem, keys) for stem, of_stem in stems.items()}


def _sample(shard: str, key: str, image: _Member | None, label: _Member | None, keys: Keys, faults: Faults) -> Sample:
    text = ""
    if label is not None:
        text, fault = _label(label.content, keys.path)
        if fault:
            faults.add(fault, f"{shard}: {label.name}")
    if image is None:
        return Sample(key, key, text, NOWHERE, False)
    return Sample(key, image.name, text, image.place, label is not None)


def _label(content: bytes, path: Sequence[str]) -> tuple[str, str]:
    """The label's text, empty if the member has none; and what is wrong with it, empty if nothing is."""
    try:
        if not path:
            return content.decode("utf-8-sig").strip(), ""
        value = json.loads(content)
    except UnicodeDecodeError:
        return "", ENCODING
    except (ValueError, RecursionError):
        return "", ""
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return _text(value)


def _text(value: Any) -> tuple[str, str]:
    """A value in a .json member as a label's text, and what is wrong with it; null, NaN and true are not labels."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return "", ""
    if isinstance(value, str):
        try:
            return value.encode().decode().strip(), ""
        except UnicodeEncodeError:
            return "", ENCODING
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value)), ""
    return "", KIND


def _json_keys(content: bytes) -> str:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return " (not JSON)"
    return f" (with the keys {some(list(value))})" if isinstance(value, dict) else f" (a {type(value).__name__})"


@dataclass(frozen=True)
class ShardIndex:
    """The samples of some shards, in order.

    Attributes:
        names: the name of each sample's image member; without an image, the sample's own name.
        labels: each sample's label as text; empty if there is none.
        places: int64 [N, 2], each image's offset in its shard and its size in bytes; -1 if there is none.
        counts: int64 [shards], samples in each shard.
        torn_at: int64 [shards], the byte at which a shard is torn; -1 if it is whole.
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
        """The index of one of the shards."""
        start, stop = bounds_of(self.counts)[[number, number + 1]]
        one = slice(number, number + 1)
        return ShardIndex(
            self.names.part(start, stop),
            self.labels.part(start, stop),
            self.places[start:stop],
            self.counts[one],
            self.torn_at[one],
        )


def index_of(shards: Sequence[str], keys: Keys, folder: Path, name: str) -> ShardIndex:
    """The index of shards: from its file in `folder` if their sizes and times match it, otherwise by reading them.

    The result is written there atomically, so that any number of processes may do this at once.

    Raises:
        DataError: shards, samples or labels are wrong, all reported in one message; or the file cannot be written.
        OSError: a shard cannot be read.
    """
    stamps = [_stamp(shard) for shard in shards]
    file = folder / _file_name(shards, keys)
    stored = _load(file)
    kept = [stored[1].shard(k) if stored and stored[0][k] == stamp else None for k, stamp in enumerate(stamps)]
    missing = [shard for shard, part in zip(shards, kept, strict=True) if part is None]
    with ThreadPoolExecutor(SCANNERS) as pool:
        scanned = list(pool.map(lambda shard: scan(shard, keys), missing))
    Faults.refuse((faults for _, faults in scanned), name)
    read = (part for part, _ in scanned)
    index = ShardIndex.joined([part if part is not None else next(read) for part in kept])
    if missing:
        _save(file, stamps, index)
    return index


def _file_name(shards: Sequence[str], keys: Keys) -> str:
    """A name specific to the list of shards, keys and file version; hosts may see the shards under other paths."""
    names = ["/".join(Path(shard).parts[-2:]) for shard in shards]
    stated = json.dumps([VERSION, names, *keys])
    return f".index-{hashlib.sha256(stated.encode()).hexdigest()[:16]}.npz"


def scan(shard: str, keys: Keys) -> tuple[ShardIndex, Faults]:
    """Read one shard's headers and labels; a file that is not a tar file is torn at byte 0."""
    samples, torn_at, faults = samples_of(shard, keys)
    index = ShardIndex(
        PackedStrings.of(sample.name for sample in samples),
        PackedStrings.of(sample.label for sample in samples),
        np.array([sample.place for sample in samples], dtype=np.int64).reshape(-1, 2),
        np.array([len(samples)], dtype=np.int64),
        np.array([torn_at], dtype=np.int64),
    )
    return index, faults


def _stamp(shard: str) -> Stamp:
    stat = os.stat(shard)
    return [os.path.basename(shard), stat.st_size, stat.st_mtime_ns]


def _save(file: Path, stamps: Sequence[Stamp], index: ShardIndex) -> None:
    """Write to a temporary file and rename: a reader sees the old file or the new one, complete."""
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
    """The stamps of the shards in the file, and their index; None if the file is missing or torn."""
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
