"""The augmentation on a GPU in two Triton launches: draws and statistics, then every pixel once.

It reads the stored uint8 images and writes the normalised ones; the launches exchange only a plan of 96 bytes per
sample and, for operations on levels, a table of 256 bytes per channel. The statistics of images above 64 x 64 are
computed in tiles and combined by a small launch in between. Nothing waits for the device, grids depend only on shapes,
and a CUDA graph can capture it after one call that compiles the kernels and copies the tables.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robust_dist.augment import warp
from robust_dist.augment.layout import bits_of, memory_format

if TYPE_CHECKING:
    from robust_dist.augment.crop_flip import RandomCrop
    from robust_dist.augment.pipeline import RobustAugment
    from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUADS = 128  # groups of four pixels at a time, one per thread of 4 warps; many warps with few registers hide latency
_REGISTERS = 96, 128  # per rendering thread, nearest or bilinear: the fewest without spilling
_PASSES = 8  # at most, per program for large images; one for small images, so that a few hundred fill a GPU
_SMALL = 64 * 64  # pixels of the largest small image
_STATISTICS = 4096  # pixels per tile of statistics, all loaded at once
_MANY = 16  # tiles combined at a time
_CLASSES = 1024
_RANKED = 32, 128  # samples per program, and samples they are compared with at a time
_PLAN = 12  # int64 per sample, see fused_triton_prepare.py
_RECORDS = 16  # cached launches per pipeline, by shapes, devices and settings
_FULL = 2**53
_EXACT = {"enable_fp_fusion": False}
_kept: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def missing() -> str | None:
    """The reason why the kernels are not available, e.g. no C compiler, which a launch needs; None if they are."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the kernels support only CUDA, and this torch was built for ROCm"
    oldest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if oldest < (7, 0):
        return f"a GPU has compute capability {oldest[0]}.{oldest[1]}, and Triton needs 7.0"
    return _no_launcher()


def runs_on(device: torch.device) -> bool:
    """Whether the kernels support tensors on `device`; Triton's interpreter also supports the CPU."""
    return device.type == "cuda" or _interpreted()


