"""`data.decode: fast`: JPEGs decoded only as large, and only as far down, as their crop needs, with exact's boxes.

simplejpeg (libjpeg-turbo) decodes them, or Pillow without it, more slowly but to the same pixels. All other files, and
those that simplejpeg finds faulty, go to Pillow, so that the rules for bad images are those of `decode_rgb`.
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
# Factors by which JPEG's cosine transform can shrink an image.
SHRINKS = (8, 4, 2)
# Transformations that make a stored image upright, by EXIF orientation: mirror along x, along y, then transpose.
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
# JPEG: baseline, extended and progressive frames; and what may precede them: tables, APP0 to APP15, a comment.
_FRAMES, _FRAME = (0xC0, 0xC1, 0xC2), Struct(">BHHB")
_PROGRESSIVE, _RESTARTS, _SCAN, _END = 0xC2, 0xDD, 0xDA, b"\xff\xd9"
_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
# Markers that can hold the EXIF orientation, as EXIF or XMP.
_APP1 = 0xE1
# libjpeg's first warning if data continue below the frame, end there, and have no other fault.
_GOES_ON = "extraneous bytes before marker 0xd9"
# Rows below a row that influence its colours, if these have half the height.
_CONTEXT = 2

Size = tuple[int, int]


def fast_crop(data: bytes, crop: Any, key: int) -> Tensor:
    """`crop` applied to an image file, with the same box as for `decode_rgb(data)`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if its box is at least that many times as wide and high as the result, and no
    further down than the box, unless a torn file could then pass for a good one.

    Args:
        data: the whole file.
        crop: a `RandomCrop` or `CentralCrop`.
        key: the sample's.

    Returns:
        uint8 [3, size, size]. For grey or YCbCr JPEGs: within 2 levels of the exact pixels if decoded at full size,
        otherwise with slightly different blur (figures in robust_dist/data/README.md). For all other files, the exact
        pixels.

    Raises:
        BadImageError: as for `decode_rgb`.
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
    """An image file's pixels, whole, and upright on request, with its width and height.

    A JPEG is decoded to at least `needed(width, height)` pixels.

    Returns:
        uint8 [H, W, 3], and the size given in the file.

    Raises:
        BadImageError: as for `decode_rgb`.
    """
    found = _jpeg(data)
    if found is None or any(found[1]):
        image = decode_rgb(data)
        return np.asarray(image), image.size
    width, height = found[0]
    shrink = next((one for one in SHRINKS if width * height >= needed(width, height) * one**2), 1)
    return _pixels(data, width, height, shrink, rows=height), (width, height)


def _jpeg(data: bytes) -> tuple[Size, tuple[bool, bool, bool]] | None:
    """Stored size of a JPEG with one or three colours, and what makes it upright; None for other files."""
    size = plain_size(data)
    if size is not None:
        return size, _AS_STORED
    image = header(data)
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    return image.size, _TURNS.get(orientation(image), _AS_STORED) if isinstance(data, Upright) else _AS_STORED


def plain_size(data: bytes) -> Size | None:
    """Width and height of an ordinary one- or three-colour JPEG; None if Pillow must look, which takes longer."""
    for marker, at in _segments(data):
        if marker in _FRAMES:
            bits, height, width, colours = _FRAME.unpack_from(data, at + 4)
            usual = bits == 8 and colours in (1, 3) and 0 < width * height <= MAX_PIXELS
            return (width, height) if usual else None
        if marker not in _SEGMENTS or (marker == _APP1 and isinstance(data, Upright)):
            break
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and position of each segment of a JPEG's header up to the first scan, as far as they are complete."""
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data[at : at + 1] == b"\xff" and len(data) > at + 10:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at
        if marker == _SCAN or length < 2:
            break
        at += 2 + length


def _lowered(data: bytes, rows: int) -> tuple[bytes, int] | None:
    """A JPEG whose header says `rows` rows, or a few more, and how many; None if the decoder may not stop there.

    Pillow rejects a file that ends before its last row, so there must be an end mark. With one, a single scan and no
    restart marks, Pillow never rejects rows: it fills in what is missing.
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
    """The stored image's first `rows` rows or more, uint8 [ceil(rows / shrink) or more, ceil(width / shrink), 3]."""
    lowered = _lowered(data, rows)
    decode = _by_pillow if simplejpeg is None else _by_simplejpeg
    pixels = None if lowered is None else decode(lowered[0], width, lowered[1], shrink)
    if pixels is None and simplejpeg is not None:
        pixels = _by_simplejpeg(data, width, height, shrink)
    return np.array(decode_rgb(bytes(data), shrink=shrink)) if pixels is None else pixels


def _by_pillow(data: bytes, width: int, height: int, shrink: int) -> np.ndarray | None:
    """None if it finds the file faulty."""
    with contextlib.suppress(BadImageError):
        return np.array(decode_rgb(data, shrink=shrink))
    return None


def _by_simplejpeg(data: bytes, width: int, height: int, shrink: int) -> np.ndarray | None:
    """None if it finds the file faulty; Pillow then decides."""
    pixels = np.empty((-(-height // shrink), -(-width // shrink), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", min_height=pixels.shape[0], min_width=pixels.shape[1], buffer=pixels)
    except MemoryError:
        raise
    except Exception as error:  # A decoder can raise anything for a bad file.
        return pixels if _GOES_ON in str(error) else None
    return pixels


def _stored(window: Window, width: int, height: int, turn: tuple[bool, bool, bool]) -> Window:
    """The window in the stored image of `width` x `height`, which `turn` makes upright."""
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
    """Resize a window of an image from a smaller version of its pixels.

    Args:
        pixels: uint8 [H, W, 3].
        window: in pixels of the image.
        x: ratio of the image's width to that of `pixels`.
        y: ratio of the heights.
        first: number of the first row in `pixels`, if it has only those of `rows_of`.
        exact: whether Pillow does all of the resizing.

    Returns:
        uint8 [3, size, size].
    """
    left, top, right, bottom = _box(window, x, y)
    if x == y == 1 and window.is_cut_out and not exact:
        return _by_torch(pixels[int(top) - first : int(bottom) - first, int(left) : int(right)], window.size)
    begin, end = _reach(left, right, window)
    row, last = _reach(top, bottom, window)
    image = Image.fromarray(pixels[row - first : last - first, begin:end])
    # Division may end slightly beyond the last pixel.
    box = (left - begin, top - row, min(right - begin, image.width), min(bottom - row, image.height))
    return to_tensor(image.resize((window.size, window.size), Image.Resampling.BILINEAR, box=box))


def rows_of(window: Window, x: float, y: float, height: int) -> tuple[int, int]:
    """The rows that `resized` needs, of an image `height` pixels high: the first, and one past the last."""
    _, top, _, bottom = _box(window, x, y)
    first, last = _reach(top, bottom, window)
    return first, min(last, height)


def _box(window: Window, x: float, y: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = window.box
    return left / x, top / y, right / x, bottom / y


def _reach(low: float, high: float, window: Window) -> Size:
    """The first pixel needed along a side of the box, and one past the last."""
    # The filter's support grows with the shrinking factor.
    around = 0 if window.is_cut_out else math.ceil((high - low) / window.size) + 1
    return max(0, math.floor(low) - around), math.ceil(high) + around


def _by_torch(pixels: np.ndarray, size: int) -> Tensor:
    """Resize by the bilinear filter, which averages when shrinking, without Pillow's two copies."""
    # torch's kernel for bytes is fastest for a whole, channels-last image.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return planes(scaled[0].numpy())
