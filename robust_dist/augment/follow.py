"""Masks and boxes that follow their images: the same crop, flip, warp and CutMix box, from the same keys.

Suffixes: B samples, N masks or boxes per sample. Corners are x1, y1, x2, y2 in pixels, with pixel edges at integers;
they are float64 until they are returned.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from robust_dist.augment import warp
from robust_dist.augment.checks import readable
from robust_dist.augment.crop_flip import CropPlan, FlipPlan, RandomCrop, RandomHorizontalFlip, cut
from robust_dist.augment.cutmix import CutMix, CutMixPlan
from robust_dist.augment.layout import Stage, bits_of, choose
from robust_dist.augment.pipeline import RobustAugment
from robust_dist.augment.tables import OP
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_WARPS = (OP["ShearX"], OP["Rotate"])
FORMATS = ("XYXY", "XYWH", "CXCYWH")
_KNOWN = (RandomCrop, RandomHorizontalFlip, TrivialAugment, CutMix)
Size = tuple[int, int]


def _stages_of(augment: RobustAugment | Stage) -> list[Stage]:
    """The stages that a call of `augment` runs, in order; none in `eval()`.

    Raises:
        TypeError: For anything other than a `RobustAugment` or one of its stages.
    """
    if isinstance(augment, RobustAugment):
        stages = [augment.crop, augment.flip, augment.trivial, augment.cutmix] if augment.training else []
        return [stage for stage in stages if stage is not None]
    if isinstance(augment, _KNOWN):
        return [augment]
    names = ", ".join(stage.__name__ for stage in _KNOWN)
    raise TypeError(f"augment must be a RobustAugment or one of {names}, got {type(augment).__name__}")


def _warps(plan: TrivialAugmentPlan) -> Tensor:
    """The samples that a plan shears, translates or rotates: bool [B]."""
    return (plan.op >= _WARPS[0]) & (plan.op <= _WARPS[1])


def _matrices(trivial: TrivialAugment, plan: TrivialAugmentPlan) -> Tensor:
    """Each sample's row of `tables.matrix_table`, float64 [B, 8]; the identity where nothing is warped."""
    row = (plan.op * trivial.num_bins + plan.magnitude_bin) * 2 + plan.negative.long()
    return bits_of(trivial, "_matrices", torch.float64, row.device).index_select(0, row)


def _plain(name: str, value: Any, wanted: str) -> Tensor:
    """Convert a tensor, or an instance of the `torchvision.tv_tensors` class `wanted`, to a plain tensor.

    Raises:
        TypeError: For any other type.
    """
    kind = type(value).__name__
    if not isinstance(value, Tensor) or kind not in ("Tensor", wanted):
        raise TypeError(
            f"{name} must be torch.Tensor or tv_tensors.{wanted}, got {kind}, which cannot be used as {name}"
        )
    return value if type(value) is Tensor else value.as_subclass(Tensor)


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    """Wrap a plain tensor in the class of the original, with its format and canvas."""
    if type(original) is Tensor:
        return tensor
    from torchvision import tv_tensors

    wrapped: Tensor = tv_tensors.wrap(tensor, like=original)
    return wrapped


def _check_batch(name: str, tensor: Tensor, keys: Tensor) -> None:
    """Check that keys are int64 [B] for the B samples of a tensor, on its device.

    Raises:
        TypeError: For keys with another dtype.
        ValueError: For another number of samples, or another device.
    """
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be torch.int64, got {keys.dtype}")
    if keys.dim() != 1 or tensor.shape[0] != keys.shape[0]:
        raise ValueError(f"{name} must match the samples of the keys, got {tensor.shape[0]} for {list(keys.shape)}")
    if keys.device != tensor.device:
        raise ValueError(f"keys are on {keys.device}, the {name} on {tensor.device}: move one to the other")


