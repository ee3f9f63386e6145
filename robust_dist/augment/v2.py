"""`TrivialAugmentWide` and `CutMix` for a `torchvision.transforms.v2.Compose`: torchvision's API, a draw per sample.

Both replace torchvision's classes by changing only the import. Draws come from torch's default generator, as in
torchvision; `TrivialAugment` and `CutMix` of `robust_dist` make keyed draws. Needs torchvision.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from robust_dist.augment import cutmix as mixing
from robust_dist.augment.checks import readable, validate_labels
from robust_dist.augment.cutmix import CutMixPlan, soft_targets
from robust_dist.augment.follow import (
    check_masks,
    pack,
    paste,
    paste_masks,
    restore,
    settle,
    unpack,
    warp_corners,
    warp_masks,
)
from robust_dist.augment.keys import random_keys
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

__all__ = ["CutMix", "TrivialAugmentWide"]

_MODES = ("L", "RGB")
_INTERPOLATIONS = {"nearest": "nearest", "bilinear": "bilinear", 0: "nearest", 2: "bilinear"}


@dataclass(frozen=True)
class _Pixels:
    """The pixels of one image, of a batch of them, or of videos.

    Attributes:
        images: uint8 or floating-point [B T, C, H, W], the frames of a video one after the other.
        lead: The dimensions before those of one image or video, with B samples; () for a single one.
        frames: T, the frames of a video; 1 for an image.
    """

    images: Tensor
    lead: tuple[int, ...]
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def batch(self) -> int:
        """B, the number of images or videos."""
        return self.images.shape[0] // max(self.frames, 1)


def _is_pixels(value: Any) -> bool:
    """Whether torchvision treats a value as an image or a video."""
    return isinstance(value, (tv_tensors.Image, tv_tensors.Video, PIL.Image.Image)) or (
        isinstance(value, Tensor) and not isinstance(value, tv_tensors.TVTensor)
    )


def _read(value: Any) -> _Pixels:
    """The pixels of an image or video.

    Raises:
        ValueError: For PIL images in modes other than L and RGB, and for tensors with too few dimensions.
    """
    if isinstance(value, PIL.Image.Image):
        if value.mode not in _MODES:
            raise ValueError(
                f"PIL images must have one of the modes {', '.join(_MODES)}, got {value.mode}: convert them"
            )
        return _Pixels(F.pil_to_tensor(value).unsqueeze(0), (), 1)
    tensor, dims = value.as_subclass(Tensor), 4 if isinstance(value, tv_tensors.Video) else 3
    if tensor.dim() < dims:
        raise ValueError(f"{type(value).__name__} must have at least {dims} dimensions, got {list(tensor.shape)}")
    frames = tensor.shape[-4] if dims == 4 else 1
    return _Pixels(tensor.reshape(-1, *tensor.shape[-3:]), tuple(tensor.shape[:-dims]), frames)


def _write(images: Tensor, value: Any) -> Any:
    """Convert new pixels to the class, shape and dtype of the image or video that was read."""
    if isinstance(value, PIL.Image.Image):
        return F.to_pil_image(images.squeeze(0))
    out = images.reshape(value.shape)
    return tv_tensors.wrap(out, like=value) if isinstance(value, tv_tensors.TVTensor) else out


def _device_of(value: Any) -> torch.device:
    """The device of an image; PIL images are on the CPU."""
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


class _HeldMask(tv_tensors.TVTensor):
    """A mask inside torchvision's `forward`, which rejects `tv_tensors.Mask`."""


