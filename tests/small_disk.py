"""A disk that fills up: a small tmpfs, or a limit on this process."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest


def _mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@cache
def can_mount() -> bool:
    """Whether this user may mount file systems here."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as place:
        mounted = _mount(Path(place), "size=64k")
        if mounted:
            subprocess.run(["umount", place], check=True)
    return mounted


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limit the length of files that this process writes; longer writes fail as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], object]]:
    """Mount a file system of this size (9m, say) at a new folder; yields a function that resizes it."""
    place.mkdir(parents=True)
    assert _mount(place, f"size={size}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