def augment(
    pipeline: "RobustAugment", images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See backends.py.

    The first call for a device and size compiles the kernels and copies tables to the device, which synchronises.
    """
    images = _addressable(images)
    alike = _alike(pipeline, images, labels, keys, index)
    records = _records.setdefault(pipeline, {})
    record = records.get(alike)
    if record is None:
        while len(records) >= _RECORDS:
            records.pop(next(iter(records)))
        record = records[alike] = _Record(alike, pipeline, images, keys, index)
    _last[pipeline] = record
    return record.run(images, labels, keys, index)


def repeat(
    pipeline: "RobustAugment", images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """See backends.py."""
    record = _last.get(pipeline)
    if record is None or record.alike != _alike(pipeline, images, labels, keys, index):
        return None
    return record.run(images, labels, keys, index)


def trivial(stage: "TrivialAugment", images: Tensor, plan: "TrivialAugmentPlan") -> Tensor:
    """Only TrivialAugment, for uint8 images [B, C, H, W] and a given plan."""
    batch, device = images.shape[0], images.device
    layout = memory_format(images)
    out = torch.empty(images.shape, dtype=torch.uint8, device=device, memory_format=layout)
    images, room = _addressable(images), _room(images)
    row = (plan.op * stage.num_bins + plan.magnitude_bin) * 2 + plan.negative
    here, none = torch.arange(batch, device=device), torch.zeros_like(row)
    scratch = torch.empty(batch, room, dtype=torch.int64, device=device)
    columns = here * images.stride(0), row, none + 1, none, none, here, *(none,) * (_PLAN - 6)
    scratch[:, :_PLAN] = torch.stack(columns, 1)
    scale = torch.arange(256, dtype=torch.uint8, device=device).repeat(3)
    terms, tables = _keep(stage, _terms, device, *images.shape[2:]), _keep(stage, _tables, device, images.shape[1])
    united = _unite(stage.num_bins, batch, images)
    with torch.cuda.device_of(images):
        _observe(stage.num_bins, images).start(images, terms, scratch)
        if united is not None:
            united.start(terms, scratch)
        rendered = _render(batch, images, layout, stage, crop=None, mixed=False, num_classes=0)
        rendered.start(images, out, out, scratch, tables, terms, scale)
    return out


class _Launch(NamedTuple):
    """A kernel and its arguments other than tensors: the constants for which it is compiled, in order."""

    kernel: Any
    grid: tuple[int]
    constants: tuple[Any, ...]
    options: dict[str, Any]

    def start(self, *tensors: Tensor) -> None:
        self.kernel[self.grid](*tensors, *self.constants, **self.options)


class _Record:
    """The launches for calls with equal shapes, dtypes and settings, so that the host decides once."""

    def __init__(
        self, alike: tuple[Any, ...], pipeline: "RobustAugment", images: Tensor, keys: Tensor, index: Tensor | None
    ) -> None:
        trivial, cutmix, device = pipeline.trivial, pipeline.cutmix, images.device
        if trivial is not None:
            trivial.check_channels(images)
        batch, (channels, height, width) = keys.shape[0], images.shape[1:]
        self.alike, self.batch, self.device = alike, batch, device
        self.out, self.dtype, self.layout = (batch, *images.shape[1:]), pipeline.dtype, pipeline.out_format(images)
        self.targets, self.scratch = (batch, pipeline.num_classes), (batch, _room(images))
        self.ranked = cutmix is not None and cutmix.mode == "batch"
        self.beta = self.terms = self.tables = None
        if cutmix is not None and cutmix.alpha != 1:
            self.beta = _keep(cutmix, bits_of, "_beta", torch.float64, device)
        if trivial is not None:
            self.terms = _keep(trivial, _terms, device, height, width)
            self.tables = _keep(trivial, _tables, device, channels)
        self.scale = _keep(pipeline, _scale, device, pipeline.dtype)
        self.prepare = _prepare(pipeline, images, batch, gather=index is not None)
        self.unite = None if trivial is None else _unite(trivial.num_bins, batch, images)
        mixed = cutmix is not None and _below(cutmix.p) > 0
        self.render = _render(
            batch, images, self.layout, trivial, crop=pipeline.crop, mixed=mixed, num_classes=pipeline.num_classes
        )

    def run(self, images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Augment a batch."""
        device = self.device
        out = torch.empty(self.out, dtype=self.dtype, device=device, memory_format=self.layout)
        targets = torch.empty(self.targets, dtype=torch.float32, device=device)
        if self.batch:
            scratch = torch.empty(self.scratch, dtype=torch.int64, device=device)
            keys, terms = keys.contiguous(), scratch if self.terms is None else self.terms
            index = keys if index is None else index.contiguous()
            beta, tables = keys if self.beta is None else self.beta, scratch if self.tables is None else self.tables
            with torch.cuda.device_of(images):
                partners = _partners(keys) if self.ranked else keys
                self.prepare.start(images, labels.contiguous(), keys, index, partners, beta, terms, scratch)
                if self.unite is not None:
                    self.unite.start(terms, scratch)
                self.render.start(images, out, targets, scratch, tables, terms, self.scale)
        return out, targets


_records: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Record]] = WeakKeyDictionary()
_last: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


