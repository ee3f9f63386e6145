"""The interface of image files that a loader reads; their names, and large numbers of them in little memory."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

_IN_A_LINE = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


class Upright(bytes):
    """An encoded image that `decode_rgb` turns by its EXIF orientation; other bytes are left as they are."""


class ImageSource(Protocol):
    """A labelled set of encoded images (JPEG, PNG, ...) that can be read in any order.

    A source is picklable and then holds no open file: each worker of a loader opens what it reads. It may also have
    `fingerprint() -> str`, a cheap hash of names and labels; `left_out`, reasons with the number of files left out for
    each; `stretches()`, for `identity.shared_images`; and `glance(index) -> (bytes, label)`, whose bytes change when
    the sample's file does and tell whether it is `Upright`, so that a cache need not read files it already has.

    Attributes:
        name: what error messages call the set.
        classes: the name of each class, in label order.
        group_sizes: number of samples in each run of consecutive indices that lie together on disk (a tar shard, a row
            group of a parquet file); they add up to `len(source)`. A folder of files is one group.
    """

    name: str
    classes: tuple[str, ...]
    group_sizes: tuple[int, ...]

    def __len__(self) -> int:
        """The number of samples, the same on every rank."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image (`Upright`, if EXIF is to turn it) and the label of one sample.

        Raises:
            BadImageError: this sample cannot be read (the file is gone, its entry is torn); others may be.
        """
        ...

    def where(self, index: int) -> str:
        """What a person needs to find the sample: a file's path, or a shard's path and the name in it."""
        ...


def check_index(index: int, source: ImageSource) -> None:
    """Reject an index outside the samples, including negative ones.

    Raises:
        IndexError: names the set and its number of samples.
    """
    if not 0 <= index < len(source):
        raise IndexError(f"index {index} is outside the {len(source):,} samples of {source.name}")


def turns_upright(exif: str, *, auto: bool) -> bool:
    """Whether a source turns images by EXIF, for "auto", "on" or "off"; `auto` is what this kind of source does.

    Raises:
        ValueError: another value.
    """
    if exif not in ("auto", "on", "off"):
        raise ValueError(f"exif must be 'auto', 'on' or 'off', not {exif!r}")
    return exif == "on" or (exif == "auto" and auto)


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC), used to compare names: macOS writes the decomposed form."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def as_line(name: str) -> bytes:
    r"""The name's own bytes, with \n, \r, \t and \\ in place of what would end a line or a field."""
    return os.fsencode(name.translate(_IN_A_LINE))


def printable(name: str) -> str:
    """The name for a terminal or a picture, with non-UTF-8 bytes and unprintable characters as escapes."""
    return name if name.isprintable() else "".join(map(_shown, name))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    # Python represents a byte that is not UTF-8 as a surrogate.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class PackedStrings:
    """A list of strings that is pickled, forked and kept as one block of bytes and one of offsets.

    Reference counting would copy a list of Python strings page by page into every forked worker.

    Args:
        data: uint8 [bytes], the concatenated strings, as the file system encodes names.
        bounds: int64 [N + 1], where each one begins, and the end.
    """

    def __init__(self, data: np.ndarray, bounds: np.ndarray) -> None:
        self.data = data
        self.bounds = bounds

    @classmethod
    def of(cls, strings: Iterable[str]) -> "PackedStrings":
        """Pack strings; those that are not UTF-8 come back as the file system gave them."""
        encoded = [os.fsencode(string) for string in strings]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), bounds_of([len(part) for part in encoded]))

    @classmethod
    def joined(cls, parts: Sequence["PackedStrings"]) -> "PackedStrings":
        """The strings of all parts, in order."""
        data = np.concatenate([np.zeros(0, dtype=np.uint8), *(part.data for part in parts)])
        return cls(data, bounds_of(np.concatenate([[], *(np.diff(part.bounds) for part in parts)])))

    def part(self, start: int, stop: int) -> "PackedStrings":
        """The strings from start to stop."""
        bounds = self.bounds[start : stop + 1]
        return PackedStrings(self.data[bounds[0] : bounds[-1]], bounds - bounds[0])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} strings")
        return os.fsdecode(self.data[self.bounds[index] : self.bounds[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def bounds_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of consecutive runs begins, and the end: int64 [N + 1]."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:], dtype=np.int64)
    return bounds