def augment_masks(augment: RobustAugment | Stage, masks: Tensor, keys: Tensor, *, fill: int = 0) -> Tensor:
    """Move masks as `augment(images, labels, keys)` moves the images with the same keys.

    Crop, flip, warps and CutMix boxes are those of the images; warps always use nearest interpolation, so that no new
    class numbers appear. Operations on colours do not change masks, nor does a `RobustAugment` in `eval()`.
    Shapes are static, nothing waits for a device, and `torch.compile(fullgraph=True)` captures it.

    Args:
        augment: The module that augments the images, or one of its stages.
        masks: Class numbers, integers or bool, [B, H, W] or [B, 1, H, W]; without CutMix also [B, N, H, W], a mask for
            each of N objects. A plain tensor or a `tv_tensors.Mask`, on the keys' device.
        keys: The images' keys, int64 [B].
        fill: Value outside the image, in the masks' dtype: 0, or the number ignored by the loss, such as 255.

    Returns:
        New masks of the same class, shape and dtype.

    Raises:
        TypeError: For floating-point masks (they would need interpolation), key points, videos and other types.
        ValueError: For wrong shapes or devices, a fill outside the dtype's range, and masks of several objects under
            CutMix, where the objects of another sample would need additional masks.
    """
    stages = _stages_of(augment)
    maps = check_masks(masks, fill)
    _check_batch("masks", maps, keys)
    if isinstance(augment, RobustAugment) and tuple(maps.shape[2:]) != augment.size:
        raise ValueError(f"masks must have the images' size {augment.size}, got {tuple(maps.shape[2:])}")
    for stage in stages:
        maps = _moved_maps(stage, maps, keys, fill)
    return restore(maps, masks)


def check_masks(masks: Tensor, fill: int) -> Tensor:
    """Convert masks to a plain integer tensor [B, N, H, W]; raises the errors of `augment_masks`."""
    maps = _plain("masks", masks, "Mask")
    if maps.dtype not in _DTYPES:
        raise TypeError(
            f"masks must be class numbers, integers or bool, got {maps.dtype}: soft masks are not supported"
        )
    if maps.dim() not in (3, 4):
        raise ValueError(f"masks must have shape [B, H, W] or [B, N, H, W], got {list(maps.shape)}")
    _check_fill(fill, maps.dtype)
    maps = maps.unsqueeze(1) if maps.dim() == 3 else maps
    return maps.to(torch.uint8) if maps.dtype == torch.bool else maps


def _check_fill(fill: int, dtype: torch.dtype) -> None:
    if not isinstance(fill, int):
        raise TypeError(f"fill of masks must be an integer, got {fill!r}")
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= fill <= high:
        raise ValueError(f"fill of {dtype} masks must be in [{low}, {high}], got {fill}")


def restore(maps: Tensor, masks: Tensor) -> Tensor:
    """Convert [B, N, H, W] back to the class, shape and dtype of the original masks."""
    return _like(maps.reshape(masks.shape).to(masks.dtype), masks)


def _moved_maps(stage: Stage, maps: Tensor, keys: Tensor, fill: int) -> Tensor:
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
    table, moved = _matrices(trivial, plan), _warps(plan)
    if not readable(maps):
        return torch.where(moved.view(-1, 1, 1, 1), _read(maps, table, fill), maps)
    places = moved.nonzero().squeeze(1)
    return maps.index_copy(0, places, _read(maps[places], table[places], fill))


def _read(maps: Tensor, table: Tensor, fill: int) -> Tensor:
    index = warp.nearest_index(*warp.grid_terms(table, maps.shape[2], maps.shape[3]))
    return warp.read_nearest(maps, index, torch.full((1,), fill, dtype=maps.dtype, device=maps.device))


def paste(mixing: CutMix, maps: Tensor, plan: CutMixPlan) -> Tensor:
    """[B, C, H, W], any dtype, with each sample's box replaced by that of its partner; labels are not needed."""
    return mixing._paste(maps, plan.partner, plan)[0]


def paste_masks(mixing: CutMix, maps: Tensor, plan: CutMixPlan) -> Tensor:
    """Integer masks [B, 1, H, W] with each sample's box replaced by that of its partner.

    Raises:
        ValueError: For masks of several objects.
    """
    if maps.shape[1] != 1:
        raise ValueError(
            f"masks must have shape [B, H, W] or [B, 1, H, W] under CutMix, got {maps.shape[1]} per sample: there are "
            "no masks for the objects of the pasted sample"
        )
    return paste(mixing, maps, plan)


