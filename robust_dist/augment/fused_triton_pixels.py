"""The last launch: it reads, augments and writes every pixel of the batch once, and writes the targets.

A thread processes four neighbouring pixels of a row at a time, to store 8 bytes of bfloat16 or 16 of float32 at once.
CutMix determines which sample's plan a pixel follows; crop, flip and warp determine where the pixel is read.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_prepare import (
    ACROSS,
    DOWN,
    LABEL,
    LAM,
    ORIGIN,
    PARTNER,
    ROW_OF_TABLES,
    STEP,
    X1,
    X2,
    Y1,
    Y2,
    luts_in,
    room_of,
)
from robust_dist.augment.fused_triton_read import channels, is_warp, luma, read, read_warped, rounded, to_levels
from robust_dist.augment.tables import OP
from robust_dist.triton_launch import Kernel

_BRIGHTNESS, _COLOR, _CONTRAST = tl.constexpr(OP["Brightness"]), tl.constexpr(OP["Color"]), tl.constexpr(OP["Contrast"])
_SHARPNESS, _POSTERIZE, _SOLARIZE = (tl.constexpr(OP[n]) for n in ("Sharpness", "Posterize", "Solarize"))


@triton.jit
def _is_fixed(op: tl.tensor) -> tl.tensor:
    """Whether an operation is a table of levels that does not depend on the image."""
    return (op == _BRIGHTNESS) | (op == _POSTERIZE) | (op == _SOLARIZE)


@triton.jit
def _has_lut(op: tl.tensor) -> tl.tensor:
    return (op == _BRIGHTNESS) | (op == _CONTRAST) | (op >= _POSTERIZE)


@triton.jit
def _blend(value: tl.tensor, grey: tl.tensor, f: tl.tensor, rest: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Color: the blend with the grey level."""
    return tl.where(mask, to_levels(tl.fma(grey, rest, value.to(tl.float32) * f)), value)