class CutMix(v2.CutMix):
    """torchvision's CutMix with a box and a partner for every sample, also for integer masks.

    Differences from torchvision: each sample draws its own box, and a partner other than itself in its block of
    the batch; mode="batch" uses one box per batch, like torchvision. Integer masks [B, H, W] or [B, 1, H, W] get the
    same boxes. Bounding boxes, key points and floating-point masks are rejected: an object may be partly covered.

    Args:
        alpha: Parameter of the Beta distribution, above 0.
        num_classes: Number of classes C; not needed for soft labels.
        labels_getter: Finds the labels in the sample, as in torchvision.
        p: See `robust_dist.CutMix`.
        mode: See `robust_dist.CutMix`.
        block: See `robust_dist.CutMix`.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range; in a call, for inputs that cannot be mixed and labels that do not match
            the images.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        num_classes: int | None = None,
        labels_getter: Callable[[Any], Any] | str | None = "default",
        p: float = 1.0,
        mode: str = "elem",
        block: int = 8,
    ) -> None:
        super().__init__(alpha=alpha, num_classes=num_classes, labels_getter=labels_getter)
        self.mixing = mixing.CutMix(num_classes or 1, alpha=alpha, p=p, mode=mode, block=block)

    def forward(self, *inputs: Any) -> Any:
        """Mix a batch: images and labels as two arguments, or any structure that holds them.

        Returns:
            The same structure, with soft labels, float32 [B, C].
        """
        return super().forward(tree_map(self._hold, inputs if len(inputs) > 1 else inputs[0]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the images among the transformed leaves of a batch."""
        images = next((leaf for leaf in flat_inputs if _is_pixels(leaf)), None)
        if images is None:
            raise TypeError(f"{type(self).__name__}() found no images in the batch")
        keys = random_keys(images.shape[0], device=images.device)
        return {"plan": self.mixing.plan(keys, images.shape[-2], images.shape[-1])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Transform one leaf of the batch with the draws of `make_params`."""
        plan, is_labels = params["plan"], inpt is params["labels"]
        if not is_labels and not isinstance(inpt, _HeldMask):
            return self._paste_images(inpt, plan, params["batch_size"])
        if inpt.shape[0] != plan.partner.shape[0]:
            raise ValueError(
                f"there must be as many masks and labels as images, {plan.partner.shape[0]}, got {inpt.shape[0]}"
            )
        if is_labels:
            return self._mix_labels(inpt, plan)
        mask = inpt.as_subclass(tv_tensors.Mask)
        return restore(paste_masks(self.mixing, check_masks(mask, 0), plan), mask)

    def _hold(self, leaf: Any) -> Any:
        if not isinstance(leaf, tv_tensors.Mask):
            return leaf
        if leaf.is_floating_point():
            name = type(self).__name__
            raise ValueError(f"{name}() does not support PIL images, bounding boxes, keypoints or floating-point masks")
        return leaf.as_subclass(_HeldMask)

    def _mix_labels(self, labels: Tensor, plan: CutMixPlan) -> Tensor:
        other = labels.index_select(0, plan.partner)
        if labels.dim() == 2:
            lam = plan.lam.unsqueeze(1)
            return torch.lerp(other.float(), labels.float(), lam)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels of shape (batch_size,) must be integer class numbers, got {labels.dtype}")
        if readable(labels):
            validate_labels(labels, self.mixing.num_classes)
        return soft_targets(labels, self.mixing.num_classes, other, plan.lam)

    def _paste_images(self, images: Tensor, plan: CutMixPlan, batch: int) -> Tensor:
        dims = 5 if isinstance(images, tv_tensors.Video) else 4
        if images.dim() != dims:
            raise ValueError(f"Expected a batched input with {dims} dims, but got {images.dim()} dimensions instead.")
        if images.shape[0] != batch:
            raise ValueError(
                f"The batch size of the images does not match the batch size of the labels: {images.shape[0]}"
            )
        flat = images.as_subclass(Tensor).flatten(1, -3)
        out = paste(self.mixing, flat, plan).reshape(images.shape)
        return tv_tensors.wrap(out, like=images) if isinstance(images, tv_tensors.TVTensor) else out


@lru_cache(maxsize=32)
def _operations(num_bins: int, interpolation: str, fill: tuple[float, ...], device: torch.device) -> TrivialAugment:
    return TrivialAugment(num_bins=num_bins, interpolation=interpolation, fill=fill).to(device)


@dataclass(frozen=True, eq=False)
class _Call:
    """The draws of one call: a plan for B samples, and the moved boxes by the `id` of the original ones."""

    pixels: _Pixels
    plan: TrivialAugmentPlan
    boxes: dict[int, Tensor]


class TrivialAugmentWide(v2.TrivialAugmentWide):
    """torchvision's TrivialAugmentWide with a draw for every image of a batch, also for masks and boxes.

    A uint8 tensor gets the pixels of torchvision's tensor kernels. Differences from torchvision:
        - a batch [..., C, H, W] draws for each image, where torchvision draws once; a `tv_tensors.Video` draws once for
          its frames;
        - `tv_tensors.Mask` and `BoundingBoxes` follow the warps: with one image all of them belong to it; with a batch
          a mask is [B, ..., H, W], and there are B `BoundingBoxes`, in order. Boxes that leave the image lose their
          area: apply SanitizeBoundingBoxes afterwards;
        - a PIL image gets the tensor kernels' pixels, not Pillow's; a floating-point one in [0, 1] is rounded to 256
          levels;
        - with bilinear interpolation a fill is not blended twice at borders.
    Under `torch.jit.script` it is torchvision's own version-1 transform.

    Args:
        num_magnitude_bins: Number of magnitudes, from none to the largest, at least 2.
        interpolation: "nearest" or "bilinear", as a string, an InterpolationMode or Pillow's number.
        fill: Value outside the image, in its own units (0 to 255, or 0 to 1 for floating-point images): None, a number,
            one per channel, or a dict of them by type, with "others" for the rest; for masks an integer. Values between
            two levels are rounded, as in torchvision.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range; in a call, for masks and boxes that do not match the images, and for
            floating-point images with a fill above 1.
    """

    def __init__(
        self, num_magnitude_bins: int = 31, interpolation: str | int | Any = "nearest", fill: Any = None
    ) -> None:
        name = getattr(interpolation, "value", interpolation)
        if name not in _INTERPOLATIONS:
            raise ValueError(f'interpolation must be "nearest" or "bilinear", got {interpolation!r}')
        mode = _INTERPOLATIONS[name]
        for kind, levels in (fill if isinstance(fill, dict) else {"others": fill}).items():
            _check_fill(kind, levels)
        try:
            super().__init__(num_magnitude_bins=num_magnitude_bins, interpolation=interpolation, fill=fill)
        except ValueError:  # older torchvision does not accept names
            named = v2.InterpolationMode(mode)
            super().__init__(num_magnitude_bins=num_magnitude_bins, interpolation=named, fill=fill)
        self._mode = mode
        self._module(torch.device("cpu"), (0,))

    def forward(self, *inputs: Any) -> Any:
        """Transform one sample: an image or batch, or any structure that contains one."""
        return v2.Transform.forward(self, *inputs)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the only image or batch among the transformed leaves of a sample."""
        images = [leaf for leaf in flat_inputs if _is_pixels(leaf)]
        if len(images) != 1:
            raise TypeError(f"{type(self).__name__}() needs exactly one image, batch or video, got {len(images)}")
        pixels = _read(images[0])
        module = self._module(_device_of(images[0]), (0,))
        plan = module.plan(random_keys(pixels.batch, device=pixels.images.device))
        boxes = [leaf for leaf in flat_inputs if isinstance(leaf, tv_tensors.BoundingBoxes)]
        return {"call": _Call(pixels, plan, _move_boxes(module, plan, pixels, boxes))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Transform one leaf of the sample with the draws of `make_params`."""
        call = params["call"]
        if _is_pixels(inpt):
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
        return _write(self._module(images.device, levels).apply(images, plan), value)

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
    """Raise for an invalid fill of images or masks."""
    if fill is None:
        return
    if isinstance(kind, type) and issubclass(kind, tv_tensors.Mask):
        return _check_mask_fill(fill)
    values = fill if isinstance(fill, (list, tuple)) else [fill]
    if len(values) not in (1, 3) or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise TypeError(f"fill must be a number, or one per channel (1 or 3), got {fill!r}")
    if not all(0 <= v <= 255 for v in values):
        raise ValueError(f"fill must be in [0, 255], or in [0, 1] for floating-point images, got {fill!r}")


def _check_mask_fill(fill: Any) -> None:
    if isinstance(fill, bool) or not isinstance(fill, numbers.Real) or not float(fill).is_integer():
        raise TypeError(f"fill of masks must be an integer, got {fill!r}: pass fill={{tv_tensors.Mask: ...}}")


def _levels(fill: Any, *, floating: bool) -> tuple[int, ...]:
    """A fill in an image's own units as integer levels, rounded in torchvision's precision."""
    values = torch.tensor(fill if isinstance(fill, (list, tuple)) else [fill or 0], dtype=torch.float32)
    if floating and values.max() > 1:
        raise ValueError(f"fill of floating-point images must be in [0, 1], like their values, got {fill!r}")
    return tuple(int(level) for level in (values * 255 if floating else values).round().tolist())


def _changed(plan: TrivialAugmentPlan, change: Callable[[Tensor], Tensor]) -> TrivialAugmentPlan:
    return TrivialAugmentPlan(change(plan.op), change(plan.magnitude_bin), change(plan.negative))


def _move_boxes(
    module: TrivialAugment, plan: TrivialAugmentPlan, pixels: _Pixels, boxes: Sequence[Tensor]
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
