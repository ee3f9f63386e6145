"""Decoding images to 8-bit RGB, and the two crops that give them one size: random by key, and central."""

import math
import os
import threading
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from robust_dist.augment.keys import Stream, uniforms
from robust_dist.data.errors import BadImageError
from robust_dist.data.source import Upright

# PIL's other formats would run Ghostscript (EPS), lack a signature, or pad a truncated file (JPEG 2000).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 2**30 // 12
CROP_TRIES = 10

Box = tuple[int, int, int, int]

# The transpositions that make an image upright, by EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


def decode_rgb(data: bytes, *, shrink: int = 1) -> Image.Image:
    """Decode an image file to 8-bit RGB, completely or not at all.

    Grey, palette and CMYK images are converted to RGB by PIL's rules (Adobe's inverted CMYK JPEGs are corrected),
    16-bit images keep the upper byte of each value, transparency is dropped as in torchvision's ImageFolder, and the
    first frame of an animation is used. Colour profiles (ICC) are not applied. EXIF orientation is applied only to
    `Upright` bytes, as in `datasets`; torchvision's ImageFolder ignores it, and so do the published figures and weights
    for ImageNet.

    Damage that no decoder reports goes unnoticed: JPEG has no checksums, so bytes changed inside a file may only change
    pixels.

    Args:
        data: the whole file, in one of `FORMATS`.
        shrink: 2, 4 or 8 decodes a JPEG at that fraction of its width and height (rounded up), by its own transform.

    Raises:
        BadImageError: the file is empty, not an image, truncated, corrupt, of a pixel type without a known range
            (float, 32-bit integers), or has more than `MAX_PIXELS` pixels; says which.
    """
    if not data:
        raise BadImageError("an empty file")
    with _strict_and_quiet:
        try:
            return as_rgb(_loaded(data, shrink), upright=isinstance(data, Upright))
        except (BadImageError, MemoryError):
            raise
        except Exception as error:  # A decoder can raise anything for a bad file.
            raise BadImageError(_reason(error)) from error


def as_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """Convert a decoded image to 8-bit RGB by the rules of `decode_rgb`.

    `upright` applies its EXIF orientation.

    Raises:
        BadImageError: the pixel type has no known range.
    """
    turn = _TURNS.get(orientation(image)) if upright else None
    return _to_rgb(image) if turn is None else _to_rgb(image).transpose(turn)


def is_turned(data: bytes) -> bool:
    """Whether an image's EXIF orientation is other than upright; only its header is decoded."""
    with _strict_and_quiet:
        try:
            image = _open(data)
            # Pillow itself turns TIFFs.
            return image.format != "TIFF" and orientation(image) in _TURNS
        except Exception:  # A decoder can raise anything for a bad file.
            return False


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 0 if it is missing or unreadable."""
    with _strict_and_quiet:
        try:
            found = image.getexif().get(_ORIENTATION)
            return found if isinstance(found, int) else 0
        except Exception:  # A torn EXIF block loses none of the image.
            return 0


def check_header(data: bytes) -> None:
    """Raise the errors of `header`."""
    header(data)


def header(data: bytes) -> ImageFile.ImageFile:
    """An image with only its header decoded, at a hundredth of the full cost.

    Raises:
        BadImageError: as for `decode_rgb`, as far as the header tells.
    """
    if not data:
        raise BadImageError("an empty file")
    with _strict_and_quiet:
        try:
            image = _open(data)
            _check_size(image)
            return image
        except (BadImageError, MemoryError):
            raise
        except Exception as error:  # A decoder can raise anything for a bad file.
            raise BadImageError(_reason(error)) from error


def random_resized_crop(
    image: Image.Image,
    size: int,
    key: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Torchvision's RandomResizedCrop for a PIL image, with draws that are a pure function of `key`.

    Args:
        image: RGB.
        size: height and width of the result in pixels.
        key: the sample's, from `sample_keys`.
        scale: lowest and highest fraction of the image's area.
        ratio: lowest and highest width / height of the crop before resizing.

    Returns:
        uint8 [3, size, size], resized by PIL's bilinear filter, which averages when shrinking.
    """
    box = crop_box(image.width, image.height, key, scale=scale, ratio=ratio)
    return to_tensor(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def crop_box(width: int, height: int, key: int, *, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """The box cut by `random_resized_crop`: (left, top, right, bottom) in pixels, within the image.

    It is the first of ten draws that lies within the image; if none does, the central crop of the nearest allowed
    ratio.
    """
    draws = uniforms(key, Stream.RESIZED_CROP)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        area = width * height * (scale[0] + next(draws) * (scale[1] - scale[0]))
        aspect = math.exp(low + next(draws) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1))
            return left, top, left + w, top + h
    return _central_box(width, height, ratio)


def resize_center_crop(image: Image.Image, size: int, resize: int) -> Tensor:
    """Torchvision's Resize(resize) and CenterCrop(size) for a PIL image, for evaluation.

    Args:
        image: RGB.
        size: height and width of the result in pixels.
        resize: length that the image's shorter side is resized to first, at least `size`.

    Returns:
        uint8 [3, size, size].

    Raises:
        BadImageError: the image is so long and thin that it would have more than `MAX_PIXELS` pixels when resized.
        ValueError: resize is below size.
    """
    if resize < size:
        raise ValueError(f"resize must be at least size={size}, got {resize}")
    resized = image.resize(resized_size(image.width, image.height, resize), Image.Resampling.BILINEAR)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return to_tensor(resized.crop((left, top, left + size, top + size)))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], contiguous, in its own memory."""
    return planes(np.asarray(image).transpose(2, 0, 1))


def planes(pixels: np.ndarray) -> Tensor:
    """A strided array as a contiguous tensor in its own memory; numpy takes half of torch's time."""
    return torch.from_numpy(np.array(pixels, order="C"))


