"""Triton functions of the operations that depend on an image's levels: what a tile of a channel adds, and the tables.

A tile's statistics are scalars or, for Equalize, 256 counts, int32. Tables are 256 levels, int32. Which pixels the
crop leaves is all that counts: no order, and so no flip.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_read import luma, read, to_levels


@triton.jit
def tile_levels(
    images: tl.tensor,
    left: tl.tensor,
    top: tl.tensor,
    first: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """int32 levels [TILE] of C channels from pixel `first` of the cropped image on, and which of them are there."""
    pixel = first + tl.arange(0, TILE)
    row = pixel // W
    column, mask = pixel - row * W, pixel < H * W
    red, green, blue = read(images, left + column, top + row, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL)
    return red, green, blue, mask


@triton.jit
def grey_sum(red: tl.tensor, green: tl.tensor, blue: tl.tensor, mask: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """The sum of grey levels; int32 holds that of 2**23 pixels."""
    grey = luma(red, green, blue).to(tl.int32) if C == 3 else red
    return tl.sum(tl.where(mask, grey, 0), 0)


@triton.jit
def level_counts(value: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The count of each level, [256]."""
    counts = tl.histogram(tl.where(mask, value, 0), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, tl.sum((mask == 0).to(tl.int32), 0), 0)


@triton.jit
def contrast_lut(total: tl.tensor, f: tl.tensor, rest: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """A blend with the mean grey level of all channels, from the sum, int64."""
    mean = (total.to(tl.float64) / PIXELS).to(tl.float32)
    return to_levels(tl.fma(mean, rest, tl.arange(0, 256).to(tl.float32) * f))


@triton.jit
def autocontrast_lut(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """One channel's range stretched to 0 to 255; a constant channel stays."""
    ramp = tl.arange(0, 256)
    scale = tl.where(high > low, (high - low).to(tl.float32) * (1 / 255), 1.0)
    stretched = to_levels(tl.div_rn((ramp - low).to(tl.float32), tl.zeros([256], tl.float32) + scale))
    return tl.where(high > low, stretched, ramp)


@triton.jit
def equalize_lut(counts: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """One channel's histogram flattened by Pillow's rule; the identity below 256 pixels."""
    ramp, upto = tl.arange(0, 256), tl.cumsum(counts, 0)
    level_step = tl.max(tl.where(upto == PIXELS, 0, upto), 0) // 255
    spread = (upto - counts + level_step // 2) // tl.maximum(level_step, 1)
    spread = tl.where(ramp == 0, 0, tl.minimum(spread, 255))
    return tl.where(level_step > 0, spread, ramp)
