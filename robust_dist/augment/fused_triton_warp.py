"""Triton functions of the warps: `warp.py`'s coordinates and both interpolations, reading through crop and flip."""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_read import channels, pick, rounded, spot
from robust_dist.augment.tables import OP

_SHEAR, _ROTATE = tl.constexpr(OP["ShearX"]), tl.constexpr(OP["Rotate"])
_HALF_EVEN = tl.constexpr(1.5 * 2**52)


@triton.jit
def _is_warp(op: tl.tensor) -> tl.tensor:
    return (op >= _SHEAR) & (op <= _ROTATE)


@triton.jit
def _coordinates(
    x: tl.tensor, y: tl.tensor, own: tl.tensor, other: tl.tensor, inside: tl.tensor, H: tl.constexpr, W: tl.constexpr
) -> tl.tensor:
    """Where each pixel is read, float32, with every rounding of `warp.coordinates`; rows of other operations stay."""
    x, y = x.to(tl.float32) - (W - 1) / 2, y.to(tl.float32) - (H - 1) / 2
    grid_x = pick(own, other, inside, 0) * x + pick(own, other, inside, 2) * y + pick(own, other, inside, 4) + 1.0
    grid_y = pick(own, other, inside, 1) * x + pick(own, other, inside, 3) * y + pick(own, other, inside, 5) + 1.0
    return grid_x * (W / 2) - 0.5, grid_y * (H / 2) - 0.5


@triton.jit
def _filled(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
) -> tl.tensor:
    """`channels` with the warps' fill outside the cropped image: three levels of 8 bits in FILL, red the lowest."""
    covered = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    place, stored = spot(step, across, down, x, y, row_stride, column_stride, H, W)
    red, green, blue = channels(images, place, mask & covered & stored, channel_stride, C, CROP_FILL)
    red = tl.where(covered, red, FILL & 255)
    if C == 3:
        green, blue = tl.where(covered, green, FILL >> 8 & 255), tl.where(covered, blue, FILL >> 16)
    return red, green, blue


@triton.jit
def _between(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, right: tl.tensor, low: tl.tensor) -> tl.tensor:
    """int32 level between four, in float64 and with the roundings of `warp.read_bilinear`."""
    upper = a.to(tl.float64) + (b - a).to(tl.float64) * right
    lower = c.to(tl.float64) + (d - c).to(tl.float64) * right
    return ((upper + (lower - upper) * low + _HALF_EVEN) - _HALF_EVEN).to(tl.int32)


@triton.jit
def _bilinear(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
) -> tl.tensor:
    """Levels of the channels at float32 places."""
    left, top = tl.floor(x), tl.floor(y)
    right, low = (x - left).to(tl.float64), (y - top).to(tl.float64)
    u, v = left.to(tl.int32), top.to(tl.int32)
    r0, g0, b0 = _filled(
        images, step, across, down, u, v, mask, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL, FILL
    )
    r1, g1, b1 = _filled(
        images, step, across, down, u + 1, v, mask, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL, FILL
    )
    v += 1
    r2, g2, b2 = _filled(
        images, step, across, down, u, v, mask, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL, FILL
    )
    r3, g3, b3 = _filled(
        images, step, across, down, u + 1, v, mask, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL, FILL
    )
    red, green, blue = _between(r0, r1, r2, r3, right, low), g0, b0
    if C == 3:
        green, blue = _between(g0, g1, g2, g3, right, low), _between(b0, b1, b2, b3, right, low)
    return red, green, blue


@triton.jit
def warped(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    inside: tl.tensor,
    op_own: tl.tensor,
    op_other: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
    BILINEAR: tl.constexpr,
) -> tl.tensor:
    """Levels of the channels at each pixel, or where its own sample or the partner is warped, at its place there."""
    warps, u, v = _is_warp(op_own) | _is_warp(op_other), x, y
    if warps & (not BILINEAR):
        at_x, at_y = _coordinates(x, y, own, other, inside, H, W)
        u, v = rounded(at_x).to(tl.int32), rounded(at_y).to(tl.int32)
    red, green, blue = _filled(
        images, step, across, down, u, v, mask, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL, FILL
    )
    if BILINEAR:
        lanes = mask & _is_warp(tl.where(inside, op_other, op_own))
        at_x, at_y = _coordinates(x, y, own, other, inside, H, W)
        if warps:
            r, g, b = _bilinear(
                images,
                step,
                across,
                down,
                at_x,
                at_y,
                lanes,
                channel_stride,
                row_stride,
                column_stride,
                C,
                H,
                W,
                CROP_FILL,
                FILL,
            )
            red, green, blue = tl.where(lanes, r, red), tl.where(lanes, g, green), tl.where(lanes, b, blue)
    return red, green, blue
