"""The first launch: each sample's draws, its targets, and a table of levels where its operation is one.

A program is one channel of one sample; most end after the draws. Only Contrast, AutoContrast and Equalize read pixels.
The plan of a sample is a row of int64, written here and read by the second launch.
"""

import triton
import triton.language as tl

from robust_dist.augment import fused_triton_draws as draws
from robust_dist.augment.fused_triton_draws import beta_share, chance, randint, uniform
from robust_dist.augment.fused_triton_statistics import autocontrast_lut, contrast_lut, equalize_lut
from robust_dist.augment.tables import OP, OPS
from robust_dist.triton_launch import Kernel

_BRIGHTNESS, _CONTRAST = tl.constexpr(OP["Brightness"]), tl.constexpr(OP["Contrast"])
_AUTOCONTRAST, _EQUALIZE = tl.constexpr(OP["AutoContrast"]), tl.constexpr(OP["Equalize"])
_POSTERIZE, _SOLARIZE = tl.constexpr(OP["Posterize"]), tl.constexpr(OP["Solarize"])
_NUM_OPS = tl.constexpr(len(OPS))

# Columns of the plan: the image's first pixel in elements of the store, the row of TrivialAugment's tables, the sign of
# a step to the right, the column and the row where reading starts, the partner, and the box.
ORIGIN, ROW, STEP, ACROSS, DOWN, PARTNER, X1, Y1, X2, Y2 = (tl.constexpr(c) for c in range(10))
COLUMNS = tl.constexpr(10)


@triton.jit
def _row(key: tl.tensor, NUM_BINS: tl.constexpr) -> tl.tensor:
    """TrivialAugment's operation, bin and sign as a row of its tables; 0, nothing, for NUM_BINS = 0."""
    row = 0
    if NUM_BINS > 0:
        cell = randint(key, draws.OPERATION, _NUM_OPS) * NUM_BINS + randint(key, draws.MAGNITUDE, NUM_BINS)
        row = cell * 2 + (draws.bits(key, draws.SIGN) >> 63).to(tl.int32)
    return row


