"""The second launch: every pixel of the batch, from where it is stored to where it is wanted, once.

A lane is a pixel with all its channels, or, in channels_last, one channel of it, so that stores lie side by side
either way. CutMix is which sample's plan a lane follows; crop, flip and warp are where it reads.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_prepare import ACROSS, COLUMNS, DOWN, ORIGIN, PARTNER, ROW, STEP, X1, X2, Y1, Y2
from robust_dist.augment.fused_triton_read import level, luma, rounded, to_levels
from robust_dist.augment.tables import OP

_SHEAR, _ROTATE = tl.constexpr(OP["ShearX"]), tl.constexpr(OP["Rotate"])
_BRIGHTNESS, _COLOR, _CONTRAST = tl.constexpr(OP["Brightness"]), tl.constexpr(OP["Color"]), tl.constexpr(OP["Contrast"])
_SHARPNESS, _POSTERIZE = tl.constexpr(OP["Sharpness"]), tl.constexpr(OP["Posterize"])
_HALF_EVEN = tl.constexpr(1.5 * 2**52)


@triton.jit
def _is_warp(op: tl.tensor) -> tl.tensor:
    return (op >= _SHEAR) & (op <= _ROTATE)


@triton.jit
def _has_lut(op: tl.tensor) -> tl.tensor:
    return (op == _BRIGHTNESS) | (op == _CONTRAST) | (op >= _POSTERIZE)


@triton.jit
def _pick(own: tl.tensor, other: tl.tensor, inside: tl.tensor, column: tl.constexpr) -> tl.tensor:
    """A value of two samples' rows, chosen for each lane."""
    return tl.where(inside, tl.load(other + column), tl.load(own + column))


@triton.jit
def _coordinates(
    x: tl.tensor, y: tl.tensor, own: tl.tensor, other: tl.tensor, inside: tl.tensor, H: tl.constexpr, W: tl.constexpr
) -> tl.tensor:
    """Where each pixel is read, float32, with every rounding of `warp.coordinates`; rows of other operations stay."""
    x, y = x.to(tl.float32) - (W - 1) / 2, y.to(tl.float32) - (H - 1) / 2
    grid_x = _pick(own, other, inside, 0) * x + _pick(own, other, inside, 2) * y + _pick(own, other, inside, 4) + 1.0
    grid_y = _pick(own, other, inside, 1) * x + _pick(own, other, inside, 3) * y + _pick(own, other, inside, 5) + 1.0
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
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    fill: tl.tensor,
    CROP_FILL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """`level` with the warps' fill outside the cropped image."""
    covered = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    value = level(images, step, across, down, x, y, mask & covered, row_stride, column_stride, CROP_FILL, H, W)
    return tl.where(covered, value, fill)


