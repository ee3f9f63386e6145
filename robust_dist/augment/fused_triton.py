"""The augmentation on a GPU in two launches by Triton: draws and statistics, then every pixel, once.

Read are the stored uint8 images, written are the normalised ones: nothing is kept in between but a plan of 96 bytes a
sample and, for operations on levels, a table of 256 bytes a channel. Statistics of images above 64 x 64 are taken by
tiles, which a small launch in between brings together. Nothing waits for the device, grids depend on shapes alone, and
a CUDA graph captures it after one call that compiles and copies the tables.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
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
_QUADS = 128  # fours of pixels at a time, one a thread of 4 warps: with few registers, many warps hide the latency
_REGISTERS = 96  # of a thread that renders: 5 programs of 512 pixels to a multiprocessor, and none kept in memory
_PASSES = 8  # at most, of a program for large images; one for small ones, so that a few hundred fill a GPU
_SMALL = 64 * 64  # pixels of the largest small image
_STATISTICS = 4096  # pixels of a tile of statistics: all are read before any is waited for
_MANY = 16  # tiles brought together at a time
_CLASSES = 1024
_RANKED = 32, 128  # samples of a program, and those they are compared with at a time
_COLUMNS = 12  # of the plan, as in fused_triton_prepare.py
_FULL = 2**53
_EXACT = {"enable_fp_fusion": False}
_kept: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def missing() -> str | None:
    """Why the kernels cannot be used here; None where they can. Looks for a C compiler, too, as a launch needs one."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are compiled for CUDA alone, and this torch is ROCm's"
    oldest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if oldest < (7, 0):
        return f"a GPU has compute capability {oldest[0]}.{oldest[1]}, and Triton needs 7.0"
    return _no_launcher()


def runs_on(device: torch.device) -> bool:
    """Whether the kernels take tensors of `device`; Triton's interpreter takes the CPU's, too."""
    return device.type == "cuda" or _interpreted()


