"""The section "augment" of a recipe, and the pipeline that it builds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robust_dist.augment import RobustAugment
from robust_dist.train.keys import values_of
from robust_dist.train.settings import require, require_number


@dataclass
class AugmentConfig:
    """The training pipeline: crop, flip, TrivialAugment, CutMix, in this order.

    Attributes:
        crop: Pixels of padding before the random crop; null takes the data set's own, 0 crops nothing.
        flip: Mirror half of the images; null takes the data set's own (never for digits).
        trivial: TrivialAugment, a draw per sample.
        num_bins: Strengths of TrivialAugment.
        interpolation: nearest or bilinear, for TrivialAugment's warps.
        cutmix: CutMix.
        cutmix_mode: elem (a box and a partner per sample, independent of the world size) or batch (one box).
        cutmix_alpha: Parameter of Beta(alpha, alpha), from which the share is drawn.
        cutmix_p: Probability of CutMix.
        compile: Run the pipeline through torch.compile.
    """

    crop: int | None = None
    flip: bool | None = None
    trivial: bool = True
    num_bins: int = 31
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    cutmix: bool = True
    cutmix_mode: Literal["elem", "batch"] = "elem"
    cutmix_alpha: float = 1.0
    cutmix_p: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.crop is not None:
            require_number("augment.crop", self.crop, 0)
        require_number("augment.num_bins", self.num_bins, 2, 65_536)
        require(0 < self.cutmix_alpha < math.inf, "augment.cutmix_alpha", self.cutmix_alpha, "a finite number above 0")
        require_number("augment.cutmix_p", self.cutmix_p, 0, 1)

    def build(
        self,
        num_classes: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop: int,
        flip: bool,
        **more: Any,
    ) -> RobustAugment:
        """The pipeline for images of one data set.

        Args:
            num_classes: Of the data set.
            size: Side of an image, in pixels.
            mean: Of each channel.
            std: Of each channel.
            crop: The data set's own padding in pixels, where the recipe leaves it open.
            flip: Likewise, whether images are mirrored.
            **more: What other sections say of the pipeline, under RobustAugment's names.
        """
        own = values_of(self, AugmentConfig, "compile")
        own |= {"crop": crop if self.crop is None else self.crop, "flip": flip if self.flip is None else self.flip}
        return RobustAugment(num_classes, size, mean, std, **own, **more)
