"""The augmentation on a GPU in two launches by Triton: draws and statistics, then every pixel, once.

Read are the stored uint8 images, written are the normalised ones: nothing is kept in between but a plan of 80 bytes a
sample and, for operations on levels, a table of 256 bytes a channel. Nothing waits for the device, grids depend on
shapes alone, and a CUDA graph captures it after one call that compiles and copies the tables.
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
    from robust_dist.augment.pipeline import RobustAugment
    from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LANES = 128  # pixels at a time, one a thread of 4 warps: with few registers, many warps hide the memory's latency
_TILES = 512, 1024  # pixels of a program, for small images so that a few hundred fill a GPU, and for larger ones
_SMALL = 64 * 64  # pixels of the largest small image
_STATISTICS = 4096  # pixels at a time: few rounds, whose latency is the launch's, as one sample in five has any
_CLASSES = 1024
_RANKED = 32, 128  # samples of a program, and those they are compared with at a time
_COLUMNS = 10  # of the plan, as in fused_triton_prepare.py
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
        images, plan, luts = _addressable(images), *_scratch(batch, images)
        scale = _keep(pipeline, _scale, device, pipeline.dtype)
        with torch.cuda.device_of(images):
            _prepare(pipeline, images, labels, keys, index, plan, luts, targets)
            _render(images, plan, luts, scale, out, pipeline.trivial, _crop_fill(pipeline))
    return out, targets


def trivial(stage: "TrivialAugment", images: Tensor, plan: "TrivialAugmentPlan") -> Tensor:
    """TrivialAugment alone, on uint8 images [B, C, H, W] with a plan that is given."""
    batch, device = images.shape[0], images.device
    out = torch.empty(images.shape, dtype=torch.uint8, device=device, memory_format=memory_format(images))
    images, _, luts = _addressable(images), *_scratch(batch, images)
    row = (plan.op * stage.num_bins + plan.magnitude_bin) * 2 + plan.negative
    here, none = torch.arange(batch, device=device), torch.zeros_like(row)
    columns = here * images.stride(0), row, none + 1, none, none, here, none, none, none, none
    table, scale = torch.stack(columns, 1), torch.arange(256, dtype=torch.uint8, device=device).repeat(3)
    with torch.cuda.device_of(images):
        _write_luts(stage, images, table, luts)
        _render(images, table, luts, scale, out, stage, 0)
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


def _luts(trivial: nn.Module, device: torch.device) -> Tensor:
    return trivial.get_buffer("_luts").to(device)


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


def _scratch(batch: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the plan, int64, and the levels' tables, uint8, of a batch."""
    luts = torch.empty(batch, images.shape[1], 256, dtype=torch.uint8, device=images.device)
    return torch.empty(batch, _COLUMNS, dtype=torch.int64, device=images.device), luts


def _crop_fill(pipeline: "RobustAugment") -> int:
    return 0 if pipeline.crop is None else int(pipeline.crop.fill)


def _power(count: int, largest: int) -> int:
    """The smallest power of two that is at least `count`, from 128 to `largest`."""
    return min(largest, max(128, 2 ** (count - 1).bit_length()))


def _warps(tile: int) -> int:
    """16 pixels a thread: most programs end after the draws, which each of their threads repeats."""
    return max(1, tile // 512)


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
    plan: Tensor,
    luts: Tensor,
    targets: Tensor,
) -> None:
    """Write each sample's plan, targets and levels."""
    from robust_dist.augment.fused_triton_prepare import prepare_kernel

    (channels, height, width), batch = pipeline.image_shape, keys.shape[0]
    crop, flip, trivial, cutmix = pipeline.crop, pipeline.flip, pipeline.trivial, pipeline.cutmix
    keys, device, tile = keys.contiguous(), images.device, _power(height * width, _STATISTICS)
    mixing = cutmix is not None and cutmix.mode == "batch"
    beta = _keep(cutmix, bits_of, "_beta", torch.float64, device) if cutmix is not None and cutmix.alpha != 1 else None
    prepare_kernel[(batch * channels,)](
        images,
        labels.contiguous(),
        keys,
        keys if index is None else index.contiguous(),
        _partners(keys) if mixing else keys,
        keys if beta is None else beta,
        luts if trivial is None else _keep(trivial, _luts, device),
        luts if trivial is None else _keep(trivial, _terms, device, height, width),
        plan,
        luts,
        targets,
        batch,
        *images.stride(),
        C=channels,
        H=height,
        W=width,
        PADDING=0 if crop is None else crop.padding,
        CROP_FILL=_crop_fill(pipeline),
        FLIP_BELOW=0 if flip is None else _below(flip.p),
        NUM_BINS=0 if trivial is None else trivial.num_bins,
        MIX_BELOW=0 if cutmix is None else _below(cutmix.p),
        BLOCK=1 if cutmix is None else cutmix.block * (cutmix.mode == "elem"),
        KNOTS=0 if beta is None else beta.shape[1],
        GATHER=index is not None,
        NUM_CLASSES=pipeline.num_classes,
        CLASSES=_power(pipeline.num_classes, _CLASSES),
        TILE=tile,
        num_warps=_warps(tile),
        **_EXACT,
    )


def _write_luts(stage: "TrivialAugment", images: Tensor, plan: Tensor, luts: Tensor) -> None:
    """Write the levels' tables of a plan."""
    from robust_dist.augment.fused_triton_prepare import luts_kernel

    (channels, height, width), device = images.shape[1:], images.device
    tile = _power(height * width, _STATISTICS)
    luts_kernel[(plan.shape[0] * channels,)](
        images,
        _keep(stage, _luts, device),
        _keep(stage, _terms, device, height, width),
        plan,
        luts,
        *images.stride()[1:],
        C=channels,
        H=height,
        W=width,
        NUM_BINS=stage.num_bins,
        TILE=tile,
        num_warps=_warps(tile),
        **_EXACT,
    )


def _render(
    images: Tensor,
    plan: Tensor,
    luts: Tensor,
    scale: Tensor,
    out: Tensor,
    trivial: "TrivialAugment | None",
    crop_fill: int,
) -> None:
    """Write every pixel that the plan names."""
    from robust_dist.augment.fused_triton_pixels import pixels_kernel

    (channels, height, width), device = images.shape[1:], images.device
    pixels = height * width
    tile = min(-(-pixels // _LANES) * _LANES, _TILES[pixels > _SMALL])
    pixels_kernel[(plan.shape[0] * -(-pixels // tile),)](
        images,
        out.view(_BITS[out.element_size()]),
        plan,
        luts,
        luts if trivial is None else _keep(trivial, _terms, device, height, width),
        scale,
        *images.stride()[1:],
        C=channels,
        H=height,
        W=width,
        CROP_FILL=crop_fill,
        FILL=0 if trivial is None else _keep(trivial, _fill),
        NUM_BINS=0 if trivial is None else trivial.num_bins,
        BILINEAR=trivial is not None and trivial.interpolation == "bilinear",
        CHANNELS_LAST=not out.is_contiguous(),
        TILE=tile,
        LANES=_LANES,
        **_EXACT,
    )
