"""New files and folders, written whole or not at all, and never over others."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        FileExistsError: Names it.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} is there already, and nothing is written over: name another one")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written.

    Raises:
        FileExistsError: Something is there.
    """
    check_new(path)
    building = path.absolute().parent / f".{path.name}.{os.getpid()}.partial"
    building.mkdir(parents=True)
    try:
        yield building
        check_new(path)
        os.rename(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
