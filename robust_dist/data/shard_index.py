"""Where each sample lies in WebDataset tar shards: read once from the tars' headers, and kept in one file."""

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_dist.data.errors import DataError
from robust_dist.data.packed import PackedStrings, bounds_of
from robust_dist.data.shard_members import Faults, Keys, samples_of

VERSION = 2
SCANNERS = 8

Stamp = list[Any]  # A shard's file name, its size and its time of change in nanoseconds.


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


def index_of(shards: Sequence[str], keys: Keys, folder: Path, name: str) -> ShardIndex:
    """The index of shards: from its file in `folder` as far as their sizes and times are those in it, else by reading.

    What had to be read is written there, whole or not at all, so that any number of processes may do it at once.

    Raises:
        DataError: what is wrong with shards, samples and labels, all in one message; or the file cannot be written.
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
    """A name of its own for each list of shards, keys and version of the file; hosts may see the shards elsewhere."""
    names = ["/".join(Path(shard).parts[-2:]) for shard in shards]
    stated = json.dumps([VERSION, names, *keys])
    return f".index-{hashlib.sha256(stated.encode()).hexdigest()[:16]}.npz"


def scan(shard: str, keys: Keys) -> tuple[ShardIndex, Faults]:
    """Read one shard's headers and labels; what is no tar file at all is torn at byte 0."""
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
    """Write beside the file and rename: a reader sees the old file or the new one, complete."""
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