@triton.jit
def _partner(
    sample: tl.tensor, key: tl.tensor, partners: tl.tensor, batch: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The place that `CutMix.plan` draws."""
    if BLOCK == 0:
        place = tl.load(partners + sample).to(tl.int32)
    else:
        start = sample // BLOCK * BLOCK
        size = tl.minimum(batch - start, BLOCK)
        step = 1 + randint(key, draws.CUTMIX_PARTNER, tl.maximum(size - 1, 1))
        place = start + (sample - start + step) % size
    return place


@triton.jit
def _store_targets(
    targets: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    lam: tl.tensor,
    NUM_CLASSES: tl.constexpr,
    CLASSES: tl.constexpr,
) -> None:
    rest = tl.where(own == other, 1.0, 1.0 - lam)
    for start in range(0, NUM_CLASSES, CLASSES):
        label = start + tl.arange(0, CLASSES)
        share = tl.where(label == other, rest, tl.where(label == own, lam, 0.0))
        tl.store(targets + label, share, label < NUM_CLASSES)


@triton.jit
def _image(index: tl.tensor, sample: tl.tensor, GATHER: tl.constexpr) -> tl.tensor:
    """The image of a place in the batch, int64."""
    if GATHER:
        image = tl.load(index + sample)
    else:
        image = sample.to(tl.int64)
    return image


@triton.jit
def _mix(
    sample: tl.tensor,
    keys: tl.tensor,
    partners: tl.tensor,
    beta: tl.tensor,
    plan: tl.tensor,
    batch: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    MIX_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOTS: tl.constexpr,
) -> tl.tensor:
    """CutMix's draws to the plan; gives the partner and the pixels of the box."""
    key = tl.load(keys + (sample if BLOCK > 0 else 0)).to(tl.uint64)
    mixed = chance(key, draws.CUTMIX_APPLY, MIX_BELOW)
    cut = uniform(key, draws.CUTMIX_SHARE)
    if KNOTS > 0:
        cut = beta_share(cut, beta, KNOTS)
    root = tl.sqrt(cut)
    half_x, half_y = (root * W).to(tl.int32) >> 1, (root * H).to(tl.int32) >> 1
    middle_x, middle_y = randint(key, draws.CUTMIX_X, W), randint(key, draws.CUTMIX_Y, H)
    x1, y1 = tl.maximum(middle_x - half_x, 0), tl.maximum(middle_y - half_y, 0)
    x2, y2 = tl.minimum(middle_x + half_x, W), tl.minimum(middle_y + half_y, H)
    pixels = tl.where(mixed, (x2 - x1) * (y2 - y1), 0)
    partner = tl.where(mixed, _partner(sample, key, partners, batch, BLOCK), sample)
    tl.store(plan + PARTNER, partner)
    tl.store(plan + X1, x1)
    tl.store(plan + Y1, y1)
    tl.store(plan + X2, tl.where(mixed, x2, x1))
    tl.store(plan + Y2, y2)
    return partner, pixels


@triton.jit
def _write_lut(
    images: tl.tensor,
    step: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    row: tl.tensor,
    channel: tl.tensor,
    tables: tl.tensor,
    terms: tl.tensor,
    lut: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CROP_FILL: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The table of one channel where the row's operation is one; Contrast's first channel writes those of all."""
    op, ramp = row // (2 * NUM_BINS), tl.arange(0, 256)
    if (op == _BRIGHTNESS) | (op == _POSTERIZE) | (op == _SOLARIZE):
        tl.store(lut + ramp, tl.load(tables + row * 256 + ramp))
    if (op == _CONTRAST) & (channel == 0):
        f, rest = tl.load(terms + row * 8 + 6), tl.load(terms + row * 8 + 7)
        values = contrast_lut(
            images, step, across, down, channel_stride, row_stride, column_stride, f, rest, C, H, W, CROP_FILL, TILE
        )
        for other in tl.static_range(C):
            tl.store(lut + other * 256 + ramp, values)
    first = images + channel * channel_stride
    if op == _AUTOCONTRAST:
        values = autocontrast_lut(first, step, across, down, row_stride, column_stride, H, W, CROP_FILL, TILE)
        tl.store(lut + ramp, values)
    if op == _EQUALIZE:
        values = equalize_lut(first, step, across, down, row_stride, column_stride, H, W, CROP_FILL, TILE)
        tl.store(lut + ramp, values)


# Slices of a set start anywhere, and nothing here loads wider than its element: their alignment compiles nothing anew.
_ANYWHERE = ["images", "labels", "keys", "index", "partners", "beta"]


@Kernel
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=_ANYWHERE)
def prepare_kernel(
    images: tl.tensor,
    labels: tl.tensor,
    keys: tl.tensor,
    index: tl.tensor,
    partners: tl.tensor,
    beta: tl.tensor,
    tables: tl.tensor,
    terms: tl.tensor,
    plan: tl.tensor,
    luts: tl.tensor,
    targets: tl.tensor,
    batch: tl.tensor,
    image_stride: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PADDING: tl.constexpr,
    CROP_FILL: tl.constexpr,
    FLIP_BELOW: tl.constexpr,
    NUM_BINS: tl.constexpr,
    MIX_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOTS: tl.constexpr,
    GATHER: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    CLASSES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program sample * C + channel. A stage that is off: PADDING, FLIP_BELOW, NUM_BINS or MIX_BELOW is 0."""
    sample, channel = tl.program_id(0) // C, tl.program_id(0) % C
    key = tl.load(keys + sample).to(tl.uint64)
    row = _row(key, NUM_BINS)
    flip = chance(key, draws.FLIP, FLIP_BELOW).to(tl.int32)
    across = randint(key, draws.CROP_LEFT, 2 * PADDING + 1) - PADDING + flip * (W - 1)
    down = randint(key, draws.CROP_TOP, 2 * PADDING + 1) - PADDING
    step = 1 - 2 * flip
    image = _image(index, sample, GATHER)
    if channel == 0:
        own = plan + sample * COLUMNS
        tl.store(own + ORIGIN, image * image_stride)
        tl.store(own + ROW, row)
        tl.store(own + STEP, step)
        tl.store(own + ACROSS, across)
        tl.store(own + DOWN, down)
        partner, pixels = _mix(sample, keys, partners, beta, own, batch, H, W, MIX_BELOW, BLOCK, KNOTS)
        lam = tl.div_rn((H * W - pixels).to(tl.float32), H * W * 1.0)
        label, other = tl.load(labels + image), tl.load(labels + _image(index, partner, GATHER))
        _store_targets(targets + sample.to(tl.int64) * NUM_CLASSES, label, other, lam, NUM_CLASSES, CLASSES)
    if NUM_BINS > 0:
        _write_lut(
            images + image * image_stride,
            step,
            across,
            down,
            row,
            channel,
            tables,
            terms,
            luts + tl.program_id(0) * 256,
            channel_stride,
            row_stride,
            column_stride,
            C,
            H,
            W,
            CROP_FILL,
            NUM_BINS,
            TILE,
        )


@Kernel
@triton.jit
def luts_kernel(
    images: tl.tensor,
    tables: tl.tensor,
    terms: tl.tensor,
    plan: tl.tensor,
    luts: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program sample * C + channel: the tables alone, for a plan that is given, without crop and flip."""
    own = plan + tl.program_id(0) // C * COLUMNS
    _write_lut(
        images + tl.load(own + ORIGIN),
        1,
        0,
        0,
        tl.load(own + ROW).to(tl.int32),
        tl.program_id(0) % C,
        tables,
        terms,
        luts + tl.program_id(0) * 256,
        channel_stride,
        row_stride,
        column_stride,
        C,
        H,
        W,
        0,
        NUM_BINS,
        TILE,
    )
