"""Random crops of padded images and horizontal flips, on batches, with a draw for every sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from robust_dist.augment.checks import check_vector
from robust_dist.augment.keys import Stream, randint, uniform
from robust_dist.augment.layout import ImageStage, choose
from robust_dist.validate import real_number, whole_number


@dataclass(frozen=True, eq=False)
class CropPlan:
    """The position of each sample's window in the padded image, on the images' device.

    Attributes:
        top: First row, int64 [B], from 0 to 2 * padding; `padding` does not move the image.
        left: First column, int64 [B].
    """

    top: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class FlipPlan:
    """The samples that are flipped.

    Attributes:
        flip: bool [B], on the images' device.
    """

    flip: Tensor


def cut(images: Tensor, plan: CropPlan, padding: int, fill: float) -> Tensor:
    """Windows of images [B, C, H, W], any dtype, padded by `padding` pixels of `fill` on each side."""
    channels, height, width = images.shape[1:]
    row = torch.arange(height, device=images.device) + plan.top.unsqueeze(1)
    column = torch.arange(width, device=images.device) + plan.left.unsqueeze(1)
    index = (row * (width + 2 * padding)).unsqueeze(2) + column.unsqueeze(1)
    padded = pad(images.contiguous(), (padding,) * 4, value=fill).flatten(2)
    out = padded.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1))
    return out.view(images.shape)


class RandomCrop(ImageStage):
    """Pad each image on all sides and crop a window of the original size at a random position.

    Args:
        padding: Pixels on each side, at least 0.
        fill: Value of the padding, in the images' own units.

    Raises:
        TypeError: For a padding that is not an int.
        ValueError: For a negative padding.
    """

    def __init__(self, padding: int = 4, *, fill: float = 0) -> None:
        super().__init__()
        self.padding = whole_number("padding", padding, 0)
        if isinstance(fill, (bool, str, Sequence)):
            raise TypeError(f"fill must be one number, got {fill!r}")
        self.fill = fill

    def plan(self, keys: Tensor) -> CropPlan:
        """Draw a position for each key, int64 [B]."""
        places = 2 * self.padding + 1
        return CropPlan(top=randint(keys, Stream.CROP_TOP, places), left=randint(keys, Stream.CROP_LEFT, places))

    def _carry_out(self, images: Tensor, plan: CropPlan) -> Tensor:
        check_vector("plan.top", plan.top, images)
        check_vector("plan.left", plan.left, images)
        return cut(images, plan, self.padding, self.fill)


class RandomHorizontalFlip(ImageStage):
    """Flip each image left to right with probability p.

    Args:
        p: Probability in [0, 1].

    Raises:
        TypeError: For a p that is not a number.
        ValueError: For a p outside [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = real_number("p", p, 0, 1)

    def plan(self, keys: Tensor) -> FlipPlan:
        """Draw for each key, int64 [B]."""
        return FlipPlan(flip=uniform(keys, Stream.FLIP) < self.p)

    def _carry_out(self, images: Tensor, plan: FlipPlan) -> Tensor:
        check_vector("plan.flip", plan.flip, images, torch.bool)
        return choose((plan.flip.view(-1, 1, 1, 1),), images.flip(3), images)
