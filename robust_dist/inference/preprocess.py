"""From an image to a model's input, with the pixels of the run's own evaluation."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from robust_dist.augment import RobustAugment
from robust_dist.data.decode import as_rgb, decode_rgb, resize_center_crop, to_tensor
from robust_dist.data.errors import BadImageError
from robust_dist.data.registry import DATASETS
from robust_dist.data.source import Upright, turns_upright
from robust_dist.documents import typed
from robust_dist.own_code import is_name
from robust_dist.train.data_config import DataConfig
from robust_dist.train.sources import preprocessing_of

ImageLike = str | os.PathLike[str] | Image.Image | Tensor


@dataclass(frozen=True)
class Pixels:
    """What is done to an image.

    Attributes:
        size: Height and width in pixels of the model's input.
        resize: What the shorter side becomes before the central crop; None takes an image of `size` as it is, and
            makes the shorter side of any other `size`.
        mean: Of each channel, on the scale 0 to 1.
        std: Of each channel.
        upright: Whether images are turned by their EXIF orientation.
        channels_last: Whether batches are torch.channels_last.
    """

    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upright: bool = False
    channels_last: bool = False


def pixels_of(data: DataConfig, channels_last: bool) -> Pixels:
    """What a recipe's evaluation does to its images."""
    image = preprocessing_of(data, evaluation=True)
    resize = data.eval_sides[1] if data.streamed else None
    upright = data.source is not None and turns_upright(str(data.exif), auto=data.name == "hub")
    return Pixels(image.size, resize, tuple(image.mean), tuple(image.std), upright, channels_last)


def is_own(data: DataConfig) -> bool:
    """Whether a run's images were the user's own, so that `data.json` says what they were; nothing is imported."""
    return is_name(data.name) or (data.name not in DATASETS and data.source is None)


def pixels_noted(record: dict[str, Any], data: DataConfig, channels_last: bool) -> Pixels:
    """What a run's evaluation does to its images by its `data.json`."""
    noted: _Noted = typed(record.get("preprocessing"), _Noted, "data.json: preprocessing")
    upright = turns_upright(str(data.exif), auto=False)
    return Pixels(noted.eval_size, noted.eval_resize, noted.mean, noted.std, upright, channels_last)


@dataclass
class _Noted:
    """The preprocessing in `data.json`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_size: int
    eval_resize: int | None = None


class Preprocess:
    """Decode, resize, crop, normalise: an image to float32 [3, size, size].

    Args:
        classes: Names of the classes, by number.
        pixels: What is done to an image.
    """

    def __init__(self, classes: tuple[str, ...], pixels: Pixels) -> None:
        self.classes, self.pixels = classes, pixels
        self.augment = RobustAugment(
            len(classes), pixels.size, pixels.mean, pixels.std, channels_last=pixels.channels_last
        ).eval()

    def __call__(self, image: ImageLike) -> Tensor:
        """One image, ready for `model(...[None])`.

        Args:
            image: A file's path, a PIL image, or uint8 [3, H, W].

        Returns:
            float32 [3, size, size].

        Raises:
            BadImageError: It cannot be decoded; names the file.
            ValueError: A tensor of another dtype or number of channels.
            OSError: The file cannot be read.
        """
        return self.normalize(self.levels(image)[None])[0]

    def levels(self, image: ImageLike) -> Tensor:
        """The image before it is normalised, uint8 [3, size, size]."""
        if isinstance(image, Tensor):
            return self._cropped(_of_tensor(image, len(self.pixels.mean)))
        if isinstance(image, Image.Image):
            return self._cropped(as_rgb(image, upright=self.pixels.upright))
        kind = Upright if self.pixels.upright else bytes
        try:
            return self._cropped(decode_rgb(kind(Path(image).read_bytes())))
        except BadImageError as error:
            raise BadImageError(f"{os.fspath(image)}: {error}") from None

    def normalize(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std of uint8 [B, 3, size, size]."""
        return self.augment.normalize(images)

    def to(self, device: torch.device) -> "Preprocess":
        """The same for images on another device."""
        self.augment.to(device)
        return self

    def __repr__(self) -> str:
        return f"Preprocess({len(self.classes)} classes, {self.pixels})"

    def _cropped(self, image: Image.Image) -> Tensor:
        size, resize = self.pixels.size, self.pixels.resize
        if resize is None and image.size == (size, size):
            return to_tensor(image)
        return resize_center_crop(image, size, resize or size)


def _of_tensor(image: Tensor, channels: int) -> Image.Image:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
        raise ValueError(
            f"an image must be uint8 [{channels}, H, W], got {str(image.dtype).removeprefix('torch.')} "
            f"{list(image.shape)}"
        )
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
