"""What workers make of a decoded image: a random crop in training, the central one in evaluation; picklable."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robust_dist.data.decode import random_resized_crop, resize_center_crop


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
