"""The first launch: each sample's draws, and the statistics of its image if its operation needs them.

The first programs draw, one sample per thread. Every other program handles a tile of one channel of a sample; it draws
only the operation and stops unless that is Contrast, AutoContrast or Equalize. A small image is one tile, whose program
writes the table of levels; the tiles of a large image are processed in parallel, and a separate launch combines their
statistics. The plan of a sample is twelve int64, which the last launch reads.
"""

import triton
import triton.language as tl

from robust_dist.augment.fused_triton_read import luma, read, to_levels
from robust_dist.augment.keys import Stream
from robust_dist.augment.tables import OP, OPS
from robust_dist.triton_launch import Kernel

_CONTRAST = tl.constexpr(OP["Contrast"])
_AUTOCONTRAST, _EQUALIZE = tl.constexpr(OP["AutoContrast"]), tl.constexpr(OP["Equalize"])
_NUM_OPS = tl.constexpr(len(OPS))

# Columns of the plan: the offset of the image's first pixel, the row in TrivialAugment's tables, the sign of a step to
# the right, the column and row where reading starts, the partner, the box, the label, and the float32 bits of lam.
# Without CutMix, partner and box are not written, and lam is 1.
ORIGIN, ROW_OF_TABLES, STEP, ACROSS, DOWN, PARTNER, X1, Y1, X2, Y2, LABEL, LAM = (tl.constexpr(c) for c in range(12))
COLUMNS = tl.constexpr(12)

# The draws of keys.py on unsigned 64-bit integers, which wrap like its signed ones. Keys are a block, one sample per
# thread, or a scalar of the program.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


def _offset(stream: Stream) -> tl.constexpr:
    return tl.constexpr((int(stream) + 1) * _GOLDEN % 2**64)


_OPERATION, _MAGNITUDE, _SIGN = (_offset(s) for s in (Stream.OPERATION, Stream.MAGNITUDE, Stream.SIGN))
_CROP_TOP, _CROP_LEFT, _FLIP = (_offset(s) for s in (Stream.CROP_TOP, Stream.CROP_LEFT, Stream.FLIP))
_CUTMIX_APPLY, _CUTMIX_SHARE = _offset(Stream.CUTMIX_APPLY), _offset(Stream.CUTMIX_SHARE)
_CUTMIX_X, _CUTMIX_Y = _offset(Stream.CUTMIX_X), _offset(Stream.CUTMIX_Y)
_CUTMIX_PARTNER = _offset(Stream.CUTMIX_PARTNER)


