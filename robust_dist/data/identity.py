"""Telling sets apart: a cheap fingerprint, and whether two parts of a set contain the same images."""

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

# Number of a folder's images looked at one by one, and of two parts' images compared byte by byte.
LOOKED_AT, COMPARED = 300, 16
NAMED = 3


class Stretch(NamedTuple):
    """Consecutive images in one place, such as a file or a table.

    Attributes:
        place: distinguishes it from other places.
        start: number of the first image in it.
        stop: one past the last.
        name: readable name of the place.
    """

    place: tuple[Any, ...]
    start: int
    stop: int
    name: str


def fingerprint(*parts: Any) -> str:
    """A hash of arrays and of values with a plain `repr`: 32 hexadecimal digits, at about 1 GB a second."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        if hasattr(part, "tobytes") and hasattr(part, "dtype"):
            made.update(repr((part.dtype.str, part.shape)).encode())
            made.update(part.tobytes())
        else:
            made.update(f"{part!r};".encode())
    return made.hexdigest()


def stretches_of_files(files: Iterable[tuple[str, int]]) -> list[Stretch]:
    """One stretch per file with its number of images; a link stands for its target."""
    return [Stretch(_file_identity(file), 0, count, file) for file, count in files]


def shared_images(train: Any, test: Any) -> str | None:
    """A description of the images that two sources share; None if none are found.

    Found are shared shards or parquet files, shared rows of a table, and folders and images of a folder that are the
    same through links. Copies are not found: see `are_copies`.
    """
    if getattr(train, "split", None) is not None:
        # Two parts of one folder, distinguished by name.
        return None
    if hasattr(train, "folder") and hasattr(test, "folder"):
        return _linked(train, test)
    if not (hasattr(train, "stretches") and hasattr(test, "stretches")):
        return None
    by_place: dict[tuple[Any, ...], list[Stretch]] = {}
    for one in train.stretches():
        by_place.setdefault(one.place, []).append(one)
    both = [
        Stretch(one.place, max(one.start, other.start), min(one.stop, other.stop), one.name)
        for other in test.stretches()
        for one in by_place.get(other.place, [])
    ]
    both = [one for one in both if one.start < one.stop]
    if not both:
        return None
    named = ", ".join(f"{one.start:,} to {one.stop - 1:,} of {one.name}" for one in both[:NAMED])
    more = f" and {len(both) - NAMED} more" if len(both) > NAMED else ""
    return f"{sum(one.stop - one.start for one in both):,} images: {named}{more}"


def are_copies(train: Any, test: Any) -> bool:
    """Whether two `LabelledSet`s have the same names, labels and, as far as they are compared, images."""
    if len(train) != len(test) or train.fingerprint() != test.fingerprint():
        return False
    ours, theirs = getattr(train, "source", None), getattr(test, "source", None)
    if ours is None or theirs is None:
        return True
    try:
        return all(ours.read(index) == theirs.read(index) for index in spread(len(train), COMPARED))
    except ValueError:
        # An unreadable image.
        return False


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread."""
    return [k * count // most for k in range(most)] if count > most else list(range(count))


def _file_identity(file: str) -> tuple[Any, ...]:
    try:
        stat = os.stat(file.removeprefix("file://"))
    except OSError:
        # An address.
        return (file,)
    return stat.st_dev, stat.st_ino


def _linked(train: Any, test: Any) -> str | None:
    """`shared_images` of two image folders: whole folders, class folders and files may be links."""
    ours, theirs = os.path.realpath(train.folder), os.path.realpath(test.folder)
    if ours == theirs:
        return f"{train.folder} and {test.folder} are one folder"
    real_folder = lru_cache(None)(os.path.realpath)

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)

    def leads_into(source: Any, folder: str, other: Any) -> list[str]:
        paths = [source.where(index) for index in spread(len(source), LOOKED_AT)]
        return [path for path in paths if real(path).startswith(folder + os.sep) or _is_twin(path, source, other)]

    found = leads_into(test, ours, train) or leads_into(train, theirs, test)
    return f"{len(found):,} images at least, among them {found[0]}" if found else None


def _is_twin(path: str, source: Any, other: Any) -> bool:
    """Whether the file with the same name in the other folder is a hard link to this one."""
    stat = os.lstat(path)
    if stat.st_nlink == 1:
        return False
    twin = os.path.join(other.folder, os.path.relpath(path, source.folder))
    return os.path.exists(twin) and os.path.samefile(path, twin)


def source_fingerprint(source: Any) -> str:
    """The source's own fingerprint, or else a hash of its classes and groups."""
    own = getattr(source, "fingerprint", None)
    found: str = own() if own is not None else fingerprint(source.classes, source.group_sizes)
    return found
