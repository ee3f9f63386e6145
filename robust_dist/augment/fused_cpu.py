"""The backend "native": the whole augmentation in one pass on the CPU, in C (native/fused.c).

The library is built with the package if there is a C compiler with OpenMP. It is called through ctypes, so it
depends on neither Python's nor torch's ABI, and it releases the GIL.
"""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from robust_dist import extras
from robust_dist.augment.keys import Stream, bits
from robust_dist.augment.layout import bits_of, memory_format

if TYPE_CHECKING:
    from robust_dist.augment.cutmix import CutMix, CutMixPlan
    from robust_dist.augment.pipeline import RobustAugment
    from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

INSTRUCTION_SETS = ("portable C", "AVX2", "AVX-512", "AVX-512 VBMI")
_LONGEST = 2**20  # pixels per side, the limit of rounding float32 coordinates
_NO_MIXING, _OF_EACH, _OF_BATCH = range(3)
_scales: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = WeakKeyDictionary()


class _Job(ctypes.Structure):
    """`job` of native/job.h."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("images", "index", "labels", "keys", "partner", "op", "magnitude_bin")),
        *((n, ctypes.c_void_p) for n in ("negative", "luts", "factors", "matrices", "fill", "beta", "scale")),
        *((n, ctypes.c_void_p) for n in ("scale_bytes", "out", "targets")),
        *((n, ctypes.c_double) for n in ("flip_p", "cutmix_p")),
        *((n, ctypes.c_int64) for n in ("batch", "channels", "height", "width", "classes", "block", "knots", "bins")),
        *((n, ctypes.c_int32) for n in ("images_last", "out_last", "bytes", "threads", "cropped", "padding")),
        *((n, ctypes.c_int32) for n in ("padding_fill", "flipped", "trivial", "bilinear", "mixing")),
    ]


class _Pasting(ctypes.Structure):
    """`pasting` of native/job.h."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("images", "out", "partner", "box")),
        *((n, ctypes.c_int64) for n in ("batch", "planes", "height", "width", "pixel")),
        ("threads", ctypes.c_int32),
    ]


def _declare(found: Any) -> None:
    found.robust_dist_augment.argtypes = [ctypes.c_void_p, ctypes.c_int]
    found.robust_dist_paste.argtypes = [ctypes.c_void_p]
    found.robust_dist_paste.restype = None


@functools.cache
def _load() -> Any:
    """The library, or the reason why there is none."""
    return extras.load_library(Path(__file__).parent, _declare)


def missing() -> str | None:
    """The reason why the pass is not available; None if it is."""
    found = _load()
    return found if isinstance(found, str) else None


def runs_on(device: torch.device) -> bool:
    """Whether the pass supports tensors on `device`."""
    return device.type == "cpu"


def instruction_set() -> str:
    """The widest instruction set that both this processor and the library support."""
    return INSTRUCTION_SETS[_load().robust_dist_widest()]


class Call:
    """One call of the library: its arguments, and the tensors that must stay alive until it returns."""

    def __init__(self, images: Tensor, batch: int) -> None:
        """Take uint8 images [N, C, H, W] with any strides, for a batch of `batch` samples."""
        self.images_last = memory_format(images) == torch.channels_last
        images = images if self.images_last else images.contiguous()
        channels, height, width = images.shape[1:]
        if max(height, width) >= _LONGEST or height * width >= 2**31:
            raise ValueError(f'images of {height} x {width} pixels are too large for backend="native": set "torch"')
        self.job = _Job(batch=batch, channels=channels, height=height, width=width, images_last=self.images_last)
        self.job.threads = torch.get_num_threads()
        self._kept: list[Tensor] = []
        self.images = images
        self.point(images=images)

    def point(self, **tensors: Tensor | None) -> None:
        """Set fields to the addresses of tensors, which are made contiguous except for images."""
        for name, tensor in tensors.items():
            if tensor is not None:
                kept = tensor if name in ("images", "out") else tensor.cpu().contiguous()
                self._kept.append(kept)
                setattr(self.job, name, kept.data_ptr())

    def trivial(self, stage: "TrivialAugment") -> None:
        """Request TrivialAugment's operations, drawn from the keys unless a plan is set."""
        stage.check_channels(self.images)
        cpu = torch.device("cpu")
        self.job.trivial, self.job.bilinear = 1, stage.interpolation == "bilinear"
        self.job.bins = stage.num_bins
        self.point(
            luts=stage.get_buffer("_luts"),
            factors=bits_of(stage, "_factors", torch.float32, cpu),
            matrices=bits_of(stage, "_matrices", torch.float64, cpu),
            fill=stage.get_buffer("_fill").expand(self.job.channels),
        )

    def mixing(self, stage: "CutMix", keys: Tensor) -> None:
        """Request CutMix with a plan drawn from the keys."""
        self.job.block, self.job.cutmix_p = stage.block, stage.p
        self.job.mixing = _OF_EACH if stage.mode == "elem" else _OF_BATCH
        if stage.mode == "batch":
            self.point(partner=torch.argsort(bits(keys, Stream.CUTMIX_PARTNER), stable=True))
        if stage.alpha != 1:
            table = bits_of(stage, "_beta", torch.float64, torch.device("cpu"))
            self.job.knots = table.shape[1]
            self.point(beta=table)

    def run(self, dtype: torch.dtype, form: torch.memory_format, widest: int | None = None) -> Tensor:
        """Return images in a dtype and memory format; `widest` limits the index into `INSTRUCTION_SETS`."""
        shape = (self.job.batch, self.job.channels, self.job.height, self.job.width)
        out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=form)
        self.job.out_last, self.job.bytes = form == torch.channels_last, out.element_size()
        self.point(out=out)
        native = _load()
        isa = native.robust_dist_widest() if widest is None else widest
        if out.numel() and native.robust_dist_augment(ctypes.byref(self.job), isa):
            raise MemoryError(f"no memory to augment images of {self.job.height} x {self.job.width} pixels")
        return out


