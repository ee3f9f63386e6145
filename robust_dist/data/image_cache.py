"""`data.cache: disk`: decoded images on the host's disk, shrunk to what their crops need and shared by its processes.

The result does not depend on what the cache holds: a sample is cropped from the shrunk image, whether that was just
made or cached. So the folder may be deleted at any time, and a full disk costs only speed.
"""

import contextlib
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from robust_dist.data.decode import decode_rgb, header
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.fast_decode import Size, fast_pixels, resized, rows_of
from robust_dist.data.source import ImageSource, Upright
from robust_dist.data.spool import Spool, locked

# Fraction of the disk that stays free.
LEFT_FREE = 0.05
# An image that would keep more than this fraction of its width is stored as it is.
AS_IT_IS = 0.8
# Number of a set's first images whose size is sampled.
LOOKED_AT = 16
# Files in a set's folder.
PREFIX = "images-"
_MAGIC, _HEADER = b"rd-rgb-1", struct.Struct("<8s4I")


@dataclass(frozen=True)
class Stored:
    """A decoded image, possibly shrunk, or some of its rows.

    Attributes:
        size: width and height of the original image.
        height: its height, in rows.
        rows: uint8 [rows, width, 3].
        first: number of the first row.
    """

    size: Size
    height: int
    rows: np.ndarray
    first: int = 0

    @property
    def scales(self) -> tuple[float, float]:
        """Ratios of the original's width and height to the stored ones."""
        return self.size[0] / self.rows.shape[1], self.size[1] / self.height