class _Strictness:
    """PIL without warnings and without padding of truncated files, whatever the process has set.

    Both settings are global to the process, so the first thread that decodes changes them and the last restores them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoding = 0
        self.fills_up = False
        self.warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.decoding += 1
            if self.decoding == 1:
                self.warnings = warnings.catch_warnings()
                self.warnings.__enter__()
                warnings.simplefilter("ignore")
                self.fills_up, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.decoding -= 1
            if self.decoding == 0:
                self.warnings.__exit__(None, None, None)
                ImageFile.LOAD_TRUNCATED_IMAGES = self.fills_up


_strict_and_quiet = _Strictness()
if hasattr(os, "register_at_fork"):
    # A worker forked while another thread decodes must not wait for that thread, which it does not have.
    os.register_at_fork(after_in_child=_strict_and_quiet.__init__)  # type: ignore[misc]


def _open(data: bytes) -> ImageFile.ImageFile:
    Image.init()
    return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels exceed the {MAX_PIXELS:,} allowed")


def _loaded(data: bytes, shrink: int) -> Image.Image:
    image = _open(data)
    _check_size(image)
    if shrink > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // shrink, image.height // shrink))
    if image.format == "PNG":
        # Loading does not check PNG's checksums; verifying uses up the image.
        image.verify()
        image = _open(data)
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Pillow before 10.3 opens 16-bit PNGs as 32-bit, as all versions do such PGMs; neither format has more than 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(f"32-bit values (PIL mode {image.mode!r}) have no known range")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is truncated"
    return str(error) or type(error).__name__


def _central_box(width: int, height: int, ratio: tuple[float, float]) -> Box:
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height of an image resized so that its shorter side has `shorter` pixels.

    Raises:
        BadImageError: the result would have more than `MAX_PIXELS` pixels.
    """
    longer = int(shorter * max(width, height) / min(width, height))
    if shorter * longer > MAX_PIXELS:
        raise BadImageError(
            f"{width} x {height} pixels: too long and thin, the longer side would have {longer:,} when resized"
        )
    return (shorter, longer) if width <= height else (longer, shorter)


@dataclass(frozen=True)
class Window:
    """The part of an image used by a crop.

    Attributes:
        box: left, top, right and bottom, in pixels of the image; whole numbers if it is cut out.
        size: height and width after resizing.
        is_cut_out: whether the box is cut out before resizing, so that pixels around it do not contribute.
    """

    box: tuple[float, float, float, float]
    size: int
    is_cut_out: bool

    @property
    def scale(self) -> float:
        """How many times longer the box's shorter side is than the result's."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top) / self.size


@dataclass(frozen=True)
class RandomCrop:
    """`random_resized_crop` with the sample's key.

    Attributes:
        size: height and width of the result.
        scale: lowest and highest fraction of the image's area.
        ratio: lowest and highest width / height before resizing.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, image: Any, key: int) -> Tensor:
        """uint8 [3, size, size]."""
        return random_resized_crop(image, self.size, key, scale=self.scale, ratio=self.ratio)

    def pixels_needed(self, width: int, height: int) -> int:
        """Number of pixels that suffices for every crop: the smallest one is not enlarged."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1], 1.0)
        return min(width * height, math.ceil(self.size**2 / (self.scale[0] * narrowest)))

    def window(self, width: int, height: int, key: int) -> Window:
        """The window for an image of this size."""
        return Window(crop_box(width, height, key, scale=self.scale, ratio=self.ratio), self.size, is_cut_out=True)


@dataclass(frozen=True)
class CentralCrop:
    """`resize_center_crop`, without randomness.

    Attributes:
        size: height and width of the result.
        resize: length of the shorter side before the central crop.
    """

    size: int
    resize: int

    def __call__(self, image: Any, key: int) -> Tensor:
        """uint8 [3, size, size]."""
        return resize_center_crop(image, self.size, self.resize)

    def pixels_needed(self, width: int, height: int) -> int:
        """Number of pixels that suffices: the image's shorter side is not enlarged."""
        return min(width * height, math.ceil(self.resize**2 * max(width / height, height / width)))

    def window(self, width: int, height: int, key: int) -> Window:
        """The window for an image of this size.

        Raises:
            BadImageError: as for `resize_center_crop`.
        """
        wide, high = resized_size(width, height, self.resize)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        x, y = width / wide, height / high
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        return Window(box, self.size, is_cut_out=False)
