"""Triton functions of pixels: reading through crop and flip, and the roundings of `levels.py` and `warp.py`.

Pixels of a pass are a block [4, quads], four neighbours of a row to a thread; what a row has in common is [1, quads].
Strides of an image's channels, rows and columns are compiled in, so that a load is an address and nothing else.
"""

import triton
import triton.language as tl

_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
_HALF_EVEN = tl.constexpr(1.5 * 2**23)
_HALF_EVEN_BITS = tl.constexpr(0x4B400000)


@triton.jit
def read(
    images: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    mask: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
) -> tl.tensor:
    """int32 levels of the channels at places of the stored images; CROP_FILL outside and where the mask is off."""
    if CROPPED:
        mask = mask & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return channels(images + (row * ROW + column * COLUMN), mask, C, CHANNEL, CROP_FILL)


@triton.jit
def channels(
    pixel: tl.tensor, mask: tl.tensor, C: tl.constexpr, CHANNEL: tl.constexpr, CROP_FILL: tl.constexpr
) -> tl.tensor:
    """int32 levels of three channels, or of one, thrice; CROP_FILL where the mask is off."""
    red = tl.load(pixel, mask, other=CROP_FILL).to(tl.int32)
    green, blue = red, red
    if C == 3:
        green = tl.load(pixel + CHANNEL, mask, other=CROP_FILL).to(tl.int32)
        blue = tl.load(pixel + 2 * CHANNEL, mask, other=CROP_FILL).to(tl.int32)
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
def nearest(x: tl.tensor) -> tl.tensor:
    """`rounded` as int32: the last bits of the sum are the number."""
    return (x + _HALF_EVEN).to(tl.int32, bitcast=True) - _HALF_EVEN_BITS
