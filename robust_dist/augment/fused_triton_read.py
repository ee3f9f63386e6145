"""Triton functions of pixels: reading through crop and flip, and the roundings of `levels.py` and `warp.py`."""

import triton
import triton.language as tl

_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
_HALF_EVEN = tl.constexpr(1.5 * 2**23)


@triton.jit
def level(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    CROP_FILL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """int32 levels at column x and row y of the cropped and mirrored images, whose first pixels `images` points to."""
    column, row = across + step * x, down + y
    stored = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    place = row * row_stride + column * column_stride
    return tl.load(images + place, mask & stored, other=CROP_FILL).to(tl.int32)


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