@triton.jit
def _bilinear(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    fill: tl.tensor,
    CROP_FILL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """int32 levels at float32 places, in float64 and with the roundings of `warp.read_bilinear`."""
    left, top = tl.floor(x), tl.floor(y)
    right, low = (x - left).to(tl.float64), (y - top).to(tl.float64)
    u, v = left.to(tl.int32), top.to(tl.int32)
    a = _filled(images, step, across, down, u, v, mask, row_stride, column_stride, fill, CROP_FILL, H, W)
    b = _filled(images, step, across, down, u + 1, v, mask, row_stride, column_stride, fill, CROP_FILL, H, W)
    c = _filled(images, step, across, down, u, v + 1, mask, row_stride, column_stride, fill, CROP_FILL, H, W)
    d = _filled(images, step, across, down, u + 1, v + 1, mask, row_stride, column_stride, fill, CROP_FILL, H, W)
    upper = a.to(tl.float64) + (b - a).to(tl.float64) * right
    lower = c.to(tl.float64) + (d - c).to(tl.float64) * right
    return ((upper + (lower - upper) * low + _HALF_EVEN) - _HALF_EVEN).to(tl.int32)


@triton.jit
def _color(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    f: tl.tensor,
    rest: tl.tensor,
    CROP_FILL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """A blend with the grey level; `images` points to the first of three channels."""
    green, blue = images + channel_stride, images + 2 * channel_stride
    red = level(images, step, across, down, x, y, mask, row_stride, column_stride, CROP_FILL, H, W)
    green = level(green, step, across, down, x, y, mask, row_stride, column_stride, CROP_FILL, H, W)
    blue = level(blue, step, across, down, x, y, mask, row_stride, column_stride, CROP_FILL, H, W)
    return to_levels(tl.fma(luma(red, green, blue), rest, value.to(tl.float32) * f))


@triton.jit
def _sharpness(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    rest: tl.tensor,
    CROP_FILL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """A blend of inner pixels with the rounded mean of 3 x 3, the middle one five times; the border stays."""
    inner = mask & (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
    total = 4 * value
    for dy in tl.static_range(3):
        for dx in tl.static_range(3):
            u, v = x + (dx - 1), y + (dy - 1)
            total += level(images, step, across, down, u, v, inner, row_stride, column_stride, CROP_FILL, H, W)
    middle = value.to(tl.float32)
    blurred = rounded(total.to(tl.float32) * (1 / 13))
    return tl.where(inner, to_levels(tl.fma(blurred - middle, rest, middle)), value)


@triton.jit
def pixels_kernel(
    images: tl.tensor,
    out: tl.tensor,
    plan: tl.tensor,
    luts: tl.tensor,
    terms: tl.tensor,
    scale: tl.tensor,
    fill: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BILINEAR: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program sample * TILES + tile. PLANES is C, or 1 where the images given out are channels_last.

    `scale` holds, for each channel and level, the bits of the normalised value: `out` is seen as integers.
    """
    sample, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    lane = tile * TILE + tl.arange(0, TILE)
    place = lane // (C // PLANES)
    x, y, mask = place % W, place // W, place < H * W

    own = plan + sample * COLUMNS
    x1, y1 = tl.load(own + X1).to(tl.int32), tl.load(own + Y1).to(tl.int32)
    x2, y2 = tl.load(own + X2).to(tl.int32), tl.load(own + Y2).to(tl.int32)
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    first, last = tile * TILE // (C // PLANES) // W, (tile + 1) * TILE // (C // PLANES) // W
    partner = tl.where((x1 < x2) & (y1 <= last) & (y2 > first), tl.load(own + PARTNER).to(tl.int32), sample)
    other = plan + partner * COLUMNS

    step, across = _pick(own, other, inside, STEP).to(tl.int32), _pick(own, other, inside, ACROSS).to(tl.int32)
    down = _pick(own, other, inside, DOWN).to(tl.int32)
    images += _pick(own, other, inside, ORIGIN)
    u, v = x, y
    if NUM_BINS > 0:
        row_own, row_other = tl.load(own + ROW).to(tl.int32), tl.load(other + ROW).to(tl.int32)
        op_own, op_other = row_own // (2 * NUM_BINS), row_other // (2 * NUM_BINS)
        terms_own, terms_other = terms + row_own * 8, terms + row_other * 8
        op = tl.where(inside, op_other, op_own)
        warped = _is_warp(op_own) | _is_warp(op_other)
        if BILINEAR:
            at_x, at_y = _coordinates(x, y, terms_own, terms_other, inside, H, W)
        elif warped:
            at_x, at_y = _coordinates(x, y, terms_own, terms_other, inside, H, W)
            u, v = rounded(at_x).to(tl.int32), rounded(at_y).to(tl.int32)

    out += sample.to(tl.int64) * (C * H * W)
    for plane in tl.static_range(PLANES):
        if PLANES == C:
            channel, target = plane, plane * (H * W) + place
        else:
            channel, target = lane % C, lane
        source = images + channel * channel_stride
        outside = tl.load(fill + channel)
        value = _filled(
            source, step, across, down, u, v, mask, row_stride, column_stride, outside, CROP_FILL, H, W
        )
        if NUM_BINS > 0:
            if BILINEAR:
                if warped:
                    lanes = mask & _is_warp(op)
                    between = _bilinear(
                        source, step, across, down, at_x, at_y, lanes, row_stride, column_stride, outside, CROP_FILL, H, W
                    )
                    value = tl.where(lanes, between, value)
            if _has_lut(op_own) | _has_lut(op_other):
                entry = (tl.where(inside, partner, sample) * C + channel) * 256 + value
                looked_up = tl.load(luts + entry, mask & _has_lut(op), other=0).to(tl.int32)
                value = tl.where(_has_lut(op), looked_up, value)
            if C == 3:
                if (op_own == _COLOR) | (op_other == _COLOR):
                    f, rest = _pick(terms_own, terms_other, inside, 6), _pick(terms_own, terms_other, inside, 7)
                    blended = _color(
                        images, step, across, down, x, y, value, mask, channel_stride, row_stride, column_stride,
                        f, rest, CROP_FILL, H, W,
                    )
                    value = tl.where(op == _COLOR, blended, value)
            if (op_own == _SHARPNESS) | (op_other == _SHARPNESS):
                rest = _pick(terms_own, terms_other, inside, 7)
                lanes = mask & (op == _SHARPNESS)
                value = _sharpness(
                    source, step, across, down, x, y, value, lanes, row_stride, column_stride, rest, CROP_FILL, H, W
                )
        tl.store(out + target, tl.load(scale + channel * 256 + value, mask, other=0), mask)