def augment_boxes(
    augment: RobustAugment | Stage,
    boxes: Tensor | Sequence[Tensor],
    keys: Tensor,
    *,
    box_format: str = "XYXY",
    canvas_size: Size | None = None,
) -> tuple[Any, Any]:
    """Move boxes as `augment(images, labels, keys)` moves the images with the same keys.

    A box becomes the smallest upright box around its four moved corners, clamped to the image, as in torchvision.
    Boxes keep their number and order, so that they still match their labels. A box that leaves the image, or had no
    area, has none from then on; `keep` marks the others by the rule of torchvision's SanitizeBoundingBoxes: inside
    the image, and at least one pixel wide and high.

    Args:
        augment: The module that augments the images, or one of its stages; without CutMix, which may cover objects
            partly.
        boxes: A padded tensor [B, N, 4] with zeros in empty rows, or a sequence of B `tv_tensors.BoundingBoxes`
            [N_i, 4]. Floating-point or integer; integers are rounded. On the keys' device.
        keys: The images' keys, int64 [B].
        box_format: Format of a padded tensor: "XYXY", "XYWH" or "CXCYWH". `BoundingBoxes` have their own.
        canvas_size: The images' (height, width), if neither `augment` nor the boxes have it.

    Returns:
        New boxes with the same class, shape, format and dtype, and which of them to keep, bool [B, N] or a list of
        bool [N_i].

    Raises:
        TypeError: For key points, videos and other types.
        ValueError: For rotated boxes, CutMix, and wrong shapes, formats or sizes.
    """
    stages = _without_cutmix(augment)
    if isinstance(boxes, Tensor):
        tensor = _plain("boxes", boxes, "Tensor")
        if tensor.dim() != 3:
            raise ValueError(f"padded boxes must have shape [B, N, 4], got {list(tensor.shape)}")
        canvas = _canvas(augment, [] if canvas_size is None else [canvas_size])
        corners, keep = _move(stages, to_corners(tensor, box_format), keys, canvas)
        return from_corners(corners, box_format, tensor.dtype), keep
    packed, canvases = pack(boxes)
    corners, keep = _move(stages, packed, keys, _canvas(augment, canvases))
    return unpack(corners, boxes), [k[: len(box)] for k, box in zip(keep, boxes, strict=True)]


def _without_cutmix(augment: RobustAugment | Stage) -> list[Stage]:
    stages = _stages_of(augment)
    if any(isinstance(stage, CutMix) for stage in stages):
        raise ValueError(
            "boxes do not support CutMix, which covers objects partly: set cutmix=False for the images of these boxes"
        )
    return stages


def _canvas(augment: RobustAugment | Stage, named: Sequence[Size]) -> Size:
    sizes = {tuple(size) for size in named} | ({augment.size} if isinstance(augment, RobustAugment) else set())
    if len(sizes) != 1:
        hint = "pass canvas_size" if not sizes else f"got {sorted(sizes)}"
        raise ValueError(f"all boxes of a batch must have the canvas_size (height, width) of its images: {hint}")
    height, width = next(iter(sizes))
    return int(height), int(width)


def to_corners(boxes: Tensor, box_format: str) -> Tensor:
    """Convert boxes [..., N, 4] in one of `FORMATS` to corners, float64.

    Raises:
        TypeError: For bool and complex boxes.
        ValueError: For rotated or unknown formats and wrong shapes.
    """
    name = str(getattr(box_format, "name", box_format)).upper()
    if name not in FORMATS:
        raise ValueError(f"box_format must be one of {', '.join(FORMATS)}, got {name}: rotated boxes are not supported")
    if boxes.dim() < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, N, 4], or [N, 4] per sample, got {list(boxes.shape)}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"boxes must be floating-point or integers, got {boxes.dtype}")
    first, second = boxes.double().split(2, -1)
    if name == "XYXY":
        return torch.cat([first, second], -1)
    start = first - second / 2 if name == "CXCYWH" else first
    return torch.cat([start, start + second], -1)


def from_corners(corners: Tensor, box_format: str, dtype: torch.dtype) -> Tensor:
    """Convert corners to boxes in one of `FORMATS`; integers are rounded half to even."""
    start, stop = corners.split(2, -1)
    name = str(getattr(box_format, "name", box_format)).upper()
    first = (start + stop) / 2 if name == "CXCYWH" else start
    out = torch.cat([first, stop if name == "XYXY" else stop - start], -1)
    return out.to(dtype) if dtype.is_floating_point else out.round().to(dtype)


