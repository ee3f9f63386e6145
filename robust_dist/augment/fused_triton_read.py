"""Triton functions that read pixels through crop, flip and warps, with the roundings of `levels.py` and `warp.py`.

The pixels of a pass are a block [4, quads], four neighbours of a row per thread; values shared by a row are [1, quads].
The strides of an image's channels, rows and columns are compile-time constants.
"""

import triton
import triton.language as tl

from robust_dist.augment.tables import OP

_SHEAR, _ROTATE = tl.constexpr(OP["ShearX"]), tl.constexpr(OP["Rotate"])
_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
_HALF_EVEN = tl.constexpr(1.5 * 2**23)
_HALF_EVEN_BITS = tl.constexpr(0x4B400000)
_HALF_EVEN_64 = tl.constexpr(1.5 * 2**52)


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
    """int32 levels of the channels at positions in the stored images; CROP_FILL outside and where the mask is off."""
    if CROPPED:
        mask = mask & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return channels(images + (row * ROW + column * COLUMN), mask, C, CHANNEL, CROP_FILL)


@triton.jit
def channels(
    pixel: tl.tensor, mask: tl.tensor, C: tl.constexpr, CHANNEL: tl.constexpr, CROP_FILL: tl.constexpr
) -> tl.tensor:
    """int32 levels of three channels, or of one, repeated; CROP_FILL where the mask is off."""
    red = tl.load(pixel, mask, other=CROP_FILL).to(tl.int32)
    green, blue = red, red
    if C == 3:
        green = tl.load(pixel + CHANNEL, mask, other=CROP_FILL).to(tl.int32)
        blue = tl.load(pixel + 2 * CHANNEL, mask, other=CROP_FILL).to(tl.int32)
    return red, green, blue


@triton.jit
def luma(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """Integer grey levels as float32, from int32 levels."""
    partial = tl.fma(green.to(tl.float32), _GREEN, red.to(tl.float32) * _RED)
    return tl.floor(tl.fma(blue.to(tl.float32), _BLUE, partial))


@triton.jit
def to_levels(x: tl.tensor) -> tl.tensor:
    """Clamp and truncate to int32."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """Round float32 below 2**22 to the nearest integer, half to even, by adding a number without fraction bits."""
    return (x + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """`rounded` as int32, from the low bits of the sum."""
    return (x + _HALF_EVEN).to(tl.int32, bitcast=True) - _HALF_EVEN_BITS


@triton.jit
def is_warp(op: tl.tensor) -> tl.tensor:
    """Whether an operation moves pixels."""
    return (op >= _SHEAR) & (op <= _ROTATE)


@triton.jit
def _coordinates(
    x: tl.tensor,
    y: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    inside: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """The source position of each pixel, float32 [4, quads], with every rounding of `warp.coordinates`.

    `x` [4, quads] and `y` [1, quads] are float32 distances from the centre; other operations do not move pixels.
    """
    grid_x = tl.where(inside, tl.load(other), tl.load(own)) * x
    grid_y = tl.where(inside, tl.load(other + 1), tl.load(own + 1)) * x
    grid_x += tl.where(inside, tl.load(other + 2) * y, tl.load(own + 2) * y)
    grid_y += tl.where(inside, tl.load(other + 3) * y, tl.load(own + 3) * y)
    grid_x += tl.where(inside, tl.load(other + 4), tl.load(own + 4))
    grid_y += tl.where(inside, tl.load(other + 5), tl.load(own + 5))
    return (grid_x + 1.0) * (W / 2) - 0.5, (grid_y + 1.0) * (H / 2) - 0.5


@triton.jit
def _filled(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
) -> tl.tensor:
    """Levels of the channels, with the warps' fill outside the cropped image: 8 bits each in FILL, red the lowest.

    A position of -1 is in the crop's padding, and -2 outside the cropped image, so that a pixel needs only one number.
    """
    covered, column, row = (x >= 0) & (x < W) & (y >= 0) & (y < H), across + step * x, down + y
    place = row * ROW + column * COLUMN
    if CROPPED:
        place = tl.where((column >= 0) & (column < W) & (row >= 0) & (row < H), place, -1)
    place = tl.where(mask & covered, place, -2)
    red, green, blue = channels(images + place, place >= 0, C, CHANNEL, CROP_FILL)
    if FILL != CROP_FILL * 65793:
        covered = place != -2
        red = tl.where(covered, red, FILL & 255)
        if C == 3:
            green, blue = tl.where(covered, green, FILL >> 8 & 255), tl.where(covered, blue, FILL >> 16)
    return red, green, blue


@triton.jit
def _between(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, right: tl.tensor, low: tl.tensor) -> tl.tensor:
    """The int32 level interpolated between four, in float64, with the roundings of `warp.read_bilinear`."""
    upper = a.to(tl.float64) + (b - a).to(tl.float64) * right
    lower = c.to(tl.float64) + (d - c).to(tl.float64) * right
    return ((upper + (lower - upper) * low + _HALF_EVEN_64) - _HALF_EVEN_64).to(tl.int32)


@triton.jit
def read_warped(
    image: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x0: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    inside: tl.tensor,
    moved: tl.tensor,
    terms_own: tl.tensor,
    terms_other: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
    BILINEAR: tl.constexpr,
) -> tl.tensor:
    """Levels of the channels if the sample or its partner is warped; `x0` is the first column of each group of four."""
    x = (x0.to(tl.float32) - (W - 1) / 2) + tl.arange(0, 4)[:, None].to(tl.float32)
    y = y.to(tl.float32) - (H - 1) / 2
    at_x, at_y = _coordinates(x, y, terms_own, terms_other, inside, H, W)
    if BILINEAR:
        at_x, at_y = tl.where(moved, at_x, x + (W - 1) / 2), tl.where(moved, at_y, y + (H - 1) / 2)
        left, top = tl.floor(at_x), tl.floor(at_y)
        right, low = (at_x - left).to(tl.float64), (at_y - top).to(tl.float64)
        u, v = left.to(tl.int32), top.to(tl.int32)
        r0, g0, b0 = _filled(
            image, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
        )
        r1, g1, b1 = _filled(
            image, step, across, down, u + 1, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
        )
        v += 1
        r2, g2, b2 = _filled(
            image, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
        )
        r3, g3, b3 = _filled(
            image, step, across, down, u + 1, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
        )
        red, green, blue = _between(r0, r1, r2, r3, right, low), g0, b0
        if C == 3:
            green, blue = _between(g0, g1, g2, g3, right, low), _between(b0, b1, b2, b3, right, low)
    else:
        u, v = _nearest(at_x), _nearest(at_y)
        red, green, blue = _filled(
            image, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
        )
    return red, green, blue
