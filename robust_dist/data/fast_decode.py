"""JPEGs decoded only as large as their crop needs, and only down to it: `data.decode: fast`, with the boxes of exact.

By simplejpeg (libjpeg-turbo), or without it by Pillow, whose pixels are the same and take longer. All other files, and
what simplejpeg finds fault with, are Pillow's, so that the rules for bad images are those of `decode_rgb`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from struct import Struct
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_dist.data.decode import MAX_PIXELS, Window, decode_rgb, header, orientation, planes, to_tensor
from robust_dist.data.errors import BadImageError
from robust_dist.data.source import Upright

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

is_installed = simplejpeg is not None
# What JPEG's cosine transform shrinks by on its way.
SHRINKS = (8, 4, 2)
# What makes a stored image upright, by its EXIF orientation: mirrored along x, along y, and then transposed.
_TURNS = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}
_AS_STORED = (False, False, False)
# Of JPEG: baseline, extended and progressive frames; and what may stand before them: tables, APP0 to APP15, a comment.
_FRAMES, _FRAME = (0xC0, 0xC1, 0xC2), Struct(">BHHB")
_PROGRESSIVE, _RESTARTS, _SCAN, _END = 0xC2, 0xDD, 0xDA, b"\xff\xd9"
_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
# Has the EXIF orientation, as EXIF or in XMP.
_APP1 = 0xE1
# libjpeg's first warning about a file whose data go on below its frame and end there, without any other fault.
_GOES_ON = "extraneous bytes before marker 0xd9"
# Rows below a row that count in its colours, where these have half the height.
_CONTEXT = 2

Size = tuple[int, int]


def fast_crop(data: bytes, crop: Any, key: int) -> Tensor:
    """What `crop` makes of an image file's bytes, from the same box as of `decode_rgb(data)`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where its box is at least so many times as wide and as high as the result, and
    no further down than the box, where that cannot take a torn file for a good one.

    Args:
        data: the whole file.
        crop: a `RandomCrop` or `CentralCrop`.
        key: of the sample.

    Returns:
        uint8 [3, size, size]. Of JPEGs of grey or YCbCr: within 2 levels of the exact pixels where they are decoded at
        full size, else blurred a little otherwise (robust_dist/data/README.md has the figures). Of all other files the
        exact pixels.

    Raises:
        BadImageError: as `decode_rgb`.
    """
    found = _jpeg(data)
    if found is None:
        exact: Tensor = crop(decode_rgb(data), key)
        return exact
    (width, height), turn = found
    window: Window = crop.window(*((height, width) if turn[2] else (width, height)), key)
    window = _stored(window, width, height, turn)
    shrink = next((one for one in SHRINKS if window.scale >= one), 1)
    last = rows_of(window, shrink, shrink, -(-height // shrink))[1]
    pixels = _pixels(data, width, height, shrink, rows=shrink * (last + _CONTEXT))
    return _turned(resized(pixels, window, shrink, shrink), turn)


def fast_pixels(data: bytes, needed: Callable[[int, int], int]) -> tuple[np.ndarray, Size]:
    """An image file's pixels, whole and upright where that is asked for, and its width and height.

    A JPEG's decoder leaves `needed(width, height)` pixels at least.

    Returns:
        uint8 [H, W, 3], and the size that the file says.

    Raises:
        BadImageError: as `decode_rgb`.
    """
    found = _jpeg(data)
    if found is None or any(found[1]):
        image = decode_rgb(data)
        return np.asarray(image), image.size
    width, height = found[0]
    shrink = next((one for one in SHRINKS if width * height >= needed(width, height) * one**2), 1)
    return _pixels(data, width, height, shrink, rows=height), (width, height)


def _jpeg(data: bytes) -> tuple[Size, tuple[bool, bool, bool]] | None:
    """Stored width and height of a JPEG of grey or three colours, and what makes it upright; None for other files."""
    size = plain_size(data)
    if size is not None:
        return size, _AS_STORED
    image = header(data)
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    return image.size, _TURNS.get(orientation(image), _AS_STORED) if isinstance(data, Upright) else _AS_STORED


def plain_size(data: bytes) -> Size | None:
    """Width and height of a usual JPEG of grey or three colours; None where Pillow must look, which takes longer."""
    for marker, at in _segments(data):
        if marker in _FRAMES:
            bits, height, width, colours = _FRAME.unpack_from(data, at + 4)
            usual = bits == 8 and colours in (1, 3) and 0 < width * height <= MAX_PIXELS
            return (width, height) if usual else None
        if marker not in _SEGMENTS or (marker == _APP1 and isinstance(data, Upright)):
            break
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG's header, the first scan's included, as far as they are whole."""
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data[at : at + 1] == b"\xff" and len(data) > at + 10:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at
        if marker == _SCAN or length < 2:
            break
        at += 2 + length


