"""Memory formats, selection between images, conversion to 256 levels, and constants that `.to(dtype)` leaves exact."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from robust_dist.augment.checks import check_images, check_vector, readable
from robust_dist.augment.keys import random_keys

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def memory_format(images: Tensor) -> torch.memory_format:
    """channels_last for images that are channels_last but not contiguous, else contiguous_format."""
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def select(images: Tensor, index: Tensor) -> Tensor:
    """images[index] in the images' memory format; index is int64 [B]."""
    return images.index_select(0, index).contiguous(memory_format=memory_format(images))


def choose(masks: Sequence[Tensor], on: Tensor, off: Tensor) -> Tensor:
    """`on` where all masks are true, else `off`, for masks that broadcast to [B, 1, H, W]; may overwrite `on`.

    On the CPU it uses bitwise operations: `torch.where` on uint8 takes a hundred times as long.
    """
    if not readable(on) or on.requires_grad:
        return torch.where(reduce(torch.bitwise_and, masks), on, off)
    own = _BITS[on.element_size()]
    lane = torch.int64 if _has_lanes(on) and _has_lanes(off) else own
    mask = reduce(torch.bitwise_and, (_stretched(m, own, lane) for m in masks))
    chosen, other = on.view(lane), off.view(lane)
    return chosen.bitwise_xor_(other).bitwise_and_(mask).bitwise_xor_(other).view(on.dtype)


def _has_lanes(images: Tensor) -> bool:
    """Whether images can be viewed as 8-byte words: every row and every stride is a multiple of 8 bytes."""
    steps = images.shape[-1], images.storage_offset(), *images.stride()[:-1]
    whole = all(step * images.element_size() % 8 == 0 for step in steps)
    return bool(images.is_contiguous() and images.stride(-1) == 1 and whole)


def _stretched(mask: Tensor, own: torch.dtype, lane: torch.dtype) -> Tensor:
    """A boolean mask as words of all ones or all zeros, as many per row as the images have."""
    if mask.shape[-1] == 1:
        return mask.to(lane).neg_()
    return mask.to(own, memory_format=torch.contiguous_format).neg_().view(lane)


def to_grid(images: Tensor) -> Tensor:
    """Round floating-point images in [0, 1] to the nearest of 256 levels, uint8; return uint8 images unchanged.

    Raises:
        ValueError: On the CPU, uncompiled, for values outside [0, 1] or not finite. Elsewhere a check would
            synchronise: values are clamped, and NaN becomes 0.
    """
    if images.dtype == torch.uint8:
        return images
    if readable(images) and images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise ValueError(f"floating images must be finite and in [0, 1], got {low} to {high}; uint8 takes 0 to 255")
    return images.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_grid(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert 256 levels to floating-point images in [0, 1]; for uint8, return them unchanged."""
    return levels if dtype == torch.uint8 else (levels.float() / 255).to(dtype)


def keep_bits(module: nn.Module, name: str, table: Tensor) -> None:
    """Register a floating-point table as integer bits, which move with the module but never change precision."""
    module.register_buffer(name, table.contiguous().view(_BITS[table.element_size()]), persistent=False)


def bits_of(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table of `keep_bits`, copied to `device` if the module is on another one."""
    return module.get_buffer(name).to(device).view(dtype)


class Stage(nn.Module):
    """A module whose `apply` carries out a plan; called with a function, it is `nn.Module.apply`."""

    def _visit(self, function: object) -> Any:
        return nn.Module.apply(self, cast(Callable[[nn.Module], None], function))


class ImageStage(Stage):
    """A stage that needs only images, with a plan drawn from their keys."""

    plan: Callable[[Tensor], Any]
    _carry_out: Callable[[Tensor, Any], Tensor]

    def apply(self, images: Tensor, plan: Any = None) -> Tensor:  # type: ignore[override]
        """Carry out the plan.

        Args:
            images: uint8 or floating-point, [B, C, H, W].
            plan: The plan for B samples, on the images' device.

        Returns:
            New images of the same shape, dtype and memory format.

        Raises:
            TypeError: For images or plans with a wrong dtype.
            ValueError: For wrong shapes or devices.
        """
        if plan is None:
            return cast(Tensor, self._visit(images))
        check_images(images)
        return self._carry_out(images, plan).contiguous(memory_format=memory_format(images))

    def forward(self, images: Tensor, keys: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`apply(images, plan(keys))`; if no keys are given, they are drawn from the generator."""
        check_images(images)
        keys = random_keys(images.shape[0], generator, images.device) if keys is None else keys
        check_vector("keys", keys, images)
        return self.apply(images, self.plan(keys))
