"""TrivialAugment with torchvision's call: images, batches, videos, PIL images, and their masks and boxes."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from robust_dist.augment.boxes import pack, settle, unpack, warp_corners
from robust_dist.augment.keys import random_keys
from robust_dist.augment.masks import check_masks, restore, warp_masks
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan
from robust_dist.augment.v2.pixels import Pixels, device_of, is_pixels, read, write

_INTERPOLATIONS = {"nearest": "nearest", "bilinear": "bilinear", 0: "nearest", 2: "bilinear"}


@lru_cache(maxsize=32)
def _operations(num_bins: int, interpolation: str, fill: tuple[float, ...], device: torch.device) -> TrivialAugment:
    return TrivialAugment(num_bins=num_bins, interpolation=interpolation, fill=fill).to(device)


@dataclass(frozen=True, eq=False)
class _Call:
    """The draws of one call: a plan for B samples, and their moved boxes by the `id` of the original ones."""

    pixels: Pixels
    plan: TrivialAugmentPlan
    boxes: dict[int, Tensor]


class TrivialAugmentWide(v2.TrivialAugmentWide):
    """torchvision's TrivialAugmentWide with a draw for every image of a batch, for masks and boxes too.

    A uint8 tensor gets the pixels of torchvision's tensor kernels. What differs from torchvision:
        - a batch [..., C, H, W] draws for each image, where torchvision draws once; a `tv_tensors.Video` draws once for
          its frames;
        - `tv_tensors.Mask` and `BoundingBoxes` follow the warps: with one image all of them are its own; with a batch a
          mask is [B, ..., H, W], and there are B `BoundingBoxes`, in order. Boxes that leave the image lose their area:
          put SanitizeBoundingBoxes after;
        - a PIL image gets the tensor kernels' pixels, not Pillow's; a floating one in [0, 1] is rounded to 256 levels;
        - with bilinear interpolation a fill is not blended twice at borders.
    Scripted by `torch.jit` it is torchvision's own transform of version 1.

    Args:
        num_magnitude_bins: Magnitudes from none to the widest, at least 2.
        interpolation: "nearest" or "bilinear", as a string, an InterpolationMode or Pillow's number.
        fill: Outside the image, in its own units (0 to 255, of floating images 0 to 1): None, a number, one for each
            channel, or a dict of them by type with "others" for the rest; for masks one whole number. What lies between
            two levels is rounded, as torchvision does.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range. In a call, for masks and boxes that do not belong to the images, and for
            floating ones with a fill above 1.
    """

    def __init__(
        self, num_magnitude_bins: int = 31, interpolation: str | int | Any = "nearest", fill: Any = None
    ) -> None:
        name = getattr(interpolation, "value", interpolation)
        if name not in _INTERPOLATIONS:
            raise ValueError(f'interpolation must be "nearest" or "bilinear", got {interpolation!r}')
        mode = _INTERPOLATIONS[name]
        for kind, one in (fill if isinstance(fill, dict) else {"others": fill}).items():
            _check_fill(kind, one)
        try:
            super().__init__(num_magnitude_bins=num_magnitude_bins, interpolation=interpolation, fill=fill)
        except ValueError:  # older torchvision takes no names
            named = v2.InterpolationMode(mode)
            super().__init__(num_magnitude_bins=num_magnitude_bins, interpolation=named, fill=fill)
        self._mode = mode
        self._module(torch.device("cpu"), (0,))

    def forward(self, *inputs: Any) -> Any:
        """Transform one sample: an image or batch alone, or any structure that holds one."""
        return v2.Transform.forward(self, *inputs)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the only image or batch among the leaves of a sample that are transformed."""
        images = [leaf for leaf in flat_inputs if is_pixels(leaf)]
        if len(images) != 1:
            raise TypeError(f"{type(self).__name__}() needs exactly one image, batch or video, got {len(images)}")
        pixels = read(images[0])
        module = self._module(device_of(images[0]), (0,))
        plan = module.plan(random_keys(pixels.batch, device=pixels.images.device))
        boxes = [leaf for leaf in flat_inputs if isinstance(leaf, tv_tensors.BoundingBoxes)]
        return {"call": _Call(pixels, plan, _move_boxes(module, plan, pixels, boxes))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One leaf of the sample by what `make_params` drew."""
        call = params["call"]
        if is_pixels(inpt):
            return self._image(inpt, call)
        if isinstance(inpt, tv_tensors.Mask):
            return self._mask(inpt, call)
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return call.boxes[id(inpt)]
        raise TypeError(f"Inputs of type {type(inpt).__name__} are not supported by {type(self).__name__}()")

    def _module(self, device: torch.device, fill: tuple[float, ...]) -> TrivialAugment:
        return _operations(self.num_magnitude_bins, self._mode, fill, device)

    def _fill_of(self, value: Any) -> Any:
        if not isinstance(self.fill, dict):
            return self.fill
        return self.fill.get(type(value), self.fill.get("others"))

    def _image(self, value: Any, call: _Call) -> Any:
        images = call.pixels.images
        levels = _levels(self._fill_of(value), floating=images.is_floating_point())
        plan, frames = call.plan, call.pixels.frames
        if frames != 1:
            plan = _changed(plan, lambda t: t.repeat_interleave(frames))
        return write(self._module(images.device, levels).apply(images, plan), value)

    def _mask(self, mask: Tensor, call: _Call) -> Tensor:
        fill, lead = self._fill_of(mask) or 0, call.pixels.lead
        _check_mask_fill(fill)
        if tuple(mask.shape[: len(lead)]) != lead or tuple(mask.shape[-2:]) != call.pixels.size:
            wanted = ", ".join(map(str, [*lead, "...", *call.pixels.size]))
            raise ValueError(f"masks of these images must have shape [{wanted}], got {list(mask.shape)}")
        objects = math.prod(mask.shape[len(lead) : -2])
        shaped = mask.as_subclass(Tensor).reshape(call.pixels.batch, objects, *call.pixels.size)
        maps = check_masks(shaped, int(fill))
        plan = _changed(call.plan, lambda t: t.to(maps.device))
        return restore(warp_masks(self._module(maps.device, (0,)), maps, plan, int(fill)), mask)


def _check_fill(kind: Any, fill: Any) -> None:
    """Raise for what can be no image's, or no mask's, fill."""
    if fill is None:
        return
    if isinstance(kind, type) and issubclass(kind, tv_tensors.Mask):
        return _check_mask_fill(fill)
    values = fill if isinstance(fill, (list, tuple)) else [fill]
    if len(values) not in (1, 3) or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise TypeError(f"fill must be a number or one for each channel (1 or 3), got {fill!r}")
    if not all(0 <= v <= 255 for v in values):
        raise ValueError(f"fill must lie in [0, 255], and in [0, 1] for floating images, got {fill!r}")


def _check_mask_fill(fill: Any) -> None:
    if isinstance(fill, bool) or not isinstance(fill, numbers.Real) or not float(fill).is_integer():
        raise TypeError(f"fill of masks must be one whole number, got {fill!r}: give fill={{tv_tensors.Mask: ...}}")


def _levels(fill: Any, *, floating: bool) -> tuple[int, ...]:
    """A fill in an image's own units as whole levels, rounded in torchvision's precision."""
    values = torch.tensor(fill if isinstance(fill, (list, tuple)) else [fill or 0], dtype=torch.float32)
    if floating and values.max() > 1:
        raise ValueError(f"fill of floating images must lie in [0, 1], as their values do, got {fill!r}")
    return tuple(int(level) for level in (values * 255 if floating else values).round().tolist())


def _changed(plan: TrivialAugmentPlan, change: Callable[[Tensor], Tensor]) -> TrivialAugmentPlan:
    return TrivialAugmentPlan(change(plan.op), change(plan.magnitude_bin), change(plan.negative))


def _move_boxes(
    module: TrivialAugment, plan: TrivialAugmentPlan, pixels: Pixels, boxes: Sequence[Tensor]
) -> dict[int, Tensor]:
    if not boxes:
        return {}
    corners, canvases = pack(boxes)
    if any(tuple(canvas) != pixels.size for canvas in canvases):
        raise ValueError(f"boxes must have the canvas_size {pixels.size} of their images, got {canvases}")
    if pixels.lead and len(boxes) != pixels.batch:
        raise ValueError(f"a batch of {pixels.batch} images needs as many BoundingBoxes, in order, got {len(boxes)}")
    plan = _changed(plan, lambda t: t.to(corners.device).expand(len(boxes)))
    moved = settle(corners, warp_corners(module, corners, plan, pixels.size), pixels.size)
    return {id(box): out for box, out in zip(boxes, unpack(moved, boxes), strict=True)}
