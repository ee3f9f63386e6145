"""Very many short strings in two arrays, so that a worker's copy of a set is a few large blocks and not objects."""

import os
from collections.abc import Iterable, Iterator

import numpy as np


class PackedStrings:
    """A list of strings that is pickled, forked and kept as one block of bytes and one of offsets.

    A list of Python strings would be copied page by page into every forked worker, as soon as it counts references.

    Args:
        strings: names of files, or other strings; those that are not UTF-8 come back as the file system gave them.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in encoded], out=self._offsets[1:])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} strings")
        return os.fsdecode(self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
