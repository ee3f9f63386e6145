"""The section "augment" of a recipe, and the pipeline that it builds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_dist import own_code
from robust_dist.augment import RobustAugment, sample_keys, soft_targets
from robust_dist.train.keys import NAMES_CODE, require, require_number, values_of

# From images, labels or targets, and keys (int64 [B]) to images and labels or targets.
Stage = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class AugmentConfig:
    """The training pipeline: crop, flip, TrivialAugment, CutMix, in this order.

    Attributes:
        crop: Pixels of padding before the random crop; null uses the data set's own, 0 disables the crop.
        flip: Mirror half of the images; null uses the data set's own (never for digits).
        trivial: TrivialAugment, with one draw per sample.
        num_bins: Number of strengths of TrivialAugment.
        interpolation: nearest or bilinear, for TrivialAugment's warps.
        cutmix: CutMix.
        cutmix_mode: elem (a box and a partner per sample, independent of the world size) or batch (one box).
        cutmix_alpha: Parameter of Beta(alpha, alpha), from which the mixing ratio is drawn.
        cutmix_p: Probability of CutMix.
        compile: Run the pipeline through torch.compile.
        before: Your own stages before the crop, as [MODULE:NAME, ...]: functions (or torch.nn.Module classes) from
            images (uint8 [B, C, H, W]), labels (int64 [B]) and keys (int64 [B], one per sample and epoch) to images and
            labels of the same dtype and shape.
        after: Your own stages after CutMix: from images (floating, normalised), targets (float32 [B, classes]) and keys
            to images and targets.
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
    before: list[str] = field(default_factory=list, metadata=NAMES_CODE)
    after: list[str] = field(default_factory=list, metadata=NAMES_CODE)

    def __post_init__(self) -> None:
        if self.crop is not None:
            require_number("augment.crop", self.crop, 0)
        require_number("augment.num_bins", self.num_bins, 2, 65_536)
        require(0 < self.cutmix_alpha < math.inf, "augment.cutmix_alpha", self.cutmix_alpha, "a finite number above 0")
        require_number("augment.cutmix_p", self.cutmix_p, 0, 1)
        for key in ("before", "after"):
            for name in getattr(self, key):
                own_code.check_form(f"augment.{key}", name)

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
        """The pipeline for images of one data set, with `size` pixels per side; mean and std are per channel.

        `crop` (padding in pixels) and `flip` are the data set's own, for a recipe that leaves them open; `more` holds
        other sections' settings for the pipeline, under RobustAugment's names.
        """
        own = values_of(self, AugmentConfig, "compile", "before", "after")
        own |= {"crop": crop if self.crop is None else self.crop, "flip": flip if self.flip is None else self.flip}
        pipeline = RobustAugment(num_classes, size, mean, std, **own, **more)
        if self.before or self.after:
            add_stages(pipeline, self.before, self.after)
        return pipeline


def add_stages(pipeline: RobustAugment, before: Sequence[str], after: Sequence[str]) -> None:
    """Add the user's own stages to a training pipeline; an OwnCodeError names an unusable one."""
    first, last = [own_stage("augment.before", name) for name in before], [own_stage("augment.after", n) for n in after]
    for number, stage in enumerate(first + last):
        if isinstance(stage, nn.Module):
            pipeline.add_module(f"own{number}", stage)
    with torch.random.fork_rng(devices=[]):
        _try_stages(pipeline, dict(zip(before, first, strict=True)), dict(zip(after, last, strict=True)))
    if first:
        pipeline.register_forward_pre_hook(partial(_run_before, first), with_kwargs=True)
    if last:
        pipeline.register_forward_hook(partial(_run_after, last))


def own_stage(key: str, name: str) -> Stage:
    """The stage named as `module:Name`; an OwnCodeError if it cannot be imported or is not a stage."""
    made = own_code.load(key, name)
    if isinstance(made, type) and issubclass(made, nn.Module):
        made = own_code.call(key, name, made)
    if isinstance(made, type) or not callable(made):
        raise own_code.wrong(key, name, made, "a function of images, labels and keys, or a torch.nn.Module class")
    own_code.check_call(key, name, made, *(torch.zeros(0),) * 3)
    stage: Stage = made
    return stage


def _run_before(stages: Sequence[Stage], pipeline: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    if not pipeline.training:
        return None
    images, labels, keys, *rest = args
    index = kwargs.pop("index", None)
    if index is not None:
        images, labels = images.index_select(0, index), labels.index_select(0, index)
    for stage in stages:
        images, labels = stage(images, labels, keys)
    return (images, labels, keys, *rest), kwargs


def _run_after(stages: Sequence[Stage], pipeline: Any, args: Any, outputs: Any) -> Any:
    if not pipeline.training:
        return outputs
    images, targets = outputs
    for stage in stages:
        images, targets = stage(images, targets, args[2])
    return images, targets


def _try_stages(pipeline: RobustAugment, first: dict[str, Stage], last: dict[str, Stage]) -> None:
    """Try the stages on two grey images, and reject those that return the wrong thing."""
    images = torch.full((2, *pipeline.image_shape), 128, dtype=torch.uint8)
    labels, keys = torch.zeros(2, dtype=torch.int64), sample_keys(0, 0, torch.arange(2))
    for name, stage in first.items():
        images, labels = _tried("augment.before", name, stage, images, labels, keys)
    floats = (pipeline.normalize(images), soft_targets(labels, pipeline.num_classes))
    for name, stage in last.items():
        floats = _tried("augment.after", name, stage, *floats, keys)


def _tried(key: str, name: str, stage: Stage, *given: Tensor) -> tuple[Tensor, Tensor]:
    found = own_code.call(key, name, stage, *given)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(one, Tensor) for one in found):
        raise own_code.OwnCodeError(f"{key}={name!r} returned a {type(found).__name__}; it must return two tensors")
    for what, before, after in zip(("images", "labels or targets"), given, found, strict=False):
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise own_code.OwnCodeError(
                f"{key}={name!r} turned {what} of {before.dtype} {list(before.shape)} into {after.dtype} "
                f"{list(after.shape)}; dtype and shape must not change"
            )
    return found[0], found[1]