@triton.jit
def _look_up(luts: tl.tensor, value: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Levels from a table, which has an entry for every level, so that the load needs no mask."""
    return tl.where(mask, tl.load(luts + value).to(tl.int32), value)


@triton.jit
def _sharpened(value: tl.tensor, total: tl.tensor, rest: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A blend with the rounded mean of 3 x 3 pixels, the middle one weighted five times, from the sum of the nine."""
    middle = value.to(tl.float32)
    blurred = rounded((total + 4 * value).to(tl.float32) * (1 / 13))
    return tl.where(mask, to_levels(tl.fma(blurred - middle, rest, middle)), value)


@triton.jit
def _store_targets(
    targets: tl.tensor, own: tl.tensor, other: tl.tensor, NUM_CLASSES: tl.constexpr, CLASSES: tl.constexpr
) -> None:
    """Write one sample's soft targets, from its plan and its partner's."""
    label, their_label, lam = tl.load(own + LABEL), tl.load(other + LABEL), tl.load(own + LAM)
    lam = lam.to(tl.int32).to(tl.float32, bitcast=True)
    rest = tl.where(label == their_label, 1.0, 1.0 - lam)
    for start in range(0, NUM_CLASSES, CLASSES):
        name = start + tl.arange(0, CLASSES)
        share = tl.where(name == their_label, rest, tl.where(name == label, lam, 0.0))
        tl.store(targets + name, share, name < NUM_CLASSES)


@triton.jit
def _toned(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    inside: tl.tensor,
    mask: tl.tensor,
    op_own: tl.tensor,
    op_other: tl.tensor,
    row_own: tl.tensor,
    row_other: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    tables: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:
    """Levels from the samples' tables, where the mask is on."""
    lut_own = tl.where(_is_fixed(op_own), tables + row_own * (C * 256), luts_in(own))
    lut_other = tl.where(_is_fixed(op_other), tables + row_other * (C * 256), luts_in(other))
    lut = tl.where(inside, lut_other, lut_own)
    red = _look_up(lut, red, mask)
    if C == 3:
        green, blue = _look_up(lut + 256, green, mask), _look_up(lut + 512, blue, mask)
    return red, green, blue


@triton.jit
def _coloured(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    inside: tl.tensor,
    mask: tl.tensor,
    terms_own: tl.tensor,
    terms_other: tl.tensor,
) -> tl.tensor:
    """Color, where the mask is on."""
    f = tl.where(inside, tl.load(terms_other + 6), tl.load(terms_own + 6))
    rest = tl.where(inside, tl.load(terms_other + 7), tl.load(terms_own + 7))
    grey = luma(red, green, blue)
    return _blend(red, grey, f, rest, mask), _blend(green, grey, f, rest, mask), _blend(blue, grey, f, rest, mask)


@triton.jit
def _fours(a: tl.tensor) -> tl.tensor:
    """Split [4, quads] into its rows."""
    even, odd = tl.split(tl.reshape(tl.trans(a), [a.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _four(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Join four rows to [4, quads]."""
    return tl.trans(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4]))


@triton.jit
def _store_interleaved(target: tl.tensor, red: tl.tensor, green: tl.tensor, blue: tl.tensor, mask: tl.tensor) -> None:
    """Store twelve neighbours (red, green, blue, ...) as three times four, the first four at `target` [4, quads]."""
    r0, r1, r2, r3 = _fours(red)
    g0, g1, g2, g3 = _fours(green)
    b0, b1, b2, b3 = _fours(blue)
    tl.store(target, _four(r0, g0, b0, r1), mask)
    tl.store(target + 4, _four(g1, b1, r2, g2), mask)
    tl.store(target + 8, _four(b2, r3, g3, b3), mask)


@triton.jit
def _mask(quad: tl.tensor, x: tl.tensor, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """The mask of existing pixels; if rows are multiples of four and tiles full, the compiler knows that all exist."""
    mask = tl.full(x.shape, 1, tl.int1)
    if H * ((W + 3) // 4) % TILE != 0:
        mask = mask & (quad < H * ((W + 3) // 4))[None, :]
    if W % 4 != 0:
        mask = mask & (x < W)
    return mask


@triton.jit
def _store_pixels(
    out: tl.tensor,
    scale: tl.tensor,
    quad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    mask: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Store a sample's normalised values, four at once if rows are multiples of four pixels."""
    red = tl.load(scale + red)
    if C == 3:
        green, blue = tl.load(scale + 256 + green), tl.load(scale + 512 + blue)
    if CHANNELS_LAST and W % 4 == 0:
        _store_interleaved(out + ((quad * 12)[None, :] + tl.arange(0, 4)[:, None]), red, green, blue, mask)
    else:
        next_pixel: tl.constexpr = C if CHANNELS_LAST else 1
        next_channel: tl.constexpr = 1 if CHANNELS_LAST else H * W
        place = (quad * 4)[None, :] + tl.arange(0, 4)[:, None] if W % 4 == 0 else y * W + x
        target = out + place * next_pixel
        tl.store(target, red, mask)
        if C == 3:
            tl.store(target + next_channel, green, mask)
            tl.store(target + 2 * next_channel, blue, mask)


@triton.jit
def _operated(
    images: tl.tensor,
    origin_own: tl.tensor,
    origin_other: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down_own: tl.tensor,
    down_other: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    inside: tl.tensor,
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    op_own: tl.tensor,
    op_other: tl.tensor,
    row_own: tl.tensor,
    row_other: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    tables: tl.tensor,
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
) -> tl.tensor:
    """Levels after operations that move no pixels; a branch is taken if the sample or its partner needs it."""
    op = tl.where(inside, op_other, op_own)
    if _has_lut(op_own) | _has_lut(op_other):
        changed = _has_lut(op)
        red, green, blue = _toned(
            red, green, blue, inside, changed, op_own, op_other, row_own, row_other, own, other, tables, C
        )
    if ((op_own == _COLOR) | (op_other == _COLOR)) & (C == 3):
        red, green, blue = _coloured(red, green, blue, inside, op == _COLOR, terms_own, terms_other)
    if (op_own == _SHARPNESS) | (op_other == _SHARPNESS):
        image, row = images + tl.where(inside, origin_other, origin_own), tl.where(inside, down_other, down_own) + y
        rest = tl.where(inside, tl.load(terms_other + 7), tl.load(terms_own + 7))
        inner = mask & (op == _SHARPNESS) & (x > 0) & (x < W - 1) & ((y > 0) & (y < H - 1))
        reds = tl.zeros_like(x)
        greens, blues = reds, reds
        column = across + step * x
        for above in range(-1, 2):  # row by row: nine loads at once would need too many registers
            for beside in tl.static_range(-1, 2):
                r, g, b = read(
                    image, column + beside, row + above, inner, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL
                )
                reds += r
                greens += g
                blues += b
        red = _sharpened(red, reds, rest, inner)
        if C == 3:
            green, blue = _sharpened(green, greens, rest, inner), _sharpened(blue, blues, rest, inner)
    return red, green, blue


# A slice of a set starts anywhere, and no load here is wider than its element.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["images"])
def pixels_kernel(
    images: tl.tensor,
    out: tl.tensor,
    targets: tl.tensor,
    scratch: tl.tensor,
    tables: tl.tensor,
    terms: tl.tensor,
    scale: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FILL: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BILINEAR: tl.constexpr,
    MIXED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    CLASSES: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
    QUADS: tl.constexpr,
) -> None:
    """Each program processes TILE quads of one sample, QUADS at a time.

    `scale` holds the bits of the normalised value of each channel and level as integers, and `out` is viewed as such
    integers. The first tile of a sample writes the targets; NUM_CLASSES is 0 if there are none.
    """
    in_row: tl.constexpr = (W + 3) // 4
    quads: tl.constexpr = H * in_row
    tiles: tl.constexpr = (quads + TILE - 1) // TILE
    sample, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    own = room_of(scratch, sample, ROOM)
    partner, reached, x1, y1, x2, y2 = sample, sample, 0, 0, 0, 0
    if MIXED:
        x1, y1 = tl.load(own + X1).to(tl.int32), tl.load(own + Y1).to(tl.int32)
        x2, y2 = tl.load(own + X2).to(tl.int32), tl.load(own + Y2).to(tl.int32)
        partner = tl.load(own + PARTNER).to(tl.int32)
        reaches = (x1 < x2) & (y1 * in_row < first + TILE) & (y2 * in_row > first)
        reached = tl.where(reaches, partner, sample)
    if NUM_CLASSES > 0 and first == 0:
        theirs = room_of(scratch, partner, ROOM)
        _store_targets(targets + sample.to(tl.int64) * NUM_CLASSES, own, theirs, NUM_CLASSES, CLASSES)
    other = room_of(scratch, reached, ROOM)
    origin_own, origin_other = tl.load(own + ORIGIN), tl.load(other + ORIGIN)
    step_own, step_other = tl.load(own + STEP).to(tl.int32), tl.load(other + STEP).to(tl.int32)
    across_own, across_other = tl.load(own + ACROSS).to(tl.int32), tl.load(other + ACROSS).to(tl.int32)
    down_own, down_other = tl.load(own + DOWN).to(tl.int32), tl.load(other + DOWN).to(tl.int32)
    row_own, row_other, op_own, op_other, warps = 0, 0, 0, 0, False
    if NUM_BINS > 0:
        row_own, row_other = tl.load(own + ROW_OF_TABLES).to(tl.int32), tl.load(other + ROW_OF_TABLES).to(tl.int32)
        op_own, op_other = row_own // (2 * NUM_BINS), row_other // (2 * NUM_BINS)
        warps = is_warp(op_own) | is_warp(op_other)
    terms_own, terms_other = terms + row_own * 8, terms + row_other * 8
    out = out.to(scale.dtype) + sample.to(tl.int64) * (C * H * W)

    for start in range(first, first + TILE, QUADS):
        quad = start + tl.arange(0, QUADS)
        at_row = quad // in_row
        x0, y = ((quad - at_row * in_row) * 4)[None, :], at_row[None, :]
        four = tl.arange(0, 4)[:, None]
        x = x0 + four
        mask = _mask(quad, x, H, W, TILE)
        inside = tl.full([4, QUADS], 0, tl.int1)
        if MIXED:
            inside = (x >= x1) & (x < x2) & ((y >= y1) & (y < y2))
        step = tl.where(inside, step_other, step_own)
        across = tl.where(inside, across_other, across_own)
        if warps:
            image = images + tl.where(inside, origin_other, origin_own)
            down, moved = tl.where(inside, down_other, down_own), is_warp(tl.where(inside, op_other, op_own))
            red, green, blue = read_warped(
                image,
                step,
                across,
                down,
                x0,
                y,
                mask,
                inside,
                moved,
                terms_own,
                terms_other,
                C,
                H,
                W,
                CHANNEL,
                ROW,
                COLUMN,
                CROPPED,
                CROP_FILL,
                FILL,
                BILINEAR,
            )
        else:  # only crop and flip: the rows of four pixels are computed once
            from_own, from_other, column = down_own + y, down_other + y, across + step * x
            begin = tl.where(inside, origin_other + from_other * ROW, origin_own + from_own * ROW)
            stored = mask
            if CROPPED:
                there = tl.where(inside, (from_other >= 0) & (from_other < H), (from_own >= 0) & (from_own < H))
                stored = mask & there & (column >= 0) & (column < W)
            red, green, blue = channels(images + (begin + column * COLUMN), stored, C, CHANNEL, CROP_FILL)
        if NUM_BINS > 0:
            red, green, blue = _operated(
                images,
                origin_own,
                origin_other,
                step,
                across,
                down_own,
                down_other,
                x,
                y,
                mask,
                inside,
                red,
                green,
                blue,
                op_own,
                op_other,
                row_own,
                row_other,
                own,
                other,
                tables,
                terms_own,
                terms_other,
                C,
                H,
                W,
                CHANNEL,
                ROW,
                COLUMN,
                CROPPED,
                CROP_FILL,
            )
        _store_pixels(out, scale, quad, x, y, red, green, blue, mask, C, H, W, CHANNELS_LAST)
