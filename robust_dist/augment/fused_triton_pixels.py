"""The second launch: every pixel of the batch, from where it is stored to where it is wanted, once.

CutMix is which sample's plan a lane follows; crop, flip and warp are where it reads.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_prepare import ACROSS, COLUMNS, DOWN, ORIGIN, PARTNER, ROW, STEP, X1, X2, Y1, Y2
from robust_dist.augment.fused_triton_read import channels, luma, pick, rounded, spot, to_levels
from robust_dist.augment.fused_triton_warp import warped
from robust_dist.augment.tables import OP
from robust_dist.triton_launch import Kernel

_BRIGHTNESS, _COLOR, _CONTRAST = tl.constexpr(OP["Brightness"]), tl.constexpr(OP["Color"]), tl.constexpr(OP["Contrast"])
_SHARPNESS, _POSTERIZE = tl.constexpr(OP["Sharpness"]), tl.constexpr(OP["Posterize"])


@triton.jit
def _has_lut(op: tl.tensor) -> tl.tensor:
    return (op == _BRIGHTNESS) | (op == _CONTRAST) | (op >= _POSTERIZE)


@triton.jit
def _blend(value: tl.tensor, grey: tl.tensor, f: tl.tensor, rest: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Color: a blend with the grey level."""
    return tl.where(mask, to_levels(tl.fma(grey, rest, value.to(tl.float32) * f)), value)


