"""Triton functions of the operations that depend on an image's levels: each gives a table of 256 levels, int32.

What is added up or compared is kept by lane over the tiles of an image and brought together once.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_read import channels, luma, spot, to_levels


@triton.jit
def _tile(start: tl.tensor, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Columns and rows of the pixels from `start` on, and which of them are there."""
    place = start + tl.arange(0, TILE)
    return place % W, place // W, place < H * W


@triton.jit
def contrast_lut(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    f: tl.tensor,
    rest: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """A blend with the mean grey level of all channels."""
    sums = tl.zeros([TILE], tl.int32)
    for start in range(0, H * W, TILE):
        x, y, mask = _tile(start, H, W, TILE)
        offset, stored = spot(step, across, down, x, y, row_stride, column_stride, H, W)
        red, green, blue = channels(images, offset, mask & stored, channel_stride, C, CROP_FILL)
        grey = luma(red, green, blue).to(tl.int32) if C == 3 else red
        sums += tl.where(mask, grey, 0)
    mean = (tl.sum(sums.to(tl.int64), 0).to(tl.float64) / (H * W)).to(tl.float32)
    return to_levels(tl.fma(mean, rest, tl.arange(0, 256).to(tl.float32) * f))


@triton.jit
def autocontrast_lut(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """One channel's range stretched to 0 to 255; a constant channel stays."""
    lows, highs = tl.full([TILE], 255, tl.int32), tl.zeros([TILE], tl.int32)
    for start in range(0, H * W, TILE):
        x, y, mask = _tile(start, H, W, TILE)
        offset, stored = spot(step, across, down, x, y, row_stride, column_stride, H, W)
        value = tl.load(images + offset, mask & stored, other=CROP_FILL).to(tl.int32)
        lows = tl.minimum(lows, tl.where(mask, value, 255))
        highs = tl.maximum(highs, tl.where(mask, value, 0))
    low, high, ramp = tl.min(lows, 0), tl.max(highs, 0), tl.arange(0, 256)
    scale = tl.where(high > low, (high - low).to(tl.float32) * (1 / 255), 1.0)
    stretched = to_levels(tl.div_rn((ramp - low).to(tl.float32), tl.zeros([256], tl.float32) + scale))
    return tl.where(high > low, stretched, ramp)


@triton.jit
def equalize_lut(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """One channel's histogram flattened by Pillow's rule; the identity below 256 pixels."""
    counts, ramp = tl.zeros([256], tl.int32), tl.arange(0, 256)
    for start in range(0, H * W, TILE):
        x, y, mask = _tile(start, H, W, TILE)
        offset, stored = spot(step, across, down, x, y, row_stride, column_stride, H, W)
        value = tl.load(images + offset, mask & stored, other=CROP_FILL).to(tl.int32)
        counts += tl.histogram(tl.where(mask, value, 0), 256)
    padding: tl.constexpr = (H * W + TILE - 1) // TILE * TILE - H * W
    counts -= tl.where(ramp == 0, padding, 0)
    upto = tl.cumsum(counts, 0)
    level_step = tl.max(tl.where(upto == H * W, 0, upto), 0) // 255
    spread = (upto - counts + level_step // 2) // tl.maximum(level_step, 1)
    spread = tl.where(ramp == 0, 0, tl.minimum(spread, 255))
    return tl.where(level_step > 0, spread, ramp)
