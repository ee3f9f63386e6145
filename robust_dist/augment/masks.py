"""Segmentation masks that follow their images: the same crop, mirror image, warp and CutMix box, by the same keys."""

import torch
from torch import Tensor

from robust_dist.augment import warp
from robust_dist.augment.checks import readable
from robust_dist.augment.crop_flip import RandomCrop, RandomHorizontalFlip, cut
from robust_dist.augment.cutmix import CutMix, CutMixPlan
from robust_dist.augment.follow import check_batch, like, matrices, plain, stages_of, warps
from robust_dist.augment.layout import Stage, choose
from robust_dist.augment.pipeline import RobustAugment
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def augment_masks(augment: RobustAugment | Stage, masks: Tensor, keys: Tensor, *, fill: int = 0) -> Tensor:
    """Move masks as `augment(images, labels, keys)` moves the images of the same keys.

    Crop, flip, warps and CutMix's boxes are the images' own; warps are nearest whatever the images' interpolation, so
    that no class is invented. Operations on colours leave masks alone, and so does a `RobustAugment` in `eval()`.
    Shapes are static, nothing waits for a device, and `torch.compile(fullgraph=True)` captures it.

    Args:
        augment: The module that augments the images, or one of its stages.
        masks: Class numbers, integers or bool, [B, H, W] or [B, 1, H, W]; without CutMix also [B, N, H, W], a mask for
            each of N objects. A plain tensor or a `tv_tensors.Mask`, on the keys' device.
        keys: The images' keys, int64 [B].
        fill: Value outside the image, in the masks' dtype: 0, or the number that the loss ignores, such as 255.

    Returns:
        New masks of the same class, shape and dtype.

    Raises:
        TypeError: For floating masks (they would have to be interpolated), key points, videos and other types.
        ValueError: For wrong shapes or devices, a fill that the dtype does not hold, and masks of several objects under
            CutMix, where another sample's objects would need masks of their own.
    """
    stages = stages_of(augment)
    maps = check_masks(masks, fill)
    check_batch("masks", maps, keys)
    if isinstance(augment, RobustAugment) and tuple(maps.shape[2:]) != augment.size:
        raise ValueError(f"masks must have the images' size {augment.size}, got {tuple(maps.shape[2:])}")
    for stage in stages:
        maps = _follow(stage, maps, keys, fill)
    return restore(maps, masks)


def check_masks(masks: Tensor, fill: int) -> Tensor:
    """Masks as a plain integer tensor [B, N, H, W]; raises as `augment_masks` does."""
    maps = plain("masks", masks, "Mask")
    if maps.dtype not in _DTYPES:
        raise TypeError(f"masks must hold class numbers, integers or bool, got {maps.dtype}: soft masks are not warped")
    if maps.dim() not in (3, 4):
        raise ValueError(f"masks must have shape [B, H, W] or [B, N, H, W], got {list(maps.shape)}")
    _check_fill(fill, maps.dtype)
    maps = maps.unsqueeze(1) if maps.dim() == 3 else maps
    return maps.to(torch.uint8) if maps.dtype == torch.bool else maps


def _check_fill(fill: int, dtype: torch.dtype) -> None:
    if not isinstance(fill, int):
        raise TypeError(f"fill of masks must be one whole number, got {fill!r}")
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= fill <= high:
        raise ValueError(f"fill of {dtype} masks must lie in [{low}, {high}], got {fill}")


def restore(maps: Tensor, masks: Tensor) -> Tensor:
    """[B, N, H, W] in the class, shape and dtype of the masks that were given."""
    return like(maps.reshape(masks.shape).to(masks.dtype), masks)


def _follow(stage: Stage, maps: Tensor, keys: Tensor, fill: int) -> Tensor:
    if isinstance(stage, RandomCrop):
        return cut(maps, stage.plan(keys), stage.padding, fill)
    if isinstance(stage, RandomHorizontalFlip):
        return choose((stage.plan(keys).flip.view(-1, 1, 1, 1),), maps.flip(3), maps)
    if isinstance(stage, TrivialAugment):
        return warp_masks(stage, maps, stage.plan(keys), fill)
    assert isinstance(stage, CutMix)
    return paste_masks(stage, maps, stage.plan(keys, maps.shape[2], maps.shape[3]))


def warp_masks(trivial: TrivialAugment, maps: Tensor, plan: TrivialAugmentPlan, fill: int) -> Tensor:
    """Integer masks [B, N, H, W] after the shears, translations and rotations of a plan."""
    table, moved = matrices(trivial, plan), warps(plan)
    if not readable(maps):
        return torch.where(moved.view(-1, 1, 1, 1), _read(maps, table, fill), maps)
    places = moved.nonzero().squeeze(1)
    return maps.index_copy(0, places, _read(maps[places], table[places], fill))


def _read(maps: Tensor, table: Tensor, fill: int) -> Tensor:
    index = warp.nearest_index(*warp.grid_terms(table, maps.shape[2], maps.shape[3]))
    return warp.read_nearest(maps, index, torch.full((1,), fill, dtype=maps.dtype, device=maps.device))


def paste(mixing: CutMix, maps: Tensor, plan: CutMixPlan) -> Tensor:
    """[B, C, H, W] of any dtype with each sample's box taken from its partner; labels are not wanted here."""
    return mixing._paste(maps, plan.partner, plan)[0]


def paste_masks(mixing: CutMix, maps: Tensor, plan: CutMixPlan) -> Tensor:
    """Integer masks [B, 1, H, W] with each sample's box taken from its partner; raises for masks of several objects."""
    if maps.shape[1] != 1:
        raise ValueError(
            f"masks must have shape [B, H, W] or [B, 1, H, W] under CutMix, got {maps.shape[1]} a sample: objects of "
            "another sample have no masks here to be pasted into"
        )
    return paste(mixing, maps, plan)
