"""Bounding boxes that follow their images: the same crop, mirror image and warp, by the same keys.

Suffixes: B samples, N boxes a sample. Corners are x1, y1, x2, y2 in pixels, with the edges of pixels at whole numbers;
they are float64 until they are given back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from robust_dist.augment.crop_flip import CropPlan, FlipPlan, RandomCrop, RandomHorizontalFlip
from robust_dist.augment.cutmix import CutMix
from robust_dist.augment.follow import check_batch, like, matrices, plain, stages_of
from robust_dist.augment.layout import Stage
from robust_dist.augment.pipeline import RobustAugment
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

FORMATS = ("XYXY", "XYWH", "CXCYWH")
Size = tuple[int, int]


def augment_boxes(
    augment: RobustAugment | Stage,
    boxes: Tensor | Sequence[Tensor],
    keys: Tensor,
    *,
    box_format: str = "XYXY",
    canvas_size: Size | None = None,
) -> tuple[Any, Any]:
    """Move boxes as `augment(images, labels, keys)` moves the images of the same keys.

    A box becomes the smallest upright one around its four moved corners, clamped to the image, as in torchvision.
    Boxes keep their number and order, so that labels stay with them. One that leaves the image, or came without an
    area, is never given one again; `keep` marks the others by the rule of torchvision's SanitizeBoundingBoxes: inside
    the image, and at least a pixel wide and high.

    Args:
        augment: The module that augments the images, or one of its stages; without CutMix, under which an object may be
            half covered.
        boxes: A padded tensor [B, N, 4], its empty rows zeros; or a sequence of B `tv_tensors.BoundingBoxes` [N_i, 4].
            Floating or integer; integers come back rounded. On the keys' device.
        keys: The images' keys, int64 [B].
        box_format: Of a padded tensor: "XYXY", "XYWH" or "CXCYWH". Each `BoundingBoxes` brings its own.
        canvas_size: The images' (height, width), where neither `augment` nor the boxes name it.

    Returns:
        New boxes of the same class, shape, format and dtype; and which of them to keep, bool [B, N] or a list of
        bool [N_i].

    Raises:
        TypeError: For key points, videos and other types.
        ValueError: For rotated boxes, CutMix, and wrong shapes, formats or sizes.
    """
    stages = _without_cutmix(augment)
    if isinstance(boxes, Tensor):
        tensor = plain("boxes", boxes, "Tensor")
        if tensor.dim() != 3:
            raise ValueError(f"padded boxes must have shape [B, N, 4], got {list(tensor.shape)}")
        canvas = _canvas(augment, [] if canvas_size is None else [canvas_size])
        corners, keep = _move(stages, to_corners(tensor, box_format), keys, canvas)
        return from_corners(corners, box_format, tensor.dtype), keep
    packed, canvases = pack(boxes)
    corners, keep = _move(stages, packed, keys, _canvas(augment, canvases))
    return unpack(corners, boxes), [k[: len(box)] for k, box in zip(keep, boxes, strict=True)]


def _without_cutmix(augment: RobustAugment | Stage) -> list[Stage]:
    stages = stages_of(augment)
    if any(isinstance(stage, CutMix) for stage in stages):
        raise ValueError(
            "boxes cannot follow CutMix, which covers objects in part: set cutmix=False for the images of these boxes"
        )
    return stages


def _canvas(augment: RobustAugment | Stage, named: Sequence[Size]) -> Size:
    sizes = {tuple(size) for size in named} | ({augment.size} if isinstance(augment, RobustAugment) else set())
    if len(sizes) != 1:
        hint = "name it by canvas_size" if not sizes else f"got {sorted(sizes)}"
        raise ValueError(f"boxes of one batch must have one canvas_size (height, width), that of its images: {hint}")
    height, width = next(iter(sizes))
    return int(height), int(width)


def to_corners(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes [..., N, 4] in one of `FORMATS` to corners, float64.

    Raises:
        TypeError: For bool and complex boxes.
        ValueError: For rotated or unknown formats and wrong shapes.
    """
    name = str(getattr(box_format, "name", box_format)).upper()
    if name not in FORMATS:
        raise ValueError(f"box_format must be one of {', '.join(FORMATS)}, got {name}: rotated boxes are not supported")
    if boxes.dim() < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, N, 4], or [N, 4] each, got {list(boxes.shape)}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"boxes must be floating or integers, got {boxes.dtype}")
    first, second = boxes.double().split(2, -1)
    if name == "XYXY":
        return torch.cat([first, second], -1)
    start = first - second / 2 if name == "CXCYWH" else first
    return torch.cat([start, start + second], -1)