def _lowered(data: bytes, rows: int) -> tuple[bytes, int] | None:
    """A JPEG whose header says `rows` rows, or a few more, and how many; None where the decoder may not stop there.

    Pillow refuses a file that ends before its last row, so there must be an end mark. With one, and with a single scan
    and no restart marks, Pillow refuses no rows: it fills up what is missing.
    """
    frame = None
    for marker, at in _segments(data):
        if marker in (_PROGRESSIVE, _RESTARTS):
            return None
        if marker in _FRAMES:
            frame = at
        if marker == _SCAN and frame is not None:
            _, height, _, colours = _FRAME.unpack_from(data, frame + 4)
            block = 8 * max(data[frame + 11 + 3 * colour] & 15 for colour in range(colours))
            rows = -(-rows // block) * block
            if rows < height and data[at + 4] == colours and data.rfind(_END, at) > 0:
                return data[: frame + 5] + rows.to_bytes(2, "big") + data[frame + 7 :], rows
    return None


def decoder_name(choice: str = "fast") -> str:
    """The package that decodes JPEGs here for a recipe's `data.decode`, and its version."""
    if choice == "cuda":
        return f"torchvision {metadata.version('torchvision')}"
    if choice == "fast" and simplejpeg is not None:
        return f"simplejpeg {simplejpeg.__version__}"
    return f"Pillow {metadata.version('pillow')}"


def _pixels(data: bytes, width: int, height: int, shrink: int, *, rows: int) -> np.ndarray:
    """The stored image's first `rows` rows at least, uint8 [ceil(rows / shrink) or more, ceil(width / shrink), 3]."""
    lowered = _lowered(data, rows)
    decode = _by_pillow if simplejpeg is None else _by_simplejpeg
    pixels = None if lowered is None else decode(lowered[0], width, lowered[1], shrink)
    if pixels is None and simplejpeg is not None:
        pixels = _by_simplejpeg(data, width, height, shrink)
    return np.array(decode_rgb(bytes(data), shrink=shrink)) if pixels is None else pixels


def _by_pillow(data: bytes, width: int, height: int, shrink: int) -> np.ndarray | None:
    """None where it finds fault with the file."""
    with contextlib.suppress(BadImageError):
        return np.array(decode_rgb(data, shrink=shrink))
    return None


def _by_simplejpeg(data: bytes, width: int, height: int, shrink: int) -> np.ndarray | None:
    """None where it finds fault with the file: Pillow says whether there is one."""
    pixels = np.empty((-(-height // shrink), -(-width // shrink), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", min_height=pixels.shape[0], min_width=pixels.shape[1], buffer=pixels)
    except MemoryError:
        raise
    except Exception as error:  # What a decoder raises over a bad file can be of any type.
        return pixels if _GOES_ON in str(error) else None
    return pixels


def _stored(window: Window, width: int, height: int, turn: tuple[bool, bool, bool]) -> Window:
    """The window in the stored image of `width` x `height`, of which `turn` makes the upright one."""
    along_x, along_y, transposed = turn
    left, top, right, bottom = window.box
    if transposed:
        left, top, right, bottom = top, left, bottom, right
    if along_x:
        left, right = width - right, width - left
    if along_y:
        top, bottom = height - bottom, height - top
    return Window((left, top, right, bottom), window.size, window.is_cut_out)


def _turned(image: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    along_x, along_y, transposed = turn
    axes = [2] * along_x + [1] * along_y
    image = image.flip(axes) if axes else image
    return image.transpose(1, 2).contiguous() if transposed else image


def resized(pixels: np.ndarray, window: Window, x: float, y: float, *, first: int = 0, exact: bool = False) -> Tensor:
    """A window of an image, of which smaller pixels are at hand.

    Args:
        pixels: uint8 [H, W, 3].
        window: of the image.
        x: how many times the image is as wide as `pixels`.
        y: how many times it is as high.
        first: the number of the first row in `pixels`, where it has but those of `rows_of`.
        exact: whether Pillow resizes all of it.

    Returns:
        uint8 [3, size, size].
    """
    left, top, right, bottom = _box(window, x, y)
    if x == y == 1 and window.is_cut_out and not exact:
        return _by_torch(pixels[int(top) - first : int(bottom) - first, int(left) : int(right)], window.size)
    begin, end = _reach(left, right, window)
    row, last = _reach(top, bottom, window)
    image = Image.fromarray(pixels[row - first : last - first, begin:end])
    # A division may end a hair beyond the last pixel.
    box = (left - begin, top - row, min(right - begin, image.width), min(bottom - row, image.height))
    return to_tensor(image.resize((window.size, window.size), Image.Resampling.BILINEAR, box=box))


def rows_of(window: Window, x: float, y: float, height: int) -> tuple[int, int]:
    """The rows that `resized` looks at, of an image `height` pixels high: the first, and the one after the last."""
    _, top, _, bottom = _box(window, x, y)
    first, last = _reach(top, bottom, window)
    return first, min(last, height)


def _box(window: Window, x: float, y: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = window.box
    return left / x, top / y, right / x, bottom / y


def _reach(low: float, high: float, window: Window) -> Size:
    """The first pixel that counts along a side of the box, and the one after the last."""
    # The filter reaches as far as it shrinks.
    around = 0 if window.is_cut_out else math.ceil((high - low) / window.size) + 1
    return max(0, math.floor(low) - around), math.ceil(high) + around


def _by_torch(pixels: np.ndarray, size: int) -> Tensor:
    """By the bilinear filter that averages over what it shrinks; without Pillow's two copies."""
    # torch's kernel for bytes is at its fastest where an image is channels last, and whole.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return planes(scaled[0].numpy())
