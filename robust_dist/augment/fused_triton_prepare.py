"""The first launch: each sample's draws and the statistics of its image where its operation needs any.

The draws are made once a sample, a sample to a thread, by the first programs. The others belong to a tile of a channel
of a sample each, draw its operation alone and end, but for Contrast, AutoContrast and Equalize. Small images are one
tile, whose program writes the table of levels; the tiles of a large image are seen at the same time, and a launch of
its own brings together what they found. The plan of a sample is twelve int64, read by the last launch.
"""

import triton
import triton.language as tl

from robust_dist.augment import fused_triton_draws as draws
from robust_dist.augment.fused_triton_draws import beta_share, chance, randint, uniform
from robust_dist.augment.fused_triton_statistics import (
    autocontrast_lut,
    contrast_lut,
    equalize_lut,
    grey_sum,
    level_counts,
    tile_levels,
)
from robust_dist.augment.tables import OP, OPS
from robust_dist.triton_launch import Kernel

_CONTRAST = tl.constexpr(OP["Contrast"])
_AUTOCONTRAST, _EQUALIZE = tl.constexpr(OP["AutoContrast"]), tl.constexpr(OP["Equalize"])
_NUM_OPS = tl.constexpr(len(OPS))

# Columns of the plan: the image's first pixel in elements of the store, the row of TrivialAugment's tables, the sign of
# a step to the right, the column and the row where reading starts, the partner, the box, the label,
# and the bits of lam, float32. Without CutMix, partner and box are left out, and lam is 1.
ORIGIN, ROW_OF_TABLES, STEP, ACROSS, DOWN, PARTNER, X1, Y1, X2, Y2, LABEL, LAM = (tl.constexpr(c) for c in range(12))
COLUMNS = tl.constexpr(12)


@triton.jit
def room_of(scratch: tl.tensor, sample: tl.tensor, ROOM: tl.constexpr) -> tl.tensor:
    """A sample's ROOM int64: its plan, its tables of 256 levels a channel, and what tiles of a large image found."""
    return scratch + sample.to(tl.int64) * ROOM


@triton.jit
def luts_in(room: tl.tensor) -> tl.tensor:
    """The tables, uint8 [C, 256]."""
    return (room + COLUMNS).to(tl.pointer_type(tl.uint8))


