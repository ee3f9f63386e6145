"""Very many short strings in two arrays, so that a worker's copy of a set is a few large blocks and not objects."""

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class PackedStrings:
    """A list of strings that is pickled, forked and kept as one block of bytes and one of offsets.

    A list of Python strings would be copied page by page into every forked worker, as soon as it counts references.

    Args:
        data: uint8 [bytes], the strings one after the other, as the file system encodes names.
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
            raise IndexError(f"index {index} is outside of {len(self)} strings")
        return os.fsdecode(self.data[self.bounds[index] : self.bounds[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def bounds_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of consecutive stretches begins, and the end: int64 [N + 1]."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:], dtype=np.int64)
    return bounds
