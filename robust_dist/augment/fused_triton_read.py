"""Triton functions of pixels: reading through crop and flip, and the roundings of `levels.py` and `warp.py`."""

import triton
import triton.language as tl

_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
_HALF_EVEN = tl.constexpr(1.5 * 2**23)


@triton.jit
def spot(
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """Where column x and row y of the cropped and mirrored images are stored, int32, and whether they are at all."""
    column, row = across + step * x, down + y
    stored = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return row * row_stride + column * column_stride, stored


@triton.jit
def channels(
    images: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    channel_stride: tl.tensor,
    C: tl.constexpr,
    CROP_FILL: tl.constexpr,
) -> tl.tensor:
    """int32 levels of three channels, or of one, thrice; CROP_FILL where the mask is off."""
    red = tl.load(images + place, mask, other=CROP_FILL).to(tl.int32)
    green, blue = red, red
    if C == 3:
        green = tl.load(images + channel_stride + place, mask, other=CROP_FILL).to(tl.int32)
        blue = tl.load(images + 2 * channel_stride + place, mask, other=CROP_FILL).to(tl.int32)
    return red, green, blue


@triton.jit
def luma(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """Whole grey levels, float32, of int32 ones."""
    partial = tl.fma(green.to(tl.float32), _GREEN, red.to(tl.float32) * _RED)
    return tl.floor(tl.fma(blue.to(tl.float32), _BLUE, partial))


@triton.jit
def to_levels(x: tl.tensor) -> tl.tensor:
    """int32: clamped and truncated."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """float32 below 2**22 to the nearest whole number, half to even: the sum has no place for a fraction."""
    return (x + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def pick(own: tl.tensor, other: tl.tensor, inside: tl.tensor, column: tl.constexpr) -> tl.tensor:
    """A value of two samples' rows, chosen for each lane."""
    return tl.where(inside, tl.load(other + column), tl.load(own + column))