@dataclass(frozen=True)
class ImageCache:
    """A folder of decoded images shared by processes.

    An image is written to a temporary file and renamed. When the room is used up, no more are added and none is
    replaced: an epoch returns to each image once. At a start, other sets' images are removed if more than half of the
        room is used.

    Attributes:
        folder: the folder for all sets.
        name: a subfolder, for a set's images with one size and decoder.
        most_bytes: limit for all sets together.
    """

    folder: Path
    name: str
    most_bytes: int

    def get(self, image: str, rows: Callable[[Size, Size], tuple[int, int]]) -> Stored | None:
        """The rows of an image that a crop needs; None if it is missing or incomplete.

        Args:
            image: its name.
            rows: takes the width and height of the original image, and of the stored one; returns the number of the
                first row, and one past the last.
        """
        with contextlib.suppress(OSError), open(self._path(image), "rb", buffering=0) as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, *sides = _HEADER.unpack(header)
            size, (width, height) = (sides[0], sides[1]), (sides[2], sides[3])
            if magic != _MAGIC or os.fstat(file.fileno()).st_size != _HEADER.size + 3 * width * height:
                return None
            first, last = rows(size, (width, height))
            pixels = np.empty((last - first, width, 3), np.uint8)
            file.seek(_HEADER.size + 3 * width * first)
            if file.readinto(pixels.data.cast("B")) == pixels.nbytes:
                return Stored(size, height, pixels, first)
        return None

    def put(self, image: str, stored: Stored) -> None:
        """Store a whole image if there is room; a failing disk costs only speed."""
        path = self._path(image)
        beside = path.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._take(stored.rows.nbytes + _HEADER.size):
                return
            try:
                with open(beside, "xb") as file:
                    file.write(_HEADER.pack(_MAGIC, *stored.size, stored.rows.shape[1], stored.height))
                    file.write(np.ascontiguousarray(stored.rows).data)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise

    def begin(self) -> None:
        """Create the folder; if more than half of the room is used, remove other sets, oldest start first.

        Raises:
            DataError: the folder cannot be created, belongs to another user, or is a link made by another user.
        """
        try:
            Spool(self.folder).check_folder()
            (self.folder / self.name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise DataError(f"the folder {self.folder} is not writable ({error}); set data.cache_dir") from error
        with contextlib.suppress(OSError), locked(self.folder / "lock"):
            ours = self.folder / self.name
            os.utime(ours)
            sets = self._sets()
            used = sum(size for size, _, _ in sets)
            for size, _, path in sorted(sets, key=lambda one: one[1]):
                if used > self.most_bytes // 2 and path != ours:
                    shutil.rmtree(path, ignore_errors=True)
                    used -= size

    def used(self) -> int:
        """Bytes of all sets, as recorded by their writers."""
        return sum(size for size, _, _ in self._sets())

    def _path(self, image: str) -> Path:
        return self.folder / self.name / image[:2] / image[2:]

    def _take(self, size: int) -> bool:
        """Whether there is room for this many more bytes; if so, they are counted as used."""
        disk = os.statvfs(self.folder)
        if disk.f_bavail * disk.f_frsize - size < LEFT_FREE * disk.f_blocks * disk.f_frsize:
            return False
        with locked(self.folder / "lock"):
            fits = self.used() + size <= self.most_bytes
            if fits:
                noted = self.folder / self.name / "bytes"
                noted.write_text(str(_number(noted) + size))
        return fits

    def _sets(self) -> list[tuple[int, float, Path]]:
        """Bytes, time of the last start and folder of each set."""
        with contextlib.suppress(OSError):
            folders = [Path(entry.path) for entry in os.scandir(self.folder) if entry.name.startswith(PREFIX)]
            return [(_number(one / "bytes"), one.stat().st_mtime, one) for one in folders]
        return []


def cache_for(
    source: ImageSource, fingerprint: str, crop: Any, *, fast: bool, folder: Path | None, most_bytes: int
) -> ImageCache:
    """The cache for a source's images, for one crop and decoder; by default in the system's temporary folder."""
    folder = folder or Path(tempfile.gettempdir(), f"robust_dist-{os.getuid()}-images")
    what = f"{source.name}\n{fingerprint}\n{crop.pixels_needed(1 << 15, 1 << 15)}\n{fast}"
    name = PREFIX + blake2b(what.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return ImageCache(folder, name, most_bytes)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class CachedImages:
    """A source's images, cropped from cached decoded ones.

    Attributes:
        source: the encoded images.
        crop: a `RandomCrop` or `CentralCrop`.
        fast: whether JPEGs are decoded as by `fast_crop`; otherwise by Pillow.
        cache: the host's cache.
    """

    source: ImageSource
    crop: Any
    fast: bool
    cache: ImageCache

    def read(self, index: int, key: int) -> tuple[Tensor, int]:
        """A sample's image, uint8 [3, size, size], and its label.

        Raises:
            BadImageError: the file cannot be read or decoded.
        """
        glance, data = getattr(self.source, "glance", None), None
        if glance is None:
            data, label = self.source.read(index)
            stamp = data + bytes([isinstance(data, Upright)])
        else:
            stamp, label = glance(index)
        name = blake2b(stamp, digest_size=16).hexdigest()
        found = self.cache.get(name, lambda size, stored: self._rows(size, stored, key))
        if found is None:
            data = self.source.read(index)[0] if data is None else data
            found = shrunk(data, self.crop.pixels_needed, fast=self.fast)
            self.cache.put(name, found)
        window = self.crop.window(*found.size, key)
        return resized(found.rows, window, *found.scales, first=found.first, exact=not self.fast), label

    def _rows(self, size: Size, stored: Size, key: int) -> tuple[int, int]:
        return rows_of(self.crop.window(*size, key), size[0] / stored[0], size[1] / stored[1], stored[1])


def bytes_kept(dataset: Any) -> int:
    """An estimate of the bytes a cache would hold for a `StreamSet`, from the headers of its first images."""
    pixels: list[int] = []
    for index in range(min(LOOKED_AT, len(dataset))):
        # Unreadable images are found, and counted, by those who need them.
        with contextlib.suppress(BadImageError, OSError):
            width, height = header(dataset.source.read(index)[0]).size
            needed = dataset.crop.pixels_needed(width, height)
            pixels.append(width * height if needed > AS_IT_IS**2 * width * height else needed)
    return 3 * sum(pixels) // max(1, len(pixels)) * len(dataset)


def shrunk(data: bytes, pixels_needed: Callable[[int, int], int], *, fast: bool) -> Stored:
    """A decoded image file, shrunk if it has far more pixels than needed.

    Raises:
        BadImageError: as for `decode_rgb`.
    """
    pixels, size = fast_pixels(data, pixels_needed) if fast else _exact(data)
    part = (pixels_needed(*size) / (size[0] * size[1])) ** 0.5
    if part > AS_IT_IS:
        return Stored(size, pixels.shape[0], pixels)
    width, height = (max(1, round(part * side)) for side in size)
    by = round(size[0] / pixels.shape[1])
    box = (0, 0, min(size[0] / by, pixels.shape[1]), min(size[1] / by, pixels.shape[0]))
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return Stored(size, height, np.asarray(small))


def _exact(data: bytes) -> tuple[np.ndarray, Size]:
    image = decode_rgb(data)
    return np.asarray(image), image.size