@triton.jit
def _bits(key: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """64 random bits, uint64, from a uint64 key and one of the offsets above."""
    x = key + stream
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _uniform(key: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """float64 in [0, 1)."""
    return (_bits(key, stream) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _chance(key: tl.tensor, stream: tl.constexpr, BELOW: tl.constexpr) -> tl.tensor:
    """Whether `uniform` is below p, for BELOW = ceil(p 2**53), since scalar arguments of a launch are float32."""
    return (_bits(key, stream) >> 11) < BELOW


@triton.jit
def _randint(key: tl.tensor, stream: tl.constexpr, high: tl.tensor) -> tl.tensor:
    """int32 in [0, high)."""
    return (((_bits(key, stream) >> 32) * high) >> 32).to(tl.int32)


@triton.jit
def _beta_share(u: tl.tensor, table: tl.tensor, KNOTS: tl.constexpr) -> tl.tensor:
    """`beta_share` of cutmix.py: bisection for the preceding knot, then linear interpolation to the next."""
    tl.static_assert(KNOTS == 2**13 + 1)
    left = u.to(tl.int32)  # 0
    for halving in tl.static_range(1, 14):
        half = (KNOTS - 1) >> halving
        left += tl.where(tl.load(table + left + half) <= u, half, 0)
    p_left, p_right = tl.load(table + left), tl.load(table + left + 1)
    s_left, s_right = tl.load(table + KNOTS + left), tl.load(table + KNOTS + left + 1)
    return s_left + (s_right - s_left) * ((u - p_left) / (p_right - p_left))


@triton.jit
def room_of(scratch: tl.tensor, sample: tl.tensor, ROOM: tl.constexpr) -> tl.tensor:
    """A sample's ROOM int64: its plan, a table of 256 levels per channel, and statistics of a large image's tiles."""
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
    """TrivialAugment's operation, bin and sign as a row of its tables; 0, the identity, for NUM_BINS = 0."""
    row = 0
    if NUM_BINS > 0:
        cell = _randint(key, _OPERATION, _NUM_OPS) * NUM_BINS + _randint(key, _MAGNITUDE, NUM_BINS)
        row = cell * 2 + (_bits(key, _SIGN) >> 63).to(tl.int32)
    return row


@triton.jit
def _start(key: tl.tensor, stream: tl.constexpr, PADDING: tl.constexpr) -> tl.tensor:
    """The column or row of the stored image at which the crop begins."""
    return _randint(key, stream, 2 * PADDING + 1) - PADDING


@triton.jit
def _image(index: tl.tensor, sample: tl.tensor, there: tl.tensor, GATHER: tl.constexpr) -> tl.tensor:
    """The index of the image at a position in the batch, int64."""
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
    """The positions drawn by `CutMix.plan`."""
    if BLOCK == 0:
        place = tl.load(partners + sample, there, other=0).to(tl.int32)
    else:
        start = sample // BLOCK * BLOCK
        size = tl.minimum(batch - start, BLOCK)
        step = 1 + _randint(key, _CUTMIX_PARTNER, tl.maximum(size - 1, 1))
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
    """Write CutMix's draws to the plan."""
    mixed = _chance(key, _CUTMIX_APPLY, MIX_BELOW)
    cut = _uniform(key, _CUTMIX_SHARE)
    if KNOTS > 0:
        cut = _beta_share(cut, beta, KNOTS)
    root = tl.sqrt(cut)
    half_x, half_y = (root * W).to(tl.int32) >> 1, (root * H).to(tl.int32) >> 1
    middle_x, middle_y = _randint(key, _CUTMIX_X, W), _randint(key, _CUTMIX_Y, H)
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
def _needs_statistics(op: tl.tensor, channel: tl.tensor) -> tl.tensor:
    """Whether an operation needs a channel's program; for Contrast, the first one reads all channels."""
    return (op == _AUTOCONTRAST) | (op == _EQUALIZE) | ((op == _CONTRAST) & (channel == 0))


@triton.jit
def _store_contrast(lut: tl.tensor, total: tl.tensor, term: tl.tensor, C: tl.constexpr, PIXELS: tl.constexpr) -> None:
    """Write Contrast's tables, a blend with the mean grey level, from the int64 sum and a pointer to its terms."""
    ramp, mean = tl.arange(0, 256), (total.to(tl.float64) / PIXELS).to(tl.float32)
    values = to_levels(tl.fma(mean, tl.load(term + 7), ramp.to(tl.float32) * tl.load(term + 6)))
    for channel in tl.static_range(C):
        tl.store(lut + channel * 256 + ramp, values)


@triton.jit
def _autocontrast_lut(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """One channel's range stretched to 0 to 255; a constant channel is unchanged."""
    ramp = tl.arange(0, 256)
    scale = tl.where(high > low, (high - low).to(tl.float32) * (1 / 255), 1.0)
    stretched = to_levels(tl.div_rn((ramp - low).to(tl.float32), tl.zeros([256], tl.float32) + scale))
    return tl.where(high > low, stretched, ramp)


@triton.jit
def _equalize_lut(counts: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """One channel's histogram equalized by Pillow's rule; the identity below 256 pixels."""
    ramp, upto = tl.arange(0, 256), tl.cumsum(counts, 0)
    level_step = tl.max(tl.where(upto == PIXELS, 0, upto), 0) // 255
    spread = (upto - counts + level_step // 2) // tl.maximum(level_step, 1)
    spread = tl.where(ramp == 0, 0, tl.minimum(spread, 255))
    return tl.where(level_step > 0, spread, ramp)


@triton.jit
def _level_counts(value: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The count of each level, [256]."""
    counts = tl.histogram(tl.where(mask, value, 0), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, tl.sum((mask == 0).to(tl.int32), 0), 0)


@triton.jit
def _observe(
    images: tl.tensor,
    left: tl.tensor,
    top: tl.tensor,
    op: tl.tensor,
    term: tl.tensor,
    room: tl.tensor,
    program: tl.tensor,
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
    """Write one tile's statistics: as the channel's table if it is the only tile, else for `luts_kernel`."""
    tiles: tl.constexpr = (H * W + TILE - 1) // TILE
    channel, ramp = program // tiles % C, tl.arange(0, 256)
    lut, found = luts_in(room) + channel * 256, _found_in(room, C) + program % (C * tiles) * 256
    pixel = program % tiles * TILE + tl.arange(0, TILE)
    mask, row = pixel < H * W, pixel // W
    column, row = left + (pixel - row * W), top + row
    if op == _CONTRAST:
        red, green, blue = read(images, column, row, mask, C, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL)
        grey = luma(red, green, blue).to(tl.int32) if C == 3 else red
        total = tl.sum(tl.where(mask, grey, 0), 0)  # int32 suffices for 2**23 pixels
        if tiles == 1:
            _store_contrast(lut, total.to(tl.int64), term, C, H * W)
        else:
            tl.store(found, total)
    else:
        images += channel * CHANNEL
        value, _, _ = read(images, column, row, mask, 1, H, W, CHANNEL, ROW, COLUMN, CROPPED, CROP_FILL)
        if op == _AUTOCONTRAST:
            low, high = tl.min(tl.where(mask, value, 255), 0), tl.max(tl.where(mask, value, 0), 0)
            if tiles == 1:
                tl.store(lut + ramp, _autocontrast_lut(low, high))
            else:
                tl.store(found, low)
                tl.store(found + 1, high)
        else:
            counts = _level_counts(value, mask)
            if tiles == 1:
                tl.store(lut + ramp, _equalize_lut(counts, H * W))
            else:
                tl.store(found + ramp, counts)


@Kernel
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["keys"])
def partners_kernel(
    keys: tl.tensor, partners: tl.tensor, batch: tl.tensor, SAMPLES: tl.constexpr, OTHERS: tl.constexpr
) -> None:
    """Mode "batch": each sample is the partner of the sample at its rank among all, ordered by their bits."""
    own = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    drawn = _bits(tl.load(keys + own, own < batch, other=0).to(tl.uint64), _CUTMIX_PARTNER).to(tl.int64, bitcast=True)
    rank = tl.zeros([SAMPLES], tl.int32)
    for start in range(0, batch, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(keys + other, other < batch, other=0).to(tl.uint64)
        theirs = _bits(theirs, _CUTMIX_PARTNER).to(tl.int64, bitcast=True)
        ties = (theirs[None, :] == drawn[:, None]) & (other[None, :] < own[:, None])
        before = ((theirs[None, :] < drawn[:, None]) | ties) & (other[None, :] < batch)
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(partners + rank, own.to(tl.int64), own < batch)


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
    """Programs for SAMPLES samples each, then those for statistics: (sample * C + channel) * tiles + tile.

    PADDING, FLIP_BELOW, NUM_BINS or MIX_BELOW is 0 if that stage is off.
    """
    tiles: tl.constexpr = (H * W + TILE - 1) // TILE
    program = tl.program_id(0) - (batch + SAMPLES - 1) // SAMPLES
    if program < 0:
        place = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
        there, plan = place < batch, room_of(scratch, place, ROOM)
        own_key = tl.load(keys + place, there, other=0).to(tl.uint64)
        image = _image(index, place, there, GATHER)
        flip = _chance(own_key, _FLIP, FLIP_BELOW).to(tl.int32)
        tl.store(plan + ORIGIN, image * image_stride, there)
        tl.store(plan + ROW_OF_TABLES, _row(own_key, NUM_BINS), there)
        tl.store(plan + STEP, 1 - 2 * flip, there)
        tl.store(plan + ACROSS, _start(own_key, _CROP_LEFT, PADDING) + flip * (W - 1), there)
        tl.store(plan + DOWN, _start(own_key, _CROP_TOP, PADDING), there)
        tl.store(plan + LABEL, tl.load(labels + image, there, other=0).to(tl.int64), there)
        if MIX_BELOW == 0:
            tl.store(plan + LAM, tl.full([SAMPLES], 0x3F800000, tl.int32), there)
        else:
            drawing = own_key if BLOCK > 0 else tl.load(keys).to(tl.uint64)
            _mix(place, there, drawing, partners, beta, plan, batch, H, W, MIX_BELOW, BLOCK, KNOTS)
    elif NUM_BINS > 0:
        sample, channel = program // (C * tiles), program // tiles % C
        key = tl.load(keys + sample).to(tl.uint64)
        op = _randint(key, _OPERATION, _NUM_OPS)
        if _needs_statistics(op, channel):
            _observe(
                images + _image(index, sample, True, GATHER) * image_stride,
                _start(key, _CROP_LEFT, PADDING),
                _start(key, _CROP_TOP, PADDING),
                op,
                terms + _row(key, NUM_BINS) * 8,
                room_of(scratch, sample, ROOM),
                program,
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
    """Only the programs for statistics, for a given plan, without crop and flip."""
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
            room,
            program,
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
    """Program sample * C + channel: the table of levels, from the statistics of MANY tiles at a time."""
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
            tl.store(lut + ramp, _equalize_lut(counts, PIXELS))
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
            tl.store(lut + ramp, _autocontrast_lut(tl.min(lows, 0), tl.max(highs, 0)))