def from_corners(corners: Tensor, box_format: str, dtype: torch.dtype) -> Tensor:
    """Corners to boxes in one of `FORMATS`; integers are rounded, half to even."""
    start, stop = corners.split(2, -1)
    name = str(getattr(box_format, "name", box_format)).upper()
    first = (start + stop) / 2 if name == "CXCYWH" else start
    out = torch.cat([first, stop if name == "XYXY" else stop - start], -1)
    return out.to(dtype) if dtype.is_floating_point else out.round().to(dtype)


def pack(boxes: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """`BoundingBoxes` of several samples as corners [B, N, 4], padded with zeros, and the canvas of each.

    Raises:
        TypeError: For other types.
        ValueError: For rotated formats.
    """
    corners = [to_corners(plain("boxes", box, "BoundingBoxes"), _format_of(box)) for box in boxes]
    packed = pad_sequence(corners, batch_first=True) if corners else torch.zeros(0, 0, 4, dtype=torch.float64)
    return packed, [box.canvas_size for box in boxes]  # type: ignore[attr-defined]


def _format_of(boxes: Tensor) -> str:
    if not hasattr(boxes, "format"):
        kind = type(boxes).__name__
        raise TypeError(f"boxes in a sequence must be tv_tensors.BoundingBoxes, got {kind}; plain ones are padded")
    return str(boxes.format.name)


def unpack(corners: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    """Corners [B, N, 4] in the class, number, format and dtype of the boxes that were packed."""
    parts = zip(corners, boxes, strict=True)
    return [like(from_corners(c[: len(box)], _format_of(box), box.dtype), box) for c, box in parts]


def _move(stages: Sequence[Stage], corners: Tensor, keys: Tensor, canvas: Size) -> tuple[Tensor, Tensor]:
    check_batch("boxes", corners, keys)
    for stage in stages:
        corners = settle(corners, _follow(stage, corners, keys, canvas), canvas)
    return corners, _is_sane(corners, canvas)


def _is_sane(corners: Tensor, canvas: Size) -> Tensor:
    start, stop = corners.split(2, -1)
    inside = (start >= 0).all(-1) & (stop[..., 0] <= canvas[1]) & (stop[..., 1] <= canvas[0])
    return inside & (stop - start >= 1).all(-1)


def settle(before: Tensor, after: Tensor, canvas: Size) -> Tensor:
    """Moved corners, clamped to the canvas; a box without an area stays as it was."""
    height, width = canvas
    x, y = after[..., 0::2].clamp(0, width), after[..., 1::2].clamp(0, height)
    clamped = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
    return torch.where((before[..., 2:] > before[..., :2]).all(-1, keepdim=True), clamped, before)


def _follow(stage: Stage, corners: Tensor, keys: Tensor, canvas: Size) -> Tensor:
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
    # The table maps what comes out to what goes in, about the centre; here it is inverted.
    a, b, c, d, p, q, u, v = (t.view(-1, 1, 1) for t in matrices(trivial, plan).unbind(1))
    x1, y1, x2, y2 = corners.unbind(-1)
    x = torch.stack([x1, x2, x2, x1], -1) - width / 2 - (p * (height / 2) - u)
    y = torch.stack([y1, y1, y2, y2], -1) - height / 2 - (q * (width / 2) - v)
    determinant = a * d - b * c
    moved_x = (d * x - b * y) / determinant + width / 2
    moved_y = (a * y - c * x) / determinant + height / 2
    return torch.stack([moved_x.amin(-1), moved_y.amin(-1), moved_x.amax(-1), moved_y.amax(-1)], -1)
