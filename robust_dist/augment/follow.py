"""The common part of masks and boxes: the stages that move them, and torchvision's tensor classes."""

from typing import Any

import torch
from torch import Tensor

from robust_dist.augment.crop_flip import RandomCrop, RandomHorizontalFlip
from robust_dist.augment.cutmix import CutMix
from robust_dist.augment.layout import Stage, bits_of
from robust_dist.augment.pipeline import RobustAugment
from robust_dist.augment.tables import OP
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

_WARPS = (OP["ShearX"], OP["Rotate"])
_KNOWN = (RandomCrop, RandomHorizontalFlip, TrivialAugment, CutMix)


def stages_of(augment: RobustAugment | Stage) -> list[Stage]:
    """The stages that a call of `augment` runs, in their order; none in `eval()`.

    Raises:
        TypeError: For anything but a `RobustAugment` or one of its stages.
    """
    if isinstance(augment, RobustAugment):
        stages = [augment.crop, augment.flip, augment.trivial, augment.cutmix] if augment.training else []
        return [stage for stage in stages if stage is not None]
    if isinstance(augment, _KNOWN):
        return [augment]
    names = ", ".join(stage.__name__ for stage in _KNOWN)
    raise TypeError(f"augment must be a RobustAugment or one of {names}, got {type(augment).__name__}")


def warps(plan: TrivialAugmentPlan) -> Tensor:
    """The samples that a plan shears, translates or rotates: bool [B]."""
    return (plan.op >= _WARPS[0]) & (plan.op <= _WARPS[1])


def matrices(trivial: TrivialAugment, plan: TrivialAugmentPlan) -> Tensor:
    """The rows of `tables.matrix_table` of each sample, float64 [B, 8]; the identity where nothing is warped."""
    row = (plan.op * trivial.num_bins + plan.magnitude_bin) * 2 + plan.negative.long()
    return bits_of(trivial, "_matrices", torch.float64, row.device).index_select(0, row)


def plain(name: str, value: Any, wanted: str) -> Tensor:
    """A tensor, or one of the class of `torchvision.tv_tensors` that is `wanted`, as a plain tensor.

    Raises:
        TypeError: For what is neither; names its type.
    """
    kind = type(value).__name__
    if not isinstance(value, Tensor) or kind not in ("Tensor", wanted):
        raise TypeError(
            f"{name} must be torch.Tensor or tv_tensors.{wanted}, got {kind}, which cannot follow as {name}"
        )
    return value if type(value) is Tensor else value.as_subclass(Tensor)


def like(tensor: Tensor, original: Tensor) -> Tensor:
    """A plain tensor in the class of the one that it was made of, with its format and canvas."""
    if type(original) is Tensor:
        return tensor
    from torchvision import tv_tensors

    wrapped: Tensor = tv_tensors.wrap(tensor, like=original)
    return wrapped


def check_batch(name: str, tensor: Tensor, keys: Tensor) -> None:
    """Raise unless keys are int64 [B] for the B samples of a tensor, on its device.

    Raises:
        TypeError: For keys of another dtype.
        ValueError: For another number of samples, or another device.
    """
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be torch.int64, got {keys.dtype}")
    if keys.dim() != 1 or tensor.shape[0] != keys.shape[0]:
        raise ValueError(f"{name} must belong to the samples of the keys, got {tensor.shape[0]} for {list(keys.shape)}")
    if keys.device != tensor.device:
        raise ValueError(f"keys are on {keys.device}, the {name} on {tensor.device}: move one to the other")
