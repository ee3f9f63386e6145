"""Triton functions of the warps: `warp.py`'s coordinates and both interpolations, reading through crop and flip."""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_read import channels, nearest
from robust_dist.augment.tables import OP

_SHEAR, _ROTATE = tl.constexpr(OP["ShearX"]), tl.constexpr(OP["Rotate"])
_HALF_EVEN = tl.constexpr(1.5 * 2**52)


@triton.jit
def is_warp(op: tl.tensor) -> tl.tensor:
    """Whether an operation reads pixels elsewhere."""
    return (op >= _SHEAR) & (op <= _ROTATE)


@triton.jit
def coordinates(
    x: tl.tensor,
    y: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    inside: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """The place that each pixel is read from, float32 [4, quads], with every rounding of `warp.coordinates`.

    `x` [4, quads] and `y` [1, quads] are float32 distances from the centre; rows of other operations stay.
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

    A place says by itself that it is stored nowhere (-1) or not covered (-2), and so is all that four pixels of a
    thread have to be told.
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
def read_nearest(
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
    """Levels of the channels at the pixels nearest to float32 places."""
    u, v = nearest(x), nearest(y)
    return _filled(images, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL)


@triton.jit
def _between(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, right: tl.tensor, low: tl.tensor) -> tl.tensor:
    """int32 level between four, in float64 and with the roundings of `warp.read_bilinear`."""
    upper = a.to(tl.float64) + (b - a).to(tl.float64) * right
    lower = c.to(tl.float64) + (d - c).to(tl.float64) * right
    return ((upper + (lower - upper) * low + _HALF_EVEN) - _HALF_EVEN).to(tl.int32)


@triton.jit
def read_bilinear(
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
    """Levels of the channels between the pixels around float32 places."""
    left, top = tl.floor(x), tl.floor(y)
    right, low = (x - left).to(tl.float64), (y - top).to(tl.float64)
    u, v = left.to(tl.int32), top.to(tl.int32)
    r0, g0, b0 = _filled(
        images, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
    )
    r1, g1, b1 = _filled(
        images, step, across, down, u + 1, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
    )
    v += 1
    r2, g2, b2 = _filled(
        images, step, across, down, u, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
    )
    r3, g3, b3 = _filled(
        images, step, across, down, u + 1, v, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, FILL
    )
    red, green, blue = _between(r0, r1, r2, r3, right, low), g0, b0
    if C == 3:
        green, blue = _between(g0, g1, g2, g3, right, low), _between(b0, b1, b2, b3, right, low)
    return red, green, blue
