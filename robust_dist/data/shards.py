"""WebDataset shards on disk: tar files whose samples are read in any order, by an index made once."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from robust_dist.data.classes import check_count, number_classes, some, text_classes
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.identity import Stretch, fingerprint, stretches_of_files
from robust_dist.data.shard_index import Keys, ShardIndex, first_members, index_of
from robust_dist.data.source import PackedStrings, Upright, bounds_of, check_index, turns_upright
from robust_dist.extras import require

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "gif", "tif", "tiff", "avif")
OPEN_SHARDS = 32
UNLABELLED = -1
NUMBER = re.compile(r"-?[0-9]{1,400}")
RIGHT = "shards must be plain .tar files on a disk that all ranks see"


class ShardSource:
    """Samples of tar shards; see `open_webdataset`, and `ImageSource` for its methods.

    Files are read at given offsets (pread), so that forked processes do not disturb each other.
    """

    def __init__(
        self,
        shards: Sequence[str],
        index: ShardIndex,
        labels: np.ndarray,
        classes: tuple[str, ...],
        name: str,
        *,
        upright: bool = False,
    ) -> None:
        self.name = name
        self.classes = classes
        # A torn shard's tear is a sample of its own, which cannot be read.
        counts = index.counts + (index.torn_at >= 0)
        self.group_sizes = tuple(counts[counts > 0].tolist())
        self._shards = PackedStrings.of(shards)
        self._starts = bounds_of(counts)
        self._index_starts = bounds_of(index.counts)
        self._index = replace(index, labels=PackedStrings.of([]))
        self._labels = labels
        self._kind = Upright if upright else bytes
        self._open = lru_cache(OPEN_SHARDS)(_OpenFile)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(OPEN_SHARDS)(_OpenFile)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        shard, number = self._place(index)
        if number is None:
            raise BadImageError(f"the shard is torn at byte {self._index.torn_at[shard]:,}; what followed is lost")
        offset, size = self._index.places[number].tolist()
        if offset < 0:
            raise BadImageError("the sample has no image")
        if self._labels[number] == UNLABELLED:
            raise BadImageError("the sample has no label")
        try:
            content = self._open(self._shards[shard]).read(size, offset)
        except OSError as error:
            raise BadImageError(f"the shard cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise BadImageError(f"the shard ends {size - len(content):,} bytes before the image does")
        return self._kind(content), int(self._labels[number])

    def where(self, index: int) -> str:
        """The shard's path, and the name of the sample's image in it."""
        shard, number = self._place(index)
        return f"{self._shards[shard]}: {self._index.names[number] if number is not None else '(torn)'}"

    def fingerprint(self) -> str:
        """A hash of the samples' names and labels, and of the number in each shard."""
        names = self._index.names
        return fingerprint(names.data, names.bounds, self._labels, self._index.counts)

    def stretches(self) -> list[Stretch]:
        """The shards, see `shared_images`."""
        return stretches_of_files(zip(self._shards, self._index.counts.tolist(), strict=True))

    def _place(self, index: int) -> tuple[int, int | None]:
        """The shard's number, and the sample's number in the index (None: the tear)."""
        check_index(index, self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = index - int(self._starts[shard])
        return shard, int(self._index_starts[shard]) + within if within < self._index.counts[shard] else None


def open_webdataset(
    urls: str | Sequence[str],
    *,
    root: str | Path | None = None,
    image_keys: Sequence[str] = IMAGE_KEYS,
    label_key: str = "cls",
    classes: tuple[str, ...] | None = None,
    num_classes: int | None = None,
    index_dir: str | Path | None = None,
    allow_torn: bool = False,
    exif: str = "auto",
    name: str | None = None,
) -> ShardSource:
    """Samples of WebDataset tar shards, accessed individually through an index.

    The index is made once by reading the tar headers and kept in one file, beside the shards or in `index_dir`. A shard
    whose size or time has changed is read again. Any number of processes may make it at once; with many ranks, let one
    go first so that the headers are read once.

    Args:
        urls: paths of shards, with braces ("train-{000..146}.tar") and wildcards ("train-*.tar"), or a list of these.
            A path that exists literally is taken literally, including folders on the way to the shards.
        root: the folder that paths are relative to; it has no wildcards.
        image_keys: endings of the image, in any case; a sample's first match is used.
        label_key: the ending, in any case, of the member that holds the label as text: a number, or a class name. For a
            key of the .json member "json.KEY" ("json.annotation.label" for a nested one).
        classes: the classes by number, those of the training split if this is another one. By default names are sorted,
            and numbers are named after themselves. Numbers do not index classes that were names.
        num_classes: number of classes, if labels are numbers and not all of them occur.
        index_dir: the folder for the index, if the shards' own is not writable.
        allow_torn: use a torn shard's samples before the tear; the tear is one more sample, which cannot be read and so
            is counted as bad. Otherwise a torn shard is an error.
        exif: "on" turns images upright by their EXIF orientation; "auto" and "off" leave them, as the webdataset
            package does.
        name: what error messages call the set; by default the urls.

    Raises:
        DataError: there is no shard; a shard is remote, compressed, torn or not a tar file; no sample has such members;
            samples' members cannot be told apart; or labels are invalid or outside the classes. Says what would be
            right.
        ImportError: `braceexpand`, which comes with webdataset, is not installed.
    """
    listed = [urls] if isinstance(urls, str) else list(urls)
    name = name or ", ".join(os.path.join(root or "", url) for url in listed)
    upright = turns_upright(exif, auto=False)
    shards = expand(listed, name, root)
    keys = Keys.of(image_keys, label_key)
    folder = Path(index_dir).expanduser() if index_dir is not None else Path(shards[0]).parent
    index = index_of(shards, keys, folder, name)
    torn = [f"{shard} (at byte {at:,})" for shard, at in zip(shards, index.torn_at.tolist(), strict=True) if at >= 0]
    if torn and not allow_torn:
        raise DataError(
            f"{name}: {len(torn)} shards are torn: {some(torn)}. Copy them again, or set allow_torn=True for the "
            "samples before the tear"
        )
    _check_members(index, keys, shards, label_key, name)
    labels, classes = _labels(index.labels, classes, num_classes, name)
    return ShardSource(shards, index, labels, classes, name, upright=upright)


def expand(urls: str | Sequence[str], name: str, root: str | Path | None = None) -> list[str]:
    """The shards' paths: a literal name if it exists, else braces as in a shell, in order, then wildcards, sorted.

    Raises:
        DataError: a remote address, a pipe, a compressed file, no match, or a shard given twice.
    """
    braces = require("braceexpand", extra="data", purpose="WebDataset shards").braceexpand
    shards = []
    for url in [urls] if isinstance(urls, str) else urls:
        folder, rest = _literal(os.path.expanduser(root or ""), _local(url, name))
        patterns = [rest] if os.path.isfile(os.path.join(folder, rest)) else list(braces(rest))
        shards += [shard for pattern in patterns for shard in _files(folder, pattern, name)]
    if not shards:
        raise DataError(f"{name}: no shards are given; {RIGHT}")
    twice = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if twice:
        raise DataError(f"{name} has duplicate shards: {some(twice)}")
    return shards


class _OpenFile:
    """A file that is closed once nobody reads from it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _local(url: str, name: str) -> str:
    url = url.removeprefix("file://").removeprefix("file:")
    if "://" in url or "::" in url or url.startswith("pipe:"):
        raise DataError(f"{name}: {url} is not a path; {RIGHT}: copy them there")
    return os.path.expanduser(url)


def _literal(folder: str, path: str) -> tuple[str, str]:
    """The longest part of a path that exists literally as folders, and the rest, which may be a pattern."""
    folder, rest = ("/", path.lstrip("/")) if path.startswith("/") else (folder, path)
    while "/" in rest and os.path.isdir(os.path.join(folder, rest.partition("/")[0])):
        one, _, rest = rest.partition("/")
        folder, rest = os.path.join(folder, one), rest.lstrip("/")
    return folder, rest


def _files(folder: str, pattern: str, name: str) -> list[str]:
    folder, pattern = _literal(folder, pattern)
    files = [os.path.join(folder, pattern)]
    if glob.has_magic(pattern) and not os.path.exists(files[0]):
        found = glob.glob(pattern, root_dir=folder or None)
        files = sorted(os.path.join(folder, one) for one in found) or files
    bad = next((file for file in files if not file.lower().endswith(".tar")), None)
    if bad is not None:
        raise DataError(f"{name}: {bad} does not end in .tar; {RIGHT}: unpack compressed ones")
    missing = next((file for file in files if not os.path.isfile(file)), None)
    if missing is not None:
        raise DataError(f"{name}: there is no file {os.path.abspath(missing)}; {RIGHT}")
    return files


def _check_members(index: ShardIndex, keys: Keys, shards: Sequence[str], label_key: str, name: str) -> None:
    if not len(index.names):
        raise DataError(f"{name} has no samples in its {len(index.counts)} shards")
    images, labels = index.places[:, 0] >= 0, np.diff(index.labels.bounds) > 0
    lacking = []
    if not images.any():
        lacking.append(f"an image: a member ending in .{', .'.join(keys.image)} (image_keys)")
    if not labels.any():
        lacking.append(
            f"a label at label_key={label_key!r}" + " (null, NaN, true and false are not labels)" * bool(keys.path)
        )
    if lacking or not (images & labels).any():
        shard = next(one for one, count in zip(shards, index.counts, strict=True) if count)
        what = " or ".join(lacking) or "both an image and a label"
        raise DataError(f"{name}: no sample has {what}. The first sample has {first_members(shard, keys)}")


def _labels(
    texts: PackedStrings, classes: tuple[str, ...] | None, num_classes: int | None, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int32 [N], UNLABELLED for empty text, and the classes."""
    codes: dict[str, int] = {}
    coded = np.fromiter((codes.setdefault(text, len(codes)) for text in texts), dtype=np.int64, count=len(texts))
    distinct = [text for text in codes if text]
    if all(NUMBER.fullmatch(text) for text in distinct) and not set(distinct) <= set(classes or ()):
        # numpy turns numbers beyond 64 bits into objects.
        values = np.array([int(text) for text in distinct])
        classes, of_distinct = number_classes(np.unique(values), classes, name, num_classes), values
    else:
        of_distinct, classes = text_classes(distinct, classes, name)
    check_count(classes, num_classes, name)
    label_of = np.full(len(codes), UNLABELLED, dtype=np.int32)
    label_of[[codes[text] for text in distinct]] = of_distinct
    return label_of[coded], classes