def augment(
    pipeline: "RobustAugment", images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See robust_dist/augment/backends.py.

    The first call for a device and size compiles the kernels and copies tables to the device, which waits.
    """
    if pipeline.trivial is not None:
        pipeline.trivial.check_channels(images)
    batch, device = keys.shape[0], images.device
    layout = pipeline.out_format(images)
    out = torch.empty((batch, *images.shape[1:]), dtype=pipeline.dtype, device=device, memory_format=layout)
    targets = torch.empty(batch, pipeline.num_classes, device=device)
    if batch:
        images, scratch = _addressable(images), _scratch(batch, images)
        scale = _keep(pipeline, _scale, device, pipeline.dtype)
        with torch.cuda.device_of(images):
            _prepare(pipeline, images, labels, keys, index, scratch)
            mixed = pipeline.cutmix is not None and _below(pipeline.cutmix.p) > 0
            _render(images, scratch, scale, out, targets, pipeline.trivial, pipeline.crop, mixed)
    return out, targets


def trivial(stage: "TrivialAugment", images: Tensor, plan: "TrivialAugmentPlan") -> Tensor:
    """TrivialAugment alone, on uint8 images [B, C, H, W] with a plan that is given."""
    batch, device = images.shape[0], images.device
    out = torch.empty(images.shape, dtype=torch.uint8, device=device, memory_format=memory_format(images))
    images, scratch = _addressable(images), _scratch(batch, images)
    row = (plan.op * stage.num_bins + plan.magnitude_bin) * 2 + plan.negative
    here, none = torch.arange(batch, device=device), torch.zeros_like(row)
    columns = here * images.stride(0), row, none + 1, none, none, here, *(none,) * 6
    scratch = torch.stack(columns, 1), *scratch[1:]
    scale = torch.arange(256, dtype=torch.uint8, device=device).repeat(3)
    with torch.cuda.device_of(images):
        _observe(stage, images, scratch)
        _render(images, scratch, scale, out, out, stage, None, False)
    return out


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _no_launcher() -> str | None:
    """Why Triton cannot build what launches kernels: it compiles C against Python's headers at its first use."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot launch kernels: {error}"
    return None


def _addressable(images: Tensor) -> Tensor:
    """Images whose pixels lie within 2**31 places of their first one, copied where they do not."""
    spread = sum(stride * (size - 1) for stride, size in zip(images.stride()[1:], images.shape[1:], strict=True))
    return images if spread < 2**31 else images.contiguous()


def _keep(module: nn.Module, make: Callable[..., Any], *arguments: Any) -> Any:
    """`make(module, *arguments)`, made once for as long as the module lives."""
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
    """The tables of levels that no image changes, uint8 [rows, C, 256]."""
    return trivial.get_buffer("_luts").unsqueeze(1).repeat(1, channels, 1).to(device)


def _fill(trivial: nn.Module) -> int:
    """The levels of three channels as the bytes of one number."""
    red, green, blue = trivial.get_buffer("_fill").expand(3).tolist()
    return int(red + green * 256 + blue * 65536)


def _scale(pipeline: "RobustAugment", device: torch.device, dtype: torch.dtype) -> Tensor:
    """What becomes of each level of each channel, [C, 256], as integers of the same bits; a CPU divides exactly."""
    levels = torch.arange(256, dtype=torch.uint8, device="cpu").expand(1, pipeline.image_shape[0], 1, 256)
    scaled = pipeline.scaled(levels).to(dtype).contiguous().flatten(0, 2)
    return scaled.view(_BITS[dtype.itemsize]).to(device)


def _below(p: float) -> int:
    """Of the 2**53 uniform draws, how many lie below p."""
    return math.ceil(p * _FULL)


def _scratch(batch: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the plan, int64, the levels' tables, uint8, and what tiles find in large images, int32."""
    device, rows = images.device, batch * images.shape[1]
    luts, tiles = torch.empty(rows, 256, dtype=torch.uint8, device=device), _tiles(images)
    plan = torch.empty(batch, _COLUMNS, dtype=torch.int64, device=device)
    found = luts if tiles == 1 else torch.empty(rows * tiles, 256, dtype=torch.int32, device=device)
    return plan, luts, found


def _tiles(images: Tensor) -> int:
    """Into how many tiles of statistics an image falls."""
    return -(-images.shape[2] * images.shape[3] // _STATISTICS)


def _geometry(images: Tensor) -> dict[str, int]:
    """What kernels know of the images when they are compiled."""
    channels, height, width = images.shape[1:]
    strides = dict(zip(("CHANNEL", "ROW", "COLUMN"), images.stride()[1:], strict=True))
    return {"C": channels, "H": height, "W": width, **strides}


def _passes(quads: int, small: bool) -> int:
    """How often a program renders `_QUADS` fours of pixels: so that none is left over, where that can be."""
    whole = [passes for passes in range(2, _PASSES + 1) if quads % (_QUADS * passes) == 0]
    return 1 if small else max(whole, default=_PASSES // 2)


def _power(count: int, largest: int) -> int:
    """The smallest power of two that is at least `count`, from 128 to `largest`."""
    return min(largest, max(128, 2 ** (count - 1).bit_length()))


def _warps(tile: int) -> int:
    """8 to 16 pixels a thread: few rounds, and as many draws to a program as it has threads."""
    return min(8, max(1, tile // 256))


def _partners(keys: Tensor) -> Tensor:
    from robust_dist.augment.fused_triton_draws import partners_kernel

    partners, (samples, others) = torch.empty_like(keys), _RANKED
    partners_kernel[(-(-keys.shape[0] // samples),)](keys, partners, keys.shape[0], samples, others)
    return partners


def _prepare(
    pipeline: "RobustAugment",
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    index: Tensor | None,
    scratch: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write each sample's plan and table of levels."""
    from robust_dist.augment.fused_triton_prepare import prepare_kernel

    (channels, height, width), batch = pipeline.image_shape, keys.shape[0]
    crop, flip, trivial, cutmix = pipeline.crop, pipeline.flip, pipeline.trivial, pipeline.cutmix
    keys, device, tile = keys.contiguous(), images.device, _power(height * width, _STATISTICS)
    mixing = cutmix is not None and cutmix.mode == "batch"
    beta = _keep(cutmix, bits_of, "_beta", torch.float64, device) if cutmix is not None and cutmix.alpha != 1 else None
    plan, luts, found = scratch
    samples, observers = 32 * _warps(tile), 0 if trivial is None else batch * channels * _tiles(images)
    prepare_kernel[(-(-batch // samples) + observers,)](
        images,
        labels.contiguous(),
        keys,
        keys if index is None else index.contiguous(),
        _partners(keys) if mixing else keys,
        keys if beta is None else beta,
        luts if trivial is None else _keep(trivial, _terms, device, height, width),
        plan,
        luts,
        found,
        batch,
        images.stride(0),
        **_geometry(images),
        PADDING=0 if crop is None else crop.padding,
        CROP_FILL=0 if crop is None else int(crop.fill),
        FLIP_BELOW=0 if flip is None else _below(flip.p),
        NUM_BINS=0 if trivial is None else trivial.num_bins,
        MIX_BELOW=0 if cutmix is None else _below(cutmix.p),
        BLOCK=1 if cutmix is None else cutmix.block * (cutmix.mode == "elem"),
        KNOTS=0 if beta is None else beta.shape[1],
        GATHER=index is not None,
        TILE=tile,
        SAMPLES=samples,
        num_warps=_warps(tile),
        **_EXACT,
    )
    if trivial is not None:
        _unite(trivial, images, scratch)


def _observe(stage: "TrivialAugment", images: Tensor, scratch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write the tables of levels of a plan."""
    from robust_dist.augment.fused_triton_prepare import statistics_kernel

    (batch, channels, height, width), device = images.shape, images.device
    tile = _power(height * width, _STATISTICS)
    statistics_kernel[(batch * channels * _tiles(images),)](
        images,
        _keep(stage, _terms, device, height, width),
        *scratch,
        **_geometry(images),
        NUM_BINS=stage.num_bins,
        TILE=tile,
        num_warps=_warps(tile),
        **_EXACT,
    )
    _unite(stage, images, scratch)


def _unite(stage: "TrivialAugment", images: Tensor, scratch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write the tables of levels from what the tiles of large images found."""
    from robust_dist.augment.fused_triton_prepare import luts_kernel

    (batch, channels, height, width), tiles = images.shape, _tiles(images)
    if tiles == 1:
        return
    luts_kernel[(batch * channels,)](
        _keep(stage, _terms, images.device, height, width),
        *scratch,
        C=channels,
        PIXELS=height * width,
        NUM_BINS=stage.num_bins,
        TILES=tiles,
        MANY=_MANY,
        **_EXACT,
    )


def _render(
    images: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    out: Tensor,
    targets: Tensor,
    trivial: "TrivialAugment | None",
    crop: "RandomCrop | None",
    mixed: bool,
) -> None:
    """Write every pixel that the plan names, and the targets unless they are the images themselves."""
    from robust_dist.augment.fused_triton_pixels import pixels_kernel

    (channels, height, width), device = images.shape[1:], images.device
    (plan, luts, _), quads = scratch, height * -(-width // 4)
    passes = _passes(quads, height * width <= _SMALL)
    classes = 0 if targets is out else targets.shape[1]
    pixels_kernel[(plan.shape[0] * -(-quads // (_QUADS * passes)),)](
        images,
        out.view(_BITS[out.element_size()]),
        targets,
        plan,
        luts,
        luts if trivial is None else _keep(trivial, _tables, device, channels),
        luts if trivial is None else _keep(trivial, _terms, device, height, width),
        scale,
        **_geometry(images),
        CROPPED=crop is not None and crop.padding > 0,
        CROP_FILL=0 if crop is None else int(crop.fill),
        FILL=0 if trivial is None else _keep(trivial, _fill),
        NUM_BINS=0 if trivial is None else trivial.num_bins,
        BILINEAR=trivial is not None and trivial.interpolation == "bilinear",
        MIXED=mixed,
        CHANNELS_LAST=not out.is_contiguous(),
        NUM_CLASSES=classes,
        CLASSES=_power(classes, _CLASSES),
        TILE=_QUADS * passes,
        QUADS=_QUADS,
        maxnreg=_REGISTERS,
        **_EXACT,
    )