def pack(boxes: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Convert `BoundingBoxes` of several samples to corners [B, N, 4], padded with zeros, and their canvas sizes.

    Raises:
        TypeError: For other types.
        ValueError: For rotated formats.
    """
    corners = [to_corners(_plain("boxes", box, "BoundingBoxes"), _format_of(box)) for box in boxes]
    packed = pad_sequence(corners, batch_first=True) if corners else torch.zeros(0, 0, 4, dtype=torch.float64)
    return packed, [box.canvas_size for box in boxes]  # type: ignore[attr-defined]


def _format_of(boxes: Tensor) -> str:
    if not hasattr(boxes, "format"):
        kind = type(boxes).__name__
        raise TypeError(
            f"boxes in a sequence must be tv_tensors.BoundingBoxes, got {kind}; pad plain boxes to [B, N, 4]"
        )
    return str(boxes.format.name)


def unpack(corners: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    """Convert corners [B, N, 4] back to the class, number, format and dtype of the boxes that were packed."""
    parts = zip(corners, boxes, strict=True)
    return [_like(from_corners(c[: len(box)], _format_of(box), box.dtype), box) for c, box in parts]


def _move(stages: Sequence[Stage], corners: Tensor, keys: Tensor, canvas: Size) -> tuple[Tensor, Tensor]:
    _check_batch("boxes", corners, keys)
    for stage in stages:
        corners = settle(corners, _moved_corners(stage, corners, keys, canvas), canvas)
    return corners, _is_sane(corners, canvas)


def _is_sane(corners: Tensor, canvas: Size) -> Tensor:
    start, stop = corners.split(2, -1)
    inside = (start >= 0).all(-1) & (stop[..., 0] <= canvas[1]) & (stop[..., 1] <= canvas[0])
    return inside & (stop - start >= 1).all(-1)


def settle(before: Tensor, after: Tensor, canvas: Size) -> Tensor:
    """Clamp moved corners to the canvas; a box without an area is not moved."""
    height, width = canvas
    x, y = after[..., 0::2].clamp(0, width), after[..., 1::2].clamp(0, height)
    clamped = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
    return torch.where((before[..., 2:] > before[..., :2]).all(-1, keepdim=True), clamped, before)


def _moved_corners(stage: Stage, corners: Tensor, keys: Tensor, canvas: Size) -> Tensor:
    if isinstance(stage, RandomCrop):
        return _shift(corners, stage.plan(keys), stage.padding)
    if isinstance(stage, RandomHorizontalFlip):
        return _mirror(corners, stage.plan(keys), canvas)
    assert isinstance(stage, TrivialAugment)
    return warp_corners(stage, corners, stage.plan(keys), canvas)


def _shift(corners: Tensor, plan: CropPlan, padding: int) -> Tensor:
    start = torch.stack([plan.left, plan.top, plan.left, plan.top], 1) - padding
    return corners - start.unsqueeze(1)


def _mirror(corners: Tensor, plan: FlipPlan, canvas: Size) -> Tensor:
    x1, y1, x2, y2 = corners.unbind(-1)
    mirrored = torch.stack([canvas[1] - x2, y1, canvas[1] - x1, y2], -1)
    return torch.where(plan.flip.view(-1, 1, 1), mirrored, corners)


def warp_corners(trivial: TrivialAugment, corners: Tensor, plan: TrivialAugmentPlan, canvas: Size) -> Tensor:
    """The upright boxes around corners [B, N, 4] after the shears, translations and rotations of a plan."""
    height, width = canvas
    # The table maps output to input coordinates, about the centre; here it is inverted.
    a, b, c, d, p, q, u, v = (t.view(-1, 1, 1) for t in _matrices(trivial, plan).unbind(1))
    x1, y1, x2, y2 = corners.unbind(-1)
    x = torch.stack([x1, x2, x2, x1], -1) - width / 2 - (p * (height / 2) - u)
    y = torch.stack([y1, y1, y2, y2], -1) - height / 2 - (q * (width / 2) - v)
    determinant = a * d - b * c
    moved_x = (d * x - b * y) / determinant + width / 2
    moved_y = (a * y - c * x) / determinant + height / 2
    return torch.stack([moved_x.amin(-1), moved_y.amin(-1), moved_x.amax(-1), moved_y.amax(-1)], -1)