@triton.jit
def _found_in(room: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """The tiles' histograms, int32 [C, tiles, 256]."""
    return (room + COLUMNS + C * 32).to(tl.pointer_type(tl.int32))


@triton.jit
def _row(key: tl.tensor, NUM_BINS: tl.constexpr) -> tl.tensor:
    """TrivialAugment's operation, bin and sign as a row of its tables; 0, nothing, for NUM_BINS = 0."""
    row = 0
    if NUM_BINS > 0:
        cell = randint(key, draws.OPERATION, _NUM_OPS) * NUM_BINS + randint(key, draws.MAGNITUDE, NUM_BINS)
        row = cell * 2 + (draws.bits(key, draws.SIGN) >> 63).to(tl.int32)
    return row


@triton.jit
def _start(key: tl.tensor, stream: tl.constexpr, PADDING: tl.constexpr) -> tl.tensor:
    """The stored column or row at which the crop begins."""
    return randint(key, stream, 2 * PADDING + 1) - PADDING


@triton.jit
def _image(index: tl.tensor, sample: tl.tensor, there: tl.tensor, GATHER: tl.constexpr) -> tl.tensor:
    """The image of a place in the batch, int64."""
    if GATHER:
        image = tl.load(index + sample, there, other=0)
    else:
        image = sample.to(tl.int64)
    return image


@triton.jit
def _partner(
    sample: tl.tensor,
    there: tl.tensor,
    key: tl.tensor,
    partners: tl.tensor,
    batch: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The places that `CutMix.plan` draws."""
    if BLOCK == 0:
        place = tl.load(partners + sample, there, other=0).to(tl.int32)
    else:
        start = sample // BLOCK * BLOCK
        size = tl.minimum(batch - start, BLOCK)
        step = 1 + randint(key, draws.CUTMIX_PARTNER, tl.maximum(size - 1, 1))
        place = start + (sample - start + step) % tl.maximum(size, 1)
    return place


@triton.jit
def _mix(
    sample: tl.tensor,
    there: tl.tensor,
    key: tl.tensor,
    partners: tl.tensor,
    beta: tl.tensor,
    plan: tl.tensor,
    batch: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    MIX_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOTS: tl.constexpr,
) -> None:
    """CutMix's draws to the plan."""
    mixed = chance(key, draws.CUTMIX_APPLY, MIX_BELOW)
    cut = uniform(key, draws.CUTMIX_SHARE)
    if KNOTS > 0:
        cut = beta_share(cut, beta, KNOTS)
    root = tl.sqrt(cut)
    half_x, half_y = (root * W).to(tl.int32) >> 1, (root * H).to(tl.int32) >> 1
    middle_x, middle_y = randint(key, draws.CUTMIX_X, W), randint(key, draws.CUTMIX_Y, H)
    x1, y1 = tl.maximum(middle_x - half_x, 0), tl.maximum(middle_y - half_y, 0)
    x2, y2 = tl.minimum(middle_x + half_x, W), tl.minimum(middle_y + half_y, H)
    tl.store(plan + PARTNER, tl.where(mixed, _partner(sample, there, key, partners, batch, BLOCK), sample), there)
    tl.store(plan + X1, x1, there)
    tl.store(plan + Y1, y1, there)
    tl.store(plan + X2, tl.where(mixed, x2, x1), there)
    tl.store(plan + Y2, y2, there)
    pixels = tl.where(mixed, (x2 - x1) * (y2 - y1), 0)
    lam = tl.div_rn((H * W - pixels).to(tl.float32), tl.full(pixels.shape, H * W, tl.float32))
    tl.store(plan + LAM, lam.to(tl.int32, bitcast=True), there)


@triton.jit
def _draw(
    labels: tl.tensor,
    keys: tl.tensor,
    index: tl.tensor,
    partners: tl.tensor,
    beta: tl.tensor,
    scratch: tl.tensor,
    batch: tl.tensor,
    first: tl.tensor,
    image_stride: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP_BELOW: tl.constexpr,
    NUM_BINS: tl.constexpr,
    MIX_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOTS: tl.constexpr,
    GATHER: tl.constexpr,
    ROOM: tl.constexpr,
    SAMPLES: tl.constexpr,
) -> None:
    """The plans of some samples, from place `first` of the batch on."""
    sample = first + tl.arange(0, SAMPLES)
    there, own = sample < batch, room_of(scratch, sample, ROOM)
    key = tl.load(keys + sample, there, other=0).to(tl.uint64)
    image = _image(index, sample, there, GATHER)
    flip = chance(key, draws.FLIP, FLIP_BELOW).to(tl.int32)
    tl.store(own + ORIGIN, image * image_stride, there)
    tl.store(own + ROW_OF_TABLES, _row(key, NUM_BINS), there)
    tl.store(own + STEP, 1 - 2 * flip, there)
    tl.store(own + ACROSS, _start(key, draws.CROP_LEFT, PADDING) + flip * (W - 1), there)
    tl.store(own + DOWN, _start(key, draws.CROP_TOP, PADDING), there)
    tl.store(own + LABEL, tl.load(labels + image, there, other=0).to(tl.int64), there)
    if MIX_BELOW == 0:
        tl.store(own + LAM, tl.full([SAMPLES], 0x3F800000, tl.int32), there)
    else:
        drawing = key if BLOCK > 0 else tl.load(keys).to(tl.uint64)
        _mix(sample, there, drawing, partners, beta, own, batch, H, W, MIX_BELOW, BLOCK, KNOTS)


@triton.jit
def _needs_statistics(op: tl.tensor, channel: tl.tensor) -> tl.tensor:
    """Whether an operation looks at a channel; Contrast's first looks at all."""
    return (op == _AUTOCONTRAST) | (op == _EQUALIZE) | ((op == _CONTRAST) & (channel == 0))


@triton.jit
def _store_contrast(lut: tl.tensor, total: tl.tensor, term: tl.tensor, C: tl.constexpr, PIXELS: tl.constexpr) -> None:
    """Contrast's tables of all channels; `term` points to the row of the terms."""
    values, ramp = contrast_lut(total, tl.load(term + 6), tl.load(term + 7), PIXELS), tl.arange(0, 256)
    for channel in tl.static_range(C):
        tl.store(lut + channel * 256 + ramp, values)


@triton.jit
def _observe(
    images: tl.tensor,
    left: tl.tensor,
    top: tl.tensor,
    op: tl.tensor,
    term: tl.tensor,
    channel: tl.tensor,
    first: tl.tensor,
    lut: tl.tensor,
    found: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    CROPPED: tl.constexpr,
    CROP_FILL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile's statistics: to the channel's table where it is the only tile, else to `found`."""
    alone: tl.constexpr = H * W <= TILE
    ramp = tl.arange(0, 256)
    if op == _CONTRAST:
        red, green, blue, mask = tile_levels(
            images, left, top, first, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, TILE
        )
        total = grey_sum(red, green, blue, mask, C)
        if alone:
            _store_contrast(lut, total.to(tl.int64), term, C, H * W)
        else:
            tl.store(found, total)
    else:
        value, _, _, mask = tile_levels(
            images + channel * CHANNEL, left, top, first, 1, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL, TILE
        )
        if op == _AUTOCONTRAST:
            low, high = tl.min(tl.where(mask, value, 255), 0), tl.max(tl.where(mask, value, 0), 0)
            if alone:
                tl.store(lut + ramp, autocontrast_lut(low, high))
            else:
                tl.store(found, low)
                tl.store(found + 1, high)
        else:
            counts = level_counts(value, mask)
            if alone:
                tl.store(lut + ramp, equalize_lut(counts, H * W))
            else:
                tl.store(found + ramp, counts)


@Kernel
@triton.jit(
    do_not_specialize=["batch"],
    # Slices of a set start anywhere, and nothing here loads wider than its element.
    do_not_specialize_on_alignment=["images", "labels", "keys", "index", "partners", "beta"],
)
def prepare_kernel(
    images: tl.tensor,
    labels: tl.tensor,
    keys: tl.tensor,
    index: tl.tensor,
    partners: tl.tensor,
    beta: tl.tensor,
    terms: tl.tensor,
    scratch: tl.tensor,
    batch: tl.tensor,
    image_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    PADDING: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FLIP_BELOW: tl.constexpr,
    NUM_BINS: tl.constexpr,
    MIX_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOTS: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    SAMPLES: tl.constexpr,
) -> None:
    """Programs of SAMPLES samples, then those of statistics: (sample * C + channel) * tiles + tile.

    A stage that is off: PADDING, FLIP_BELOW, NUM_BINS or MIX_BELOW is 0.
    """
    tiles: tl.constexpr = (H * W + TILE - 1) // TILE
    program = tl.program_id(0) - (batch + SAMPLES - 1) // SAMPLES
    if program < 0:
        _draw(
            labels,
            keys,
            index,
            partners,
            beta,
            scratch,
            batch,
            tl.program_id(0) * SAMPLES,
            image_stride,
            H,
            W,
            PADDING,
            FLIP_BELOW,
            NUM_BINS,
            MIX_BELOW,
            BLOCK,
            KNOTS,
            GATHER,
            ROOM,
            SAMPLES,
        )
    elif NUM_BINS > 0:
        sample, channel = program // (C * tiles), program // tiles % C
        key = tl.load(keys + sample).to(tl.uint64)
        op = randint(key, draws.OPERATION, _NUM_OPS)
        if _needs_statistics(op, channel):
            room = room_of(scratch, sample, ROOM)
            _observe(
                images + _image(index, sample, True, GATHER) * image_stride,
                _start(key, draws.CROP_LEFT, PADDING),
                _start(key, draws.CROP_TOP, PADDING),
                op,
                terms + _row(key, NUM_BINS) * 8,
                channel,
                program % tiles * TILE,
                luts_in(room) + channel * 256,
                _found_in(room, C) + program % (C * tiles) * 256,
                C,
                H,
                W,
                CHANNEL,
                ROW,
                COLUMN,
                PADDING > 0,
                CROP_FILL,
                TILE,
            )


@Kernel
@triton.jit(do_not_specialize_on_alignment=["images"])
def statistics_kernel(
    images: tl.tensor,
    terms: tl.tensor,
    scratch: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """The programs of statistics alone, for a plan that is given, without crop and flip."""
    tiles: tl.constexpr = (H * W + TILE - 1) // TILE
    program = tl.program_id(0)
    sample, channel = program // (C * tiles), program // tiles % C
    room = room_of(scratch, sample, ROOM)
    row = tl.load(room + ROW_OF_TABLES).to(tl.int32)
    op = row // (2 * NUM_BINS)
    if _needs_statistics(op, channel):
        _observe(
            images + tl.load(room + ORIGIN),
            0,
            0,
            op,
            terms + row * 8,
            channel,
            program % tiles * TILE,
            luts_in(room) + channel * 256,
            _found_in(room, C) + program % (C * tiles) * 256,
            C,
            H,
            W,
            CHANNEL,
            ROW,
            COLUMN,
            False,
            0,
            TILE,
        )


@Kernel
@triton.jit
def luts_kernel(
    terms: tl.tensor,
    scratch: tl.tensor,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILES: tl.constexpr,
    MANY: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Program sample * C + channel: the table of levels from what the tiles of a large image found, MANY at a time."""
    sample, channel = tl.program_id(0) // C, tl.program_id(0) % C
    room = room_of(scratch, sample, ROOM)
    row = tl.load(room + ROW_OF_TABLES).to(tl.int32)
    op, ramp = row // (2 * NUM_BINS), tl.arange(0, 256)
    lut, found = luts_in(room) + channel * 256, _found_in(room, C) + channel * (TILES * 256)
    if _needs_statistics(op, channel):
        if op == _EQUALIZE:
            counts = tl.zeros([256], tl.int32)
            for start in range(0, TILES, MANY):
                tile = start + tl.arange(0, MANY)[:, None]
                counts += tl.sum(tl.load(found + tile * 256 + ramp[None, :], tile < TILES, other=0), 0)
            tl.store(lut + ramp, equalize_lut(counts, PIXELS))
        elif op == _CONTRAST:
            sums = tl.zeros([MANY], tl.int64)
            for start in range(0, TILES, MANY):
                tile = start + tl.arange(0, MANY)
                sums += tl.load(found + tile * 256, tile < TILES, other=0).to(tl.int64)
            _store_contrast(lut, tl.sum(sums, 0), terms + row * 8, C, PIXELS)
        else:
            lows, highs = tl.full([MANY], 255, tl.int32), tl.zeros([MANY], tl.int32)
            for start in range(0, TILES, MANY):
                tile = start + tl.arange(0, MANY)
                lows = tl.minimum(lows, tl.load(found + tile * 256, tile < TILES, other=255))
                highs = tl.maximum(highs, tl.load(found + tile * 256 + 1, tile < TILES, other=0))
            tl.store(lut + ramp, autocontrast_lut(tl.min(lows, 0), tl.max(highs, 0)))