def augment(
    pipeline: "RobustAugment",
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    index: Tensor | None,
    widest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See backends.py; `widest` as in `Call.run`."""
    labels = (labels if index is None else labels.index_select(0, index)).long()
    if index is not None and not images.is_contiguous(memory_format=memory_format(images)):
        images, index = images.index_select(0, index), None  # rather than a copy of the whole set
    call = Call(images, keys.shape[0])
    targets = torch.empty(keys.shape[0], pipeline.num_classes, dtype=torch.float32, device="cpu")
    scale, scale_bytes = _scale(pipeline)
    call.point(index=index, labels=labels, keys=keys, targets=targets, scale=scale, scale_bytes=scale_bytes)
    call.job.classes = pipeline.num_classes
    if pipeline.crop is not None:
        call.job.cropped, call.job.padding, call.job.padding_fill = 1, pipeline.crop.padding, int(pipeline.crop.fill)
    if pipeline.flip is not None:
        call.job.flipped, call.job.flip_p = 1, pipeline.flip.p
    if pipeline.trivial is not None:
        call.trivial(pipeline.trivial)
    if pipeline.cutmix is not None:
        call.mixing(pipeline.cutmix, keys)
    return call.run(pipeline.dtype, pipeline.out_format(images), widest), targets


def _scale(pipeline: "RobustAugment") -> tuple[Tensor, Tensor]:
    """The levels of each channel scaled by torch: [C, 256] in the pipeline's dtype, and as uint8 [C, bytes, 256]."""
    known = _scales.get(pipeline)
    if known is None or known[0].dtype != pipeline.dtype:
        channels = pipeline.image_shape[0]
        levels = _levels()[:256].view(1, 1, 16, 16).expand(1, channels, 16, 16)
        scale = pipeline.scaled(levels).contiguous().view(channels, 256, 1)
        known = _scales[pipeline] = scale, scale.view(torch.uint8).transpose(1, 2).contiguous()
    return known


@functools.cache
def _levels() -> Tensor:
    """The identity table for 3 channels."""
    return torch.arange(256, device="cpu").to(torch.uint8).repeat(3)


def trivial(stage: "TrivialAugment", images: Tensor, plan: "TrivialAugmentPlan", widest: int | None = None) -> Tensor:
    """`TrivialAugment.apply` for uint8 images; `widest` as in `Call.run`."""
    call = Call(images, images.shape[0])
    call.trivial(stage)
    call.point(op=plan.op, magnitude_bin=plan.magnitude_bin, negative=plan.negative)
    form = memory_format(images)
    if form == torch.channels_last:
        call.point(scale=_levels())
    return call.run(torch.uint8, form, widest)


def mix(images: Tensor, plan: "CutMixPlan") -> Tensor:
    """The pasting of `CutMix.apply`, for images of any dtype."""
    last = memory_format(images) == torch.channels_last
    images = images if last else images.contiguous()
    out, (batch, channels, height, width) = torch.empty_like(images), images.shape
    partner, box = plan.partner.contiguous(), plan.box.contiguous()
    pixel = images.element_size() * (channels if last else 1)
    pointers = (t.data_ptr() for t in (images, out, partner, box))
    asked = _Pasting(*pointers, batch, 1 if last else channels, height, width, pixel, torch.get_num_threads())
    _load().robust_dist_paste(ctypes.byref(asked))
    return out