@triton.jit
def _look_up(luts: tl.tensor, value: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.where(mask, tl.load(luts + value, mask, other=0).to(tl.int32), value)


@triton.jit
def _sharpened(value: tl.tensor, total: tl.tensor, rest: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A blend with the rounded mean of 3 x 3 pixels, the middle one five times, from the sum of the nine."""
    middle = value.to(tl.float32)
    blurred = rounded((total + 4 * value).to(tl.float32) * (1 / 13))
    return tl.where(mask, to_levels(tl.fma(blurred - middle, rest, middle)), value)


@triton.jit
def _sums(
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
) -> tl.tensor:
    """Sums of the channels over 3 x 3 pixels."""
    red = tl.zeros_like(x)
    green, blue = red, red
    for neighbour in tl.static_range(9):
        u, v = x + (neighbour % 3 - 1), y + (neighbour // 3 - 1)
        place, stored = spot(step, across, down, u, v, row_stride, column_stride, H, W)
        r, g, b = channels(images, place, mask & stored, channel_stride, C, CROP_FILL)
        red += r
        green += g
        blue += b
    return red, green, blue


@triton.jit
def _augmented(
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
    lut_own: tl.tensor,
    lut_other: tl.tensor,
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
    """Levels of the channels after TrivialAugment; a branch is taken where the own sample or its partner needs it.

    `own` and `other` point to the rows of the terms.
    """
    op = tl.where(inside, op_other, op_own)
    red, green, blue = warped(
        images,
        step,
        across,
        down,
        x,
        y,
        mask,
        inside,
        op_own,
        op_other,
        own,
        other,
        channel_stride,
        row_stride,
        column_stride,
        C,
        H,
        W,
        CROP_FILL,
        FILL,
        BILINEAR,
    )
    if _has_lut(op_own) | _has_lut(op_other):
        lanes, lut = mask & _has_lut(op), tl.where(inside, lut_other, lut_own)
        red = _look_up(lut, red, lanes)
        if C == 3:
            green, blue = _look_up(lut + 256, green, lanes), _look_up(lut + 512, blue, lanes)
    if ((op_own == _COLOR) | (op_other == _COLOR)) & (C == 3):
        f, rest, lanes = pick(own, other, inside, 6), pick(own, other, inside, 7), op == _COLOR
        grey = luma(red, green, blue)
        red, green = _blend(red, grey, f, rest, lanes), _blend(green, grey, f, rest, lanes)
        blue = _blend(blue, grey, f, rest, lanes)
    if (op_own == _SHARPNESS) | (op_other == _SHARPNESS):
        rest = pick(own, other, inside, 7)
        lanes = mask & (op == _SHARPNESS) & (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
        r, g, b = _sums(
            images, step, across, down, x, y, lanes, channel_stride, row_stride, column_stride, C, H, W, CROP_FILL
        )
        red = _sharpened(red, r, rest, lanes)
        if C == 3:
            green, blue = _sharpened(green, g, rest, lanes), _sharpened(blue, b, rest, lanes)
    return red, green, blue


@Kernel
@triton.jit
def pixels_kernel(
    images: tl.tensor,
    out: tl.tensor,
    plan: tl.tensor,
    luts: tl.tensor,
    terms: tl.tensor,
    scale: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BILINEAR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """One tile of one sample in each program, some of its pixels at a time.

    `scale` holds, for each channel and level, the bits of the normalised value: `out` is seen as integers.
    """
    tiles: tl.constexpr = (H * W + TILE - 1) // TILE
    sample, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    own = plan + sample * COLUMNS
    x1, y1 = tl.load(own + X1).to(tl.int32), tl.load(own + Y1).to(tl.int32)
    x2, y2 = tl.load(own + X2).to(tl.int32), tl.load(own + Y2).to(tl.int32)
    reached = (x1 < x2) & (y1 * W < first + TILE) & (y2 * W > first)
    partner = tl.where(reached, tl.load(own + PARTNER).to(tl.int32), sample)
    other = plan + partner * COLUMNS
    origin_own, origin_other = tl.load(own + ORIGIN), tl.load(other + ORIGIN)
    step_own, step_other = tl.load(own + STEP).to(tl.int32), tl.load(other + STEP).to(tl.int32)
    across_own, across_other = tl.load(own + ACROSS).to(tl.int32), tl.load(other + ACROSS).to(tl.int32)
    down_own, down_other = tl.load(own + DOWN).to(tl.int32), tl.load(other + DOWN).to(tl.int32)
    if NUM_BINS > 0:
        row_own, row_other = tl.load(own + ROW).to(tl.int32), tl.load(other + ROW).to(tl.int32)
        op_own, op_other = row_own // (2 * NUM_BINS), row_other // (2 * NUM_BINS)
        own, other = terms + row_own * 8, terms + row_other * 8
    out += sample.to(tl.int64) * (C * H * W)
    next_pixel: tl.constexpr = C if CHANNELS_LAST else 1
    next_channel: tl.constexpr = 1 if CHANNELS_LAST else H * W

    for start in range(first, first + TILE, LANES):
        pixel = start + tl.arange(0, LANES)
        x, y, mask = pixel % W, pixel // W, pixel < H * W
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        stored = images + tl.where(inside, origin_other, origin_own)
        step = tl.where(inside, step_other, step_own)
        across = tl.where(inside, across_other, across_own)
        down = tl.where(inside, down_other, down_own)
        if NUM_BINS > 0:
            red, green, blue = _augmented(
                stored,
                step,
                across,
                down,
                x,
                y,
                mask,
                inside,
                op_own,
                op_other,
                own,
                other,
                luts + sample * (C * 256),
                luts + partner * (C * 256),
                channel_stride,
                row_stride,
                column_stride,
                C,
                H,
                W,
                CROP_FILL,
                FILL,
                BILINEAR,
            )
        else:
            place, there = spot(step, across, down, x, y, row_stride, column_stride, H, W)
            red, green, blue = channels(stored, place, mask & there, channel_stride, C, CROP_FILL)
        target, red = out + pixel * next_pixel, tl.load(scale + red, mask, other=0)
        if C == 3:
            green, blue = tl.load(scale + 256 + green, mask, other=0), tl.load(scale + 512 + blue, mask, other=0)
            tl.store(target + next_channel, green, mask)
            tl.store(target + 2 * next_channel, blue, mask)
        tl.store(target, red, mask)
