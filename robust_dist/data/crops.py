"""What workers make of a decoded image: a random crop in training, the central one in evaluation; picklable."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robust_dist.data.decode import crop_box, random_resized_crop, resize_center_crop, resized_size


@dataclass(frozen=True)
class Window:
    """What a crop takes of an image.

    Attributes:
        box: left, top, right and bottom, in pixels of the image; whole numbers where it is cut out.
        size: height and width of what it is resized to.
        is_cut_out: whether the box is cut out before it is resized, so that the pixels around it do not count.
    """

    box: tuple[float, float, float, float]
    size: int
    is_cut_out: bool

    @property
    def scale(self) -> float:
        """How many times the box's shorter side is as long as the result's."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top) / self.size


@dataclass(frozen=True)
class RandomCrop:
    """`random_resized_crop` by the sample's key.

    Attributes:
        size: height and width of the result.
        scale: lowest and highest share of the image's area.
        ratio: lowest and highest width / height before resizing.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, image: Any, key: int) -> Tensor:
        """uint8 [3, size, size]."""
        return random_resized_crop(image, self.size, key, scale=self.scale, ratio=self.ratio)

    def pixels_needed(self, width: int, height: int) -> int:
        """So many pixels of an image are enough for every crop: the smallest one is not enlarged."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1], 1.0)
        return min(width * height, math.ceil(self.size**2 / (self.scale[0] * narrowest)))

    def window(self, width: int, height: int, key: int) -> Window:
        """The window of an image of that size."""
        return Window(crop_box(width, height, key, scale=self.scale, ratio=self.ratio), self.size, is_cut_out=True)


@dataclass(frozen=True)
class CentralCrop:
    """`resize_center_crop`, which draws nothing.

    Attributes:
        size: height and width of the result.
        resize: the shorter side before the central crop.
    """

    size: int
    resize: int

    def __call__(self, image: Any, key: int) -> Tensor:
        """uint8 [3, size, size]."""
        return resize_center_crop(image, self.size, self.resize)

    def pixels_needed(self, width: int, height: int) -> int:
        """So many pixels of an image are enough: its shorter side is not enlarged."""
        return min(width * height, math.ceil(self.resize**2 * max(width / height, height / width)))

    def window(self, width: int, height: int, key: int) -> Window:
        """The window of an image of that size.

        Raises:
            BadImageError: as `resize_center_crop`.
        """
        wide, high = resized_size(width, height, self.resize)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        x, y = width / wide, height / high
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        return Window(box, self.size, is_cut_out=False)
