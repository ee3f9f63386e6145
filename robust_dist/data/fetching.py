"""Downloads that write over nothing: fetched into a folder beside, and moved from there to where no file is."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fetched_beside(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A new, empty folder to fetch into; at the end its files move to the same places below `folder`.

    A file that is there already stays as it is, and links are not moved. Whatever fails, the new folder is removed.

    Args:
        folder: made where it does not exist.
        wanted: which files move, by their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as beside:
        yield Path(beside)
        _move_missing(Path(beside), folder, wanted)


def _move_missing(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if entry.is_symlink():
            continue
        if entry.is_dir():
            there.mkdir(exist_ok=True)
            _move_missing(entry, there, wanted)
        elif wanted(entry.name) and not os.path.lexists(there):
            os.rename(entry, there)