def _alike(
    pipeline: "RobustAugment", images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None
) -> tuple[Any, ...]:
    """A key of a call, without its tensors' values: equal keys launch the same kernels."""
    crop, flip, trivial, cutmix = pipeline.crop, pipeline.flip, pipeline.trivial, pipeline.cutmix
    return (
        images.shape,
        images.stride(),
        images.dtype,
        images.device,
        labels.shape,
        labels.dtype,
        labels.device,
        keys.shape,
        keys.dtype,
        keys.device,
        None if index is None else (index.shape, index.dtype, index.device),
        pipeline.training,
        pipeline.backend,
        pipeline.dtype,
        pipeline.channels_last,
        pipeline.num_classes,
        pipeline.size,
        None if crop is None else (crop, crop.padding, crop.fill),
        None if flip is None else (flip, flip.p),
        None if trivial is None else (trivial, trivial.num_bins, trivial.interpolation),
        None if cutmix is None else (cutmix, cutmix.p, cutmix.mode, cutmix.block, cutmix.alpha),
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _no_launcher() -> str | None:
    """The reason why Triton cannot build its launcher, C code that is compiled with Python's headers at first use."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot launch kernels: {error}"
    return None


def _addressable(images: Tensor) -> Tensor:
    """Images whose pixels are within 2**31 elements of the first, copied if they are not."""
    spread = sum(stride * (size - 1) for stride, size in zip(images.stride()[1:], images.shape[1:], strict=True))
    return images if spread < 2**31 else images.contiguous()


def _keep(module: nn.Module, make: Callable[..., Any], *arguments: Any) -> Any:
    """`make(module, *arguments)`, cached as long as the module exists."""
    known, key = _kept.setdefault(module, {}), (make, *arguments)
    if key not in known:
        known[key] = make(module, *arguments)
    return known[key]


def _terms(trivial: nn.Module, device: torch.device, height: int, width: int) -> Tensor:
    """The six values of `warp.grid_slopes` and the two factors of each row, float32 [rows, 8]."""
    cpu = torch.device("cpu")
    slopes = warp.grid_slopes(bits_of(trivial, "_matrices", torch.float64, cpu), height, width)
    return torch.cat([*slopes, bits_of(trivial, "_factors", torch.float32, cpu)], 1).to(device)


def _tables(trivial: nn.Module, device: torch.device, channels: int) -> Tensor:
    """The tables of levels that do not depend on the image, uint8 [rows, C, 256]."""
    return trivial.get_buffer("_luts").unsqueeze(1).repeat(1, channels, 1).to(device)


def _fill(trivial: nn.Module) -> int:
    """The fill levels of three channels as the bytes of one integer."""
    red, green, blue = trivial.get_buffer("_fill").expand(3).tolist()
    return int(red + green * 256 + blue * 65536)


def _scale(pipeline: "RobustAugment", device: torch.device, dtype: torch.dtype) -> Tensor:
    """The scaled levels of each channel, [C, 256], as integer bits; from the CPU, which divides exactly."""
    levels = torch.arange(256, dtype=torch.uint8, device="cpu").expand(1, pipeline.image_shape[0], 1, 256)
    scaled = pipeline.scaled(levels).to(dtype).contiguous().flatten(0, 2)
    return scaled.view(_BITS[dtype.itemsize]).to(device)


def _below(p: float) -> int:
    """How many of the 2**53 uniform draws are below p."""
    return math.ceil(p * _FULL)


def _tiles(images: Tensor) -> int:
    """The number of tiles for an image's statistics."""
    return -(-images.shape[2] * images.shape[3] // _STATISTICS)


def _room(images: Tensor) -> int:
    """Scratch per sample in int64: its plan, its channels' tables, and the statistics of a large image's tiles."""
    channels, tiles = images.shape[1], _tiles(images)
    return _PLAN + channels * 32 + (channels * tiles * 128 if tiles > 1 else 0)


def _geometry(images: Tensor) -> dict[str, int]:
    """The sizes and strides of the images, for which kernels are compiled."""
    channels, height, width = images.shape[1:]
    strides = dict(zip(("CHANNEL", "ROW", "COLUMN"), images.stride()[1:], strict=True))
    return {"C": channels, "H": height, "W": width, **strides}


def _passes(quads: int, small: bool) -> int:
    """The number of passes of `_QUADS` groups of four pixels per program, without a remainder if possible."""
    whole = [passes for passes in range(2, _PASSES + 1) if quads % (_QUADS * passes) == 0]
    return 1 if small else max(whole, default=_PASSES // 2)


def _power(count: int, largest: int) -> int:
    """The smallest power of two that is at least `count`, from 128 to `largest`."""
    return min(largest, max(128, 2 ** (count - 1).bit_length()))


def _warps(tile: int) -> int:
    """Warps for 8 to 16 pixels per thread."""
    return min(8, max(1, tile // 256))


def _partners(keys: Tensor) -> Tensor:
    from robust_dist.augment.fused_triton_prepare import partners_kernel

    partners, (samples, others) = torch.empty_like(keys), _RANKED
    partners_kernel[(-(-keys.shape[0] // samples),)](keys, partners, keys.shape[0], samples, others)
    return partners


def _prepare(pipeline: "RobustAugment", images: Tensor, batch: int, gather: bool) -> _Launch:
    """The launch that writes the plans, and tables of levels or the tiles' statistics."""
    from robust_dist.augment.fused_triton_prepare import prepare_kernel

    channels, height, width = images.shape[1:]
    crop, flip, trivial, cutmix = pipeline.crop, pipeline.flip, pipeline.trivial, pipeline.cutmix
    tile = _power(height * width, _STATISTICS)
    samples, observers = 32 * _warps(tile), 0 if trivial is None else batch * channels * _tiles(images)
    beta = cutmix is not None and cutmix.alpha != 1
    constants = {
        "batch": batch,
        "image_stride": images.stride(0),
        **_geometry(images),
        "PADDING": 0 if crop is None else crop.padding,
        "CROP_FILL": 0 if crop is None else int(crop.fill),
        "FLIP_BELOW": 0 if flip is None else _below(flip.p),
        "NUM_BINS": 0 if trivial is None else trivial.num_bins,
        "MIX_BELOW": 0 if cutmix is None else _below(cutmix.p),
        "BLOCK": 1 if cutmix is None else cutmix.block * (cutmix.mode == "elem"),
        "KNOTS": cutmix.get_buffer("_beta").shape[1] if cutmix is not None and beta else 0,
        "GATHER": gather,
        "TILE": tile,
        "ROOM": _room(images),
        "SAMPLES": samples,
    }
    grid = (-(-batch // samples) + observers,)
    return _Launch(prepare_kernel, grid, tuple(constants.values()), {"num_warps": _warps(tile), **_EXACT})


def _observe(num_bins: int, images: Tensor) -> _Launch:
    """The launch that writes tables of levels, or the tiles' statistics, for given plans."""
    from robust_dist.augment.fused_triton_prepare import statistics_kernel

    batch, channels, tile = *images.shape[:2], _power(images.shape[2] * images.shape[3], _STATISTICS)
    constants = {**_geometry(images), "NUM_BINS": num_bins, "TILE": tile, "ROOM": _room(images)}
    grid = (batch * channels * _tiles(images),)
    return _Launch(statistics_kernel, grid, tuple(constants.values()), {"num_warps": _warps(tile), **_EXACT})


def _unite(num_bins: int, batch: int, images: Tensor) -> _Launch | None:
    """The launch that computes tables of levels from the tiles' statistics; None for small images, with one tile."""
    from robust_dist.augment.fused_triton_prepare import luts_kernel

    (channels, height, width), tiles = images.shape[1:], _tiles(images)
    if tiles == 1:
        return None
    constants = channels, height * width, num_bins, tiles, _MANY, _room(images)
    return _Launch(luts_kernel, (batch * channels,), constants, _EXACT)


def _render(
    batch: int,
    images: Tensor,
    layout: torch.memory_format,
    trivial: "TrivialAugment | None",
    *,
    crop: "RandomCrop | None",
    mixed: bool,
    num_classes: int,
) -> _Launch:
    """The launch that writes every pixel, and the targets."""
    from robust_dist.augment.fused_triton_pixels import pixels_kernel

    (channels, height, width), quads = images.shape[1:], images.shape[2] * -(-images.shape[3] // 4)
    passes = _passes(quads, height * width <= _SMALL)
    bilinear = trivial is not None and trivial.interpolation == "bilinear"
    constants = {
        **_geometry(images),
        "CROPPED": crop is not None and crop.padding > 0,
        "CROP_FILL": 0 if crop is None else int(crop.fill),
        "FILL": 0 if trivial is None else _keep(trivial, _fill),
        "NUM_BINS": 0 if trivial is None else trivial.num_bins,
        "BILINEAR": bilinear,
        "MIXED": mixed,
        "CHANNELS_LAST": layout == torch.channels_last and channels > 1,
        "NUM_CLASSES": num_classes,
        "CLASSES": _power(num_classes, _CLASSES),
        "ROOM": _room(images),
        "TILE": _QUADS * passes,
        "QUADS": _QUADS,
    }
    grid = (batch * -(-quads // (_QUADS * passes)),)
    return _Launch(pixels_kernel, grid, tuple(constants.values()), {"maxnreg": _REGISTERS[bilinear], **_EXACT})
