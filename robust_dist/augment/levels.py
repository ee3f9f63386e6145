"""Brightness to Equalize on 8-bit levels, with the rounding of torchvision's uint8 kernels.

In float64 a product of two float32 values is exact, and so is its sum with a third here: casting it to float32 rounds
once, like a fused multiply-add. Where two roundings are needed, a cast in between prevents the compiler from fusing.

Suffixes: B samples, C channels, H and W pixels.
"""

from functools import lru_cache

import torch
from torch import Tensor

from robust_dist.augment.checks import readable

_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114


@lru_cache(maxsize=1)
def _addcmul_is_fused() -> bool:
    """Whether `addcmul` rounds once on this processor, as with AVX2, AVX-512 and NEON."""
    a, c = (torch.full((37,), value, dtype=torch.float32, device="cpu") for value in (1 + 2**-12, -1 - 2**-11))
    return bool((torch.addcmul(c, a, a) == 2.0**-24).all())


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a b + c, rounded once; c has the full shape, all are float32."""
    if readable(c) and _addcmul_is_fused():
        return torch.addcmul(c, a, b)
    return (a.double() * b.double() + c.double()).float()


def divide(a: Tensor, b: Tensor) -> Tensor:
    """float32 a / b, rounded once; some compilers approximate the float32 quotient."""
    if readable(a):
        return a / b
    return (a.double() / b.double()).float()


def to_levels(x: Tensor) -> Tensor:
    """Clamp and truncate to uint8 like torchvision's cast; modifies `x`."""
    return x.clamp_(0, 255).to(torch.uint8)


def luma(images: Tensor) -> Tensor:
    """Integer grey levels, float32 [B, 1, H, W]; grey images darken by one level, as the weights sum to 0.9999."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, 1)
    partial = multiply_add(green, green.new_full((1,), _GREEN), red * _RED)
    return multiply_add(blue, blue.new_full((1,), _BLUE), partial).floor_()


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend uint8 [B, C, H, W] with its grey version; factors are rows of `factor_table` [B, 2]."""
    if images.shape[1] == 1:
        return images
    f, rest = factors.view(-1, 2, 1, 1, 1).unbind(1)
    return to_levels(multiply_add(luma(images), rest, images * f))


def _blurred(images: Tensor) -> Tensor:
    """Rounded means over 3 x 3 pixels, the middle one weighted five times: float32 [B, C, H - 2, W - 2]."""
    x = images.to(torch.int16)
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[..., 1:-1, 1:-1]
    return (total.float() * (1 / 13)).round_()


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend the inner pixels of uint8 [B, C, H, W] with their blurred version; factors [B, 2]."""
    if images.shape[2] <= 2 or images.shape[3] <= 2:
        return images
    inner = images[..., 1:-1, 1:-1].float()
    rest = factors[:, 1].view(-1, 1, 1, 1)
    out = images.clone()
    out[..., 1:-1, 1:-1] = to_levels(multiply_add(_blurred(images) - inner, rest, inner))
    return out


def _ramp(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=device)


def contrast_lut(images: Tensor, factors: Tensor) -> Tensor:
    """uint8 [B, C, 256]: a blend with the mean grey level.

    torchvision's float32 sum of the levels is exact up to 65,793 pixels; ours is exact for any image.
    """
    pixels = images.shape[2] * images.shape[3]
    mean = (luma(images).sum((1, 2, 3), dtype=torch.float64) / pixels).float().unsqueeze(1)
    f, rest = factors.unsqueeze(2).unbind(1)
    lut = to_levels(multiply_add(mean, rest, _ramp(images.device) * f))
    return lut.unsqueeze(1).expand(-1, images.shape[1], -1)


def autocontrast_lut(images: Tensor) -> Tensor:
    """uint8 [B, C, 256]: each channel's range stretched to 0 to 255; a constant channel is unchanged."""
    flat = images.flatten(2)
    low, high = (t.unsqueeze(2).float() for t in (flat.amin(2), flat.amax(2)))
    scale = (high - low) * (1 / 255)
    ramp = _ramp(images.device)
    stretched = to_levels(divide(ramp - low, torch.where(scale > 0, scale, 1.0)))
    return torch.where(high > low, stretched, ramp.to(torch.uint8))


def _histogram(images: Tensor) -> Tensor:
    """int32 [B, C, 256]; on a device as one flat sum, which has a deterministic version."""
    flat = images.flatten(2).long()
    batch, channels = images.shape[:2]
    counts = torch.zeros(batch, channels, 256, dtype=torch.int32, device=images.device)
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    if images.device.type == "cpu":
        return counts.scatter_add_(2, flat, one.expand_as(flat))
    row = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
    index = (flat + 256 * row).flatten()
    return counts.flatten().scatter_add_(0, index, one.expand_as(index)).view(batch, channels, 256)


def equalize_lut(images: Tensor) -> Tensor:
    """uint8 [B, C, 256]: each channel's histogram equalized by Pillow's rule; the identity below 256 pixels."""
    cumulative = _histogram(images).double().cumsum(2)
    pixels = images.shape[2] * images.shape[3]
    step = (cumulative.masked_fill(cumulative == pixels, 0).amax(2, keepdim=True) / 255).floor_()
    spread = (cumulative + (step / 2).floor_()).div_(step.clamp(min=1)).floor_()
    spread = torch.cat([torch.zeros_like(step), spread[..., :-1]], 2)
    return torch.where(step > 0, to_levels(spread), _ramp(images.device).to(torch.uint8))


def look_up(images: Tensor, lut: Tensor) -> Tensor:
    """Replace each level of uint8 [B, C, H, W] by its entry in lut [B, C, 256]."""
    return lut.gather(2, images.flatten(2).long()).view_as(images)
