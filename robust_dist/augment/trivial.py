"""TrivialAugment (Mueller and Hutter 2021, "wide" space) on batches, with an operation for every sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from robust_dist.augment import levels, tables, warp
from robust_dist.augment.backends import check_backend, choose_stage
from robust_dist.augment.checks import check_range, check_vector, readable
from robust_dist.augment.keys import Stream, bits_of_each, to_int
from robust_dist.augment.layout import ImageStage, bits_of, from_grid, keep_bits, to_grid
from robust_dist.validate import one_of, whole_number


class Kind(IntEnum):
    """How an operation is computed; from LEVELS on, by a table from level to level."""

    NOTHING = 0
    WARP = 1
    COLOR = 2
    SHARPNESS = 3
    LEVELS = 4
    CONTRAST = 5
    AUTOCONTRAST = 6
    EQUALIZE = 7


class Masked:
    """Applies every function to every sample and selects with masks: static shapes, no synchronisation."""

    def __init__(self, kind: Tensor) -> None:
        """Take the `Kind` of each sample, int64 [B]."""
        self._kind = kind

    def update(
        self, out: Tensor, kinds: tuple[Kind, Kind], function: Callable[..., Tensor], *arguments: Tensor
    ) -> Tensor:
        """`out` with `function(*arguments)` in the samples whose kind is between two, inclusive."""
        mask = (self._kind >= int(kinds[0])) & (self._kind <= int(kinds[1]))
        return torch.where(mask.view(-1, *[1] * (out.dim() - 1)), function(*arguments), out)


class Grouped:
    """Applies each function only to its own samples, which are contiguous; modifies `out` in place."""

    def __init__(self, kind: Tensor, chunk: int) -> None:
        """Take the `Kind` of each sample, int64 [B], ascending, and the number of samples that fit the CPU's cache."""
        counts = torch.bincount(kind, minlength=len(Kind)).tolist()
        self._bounds = [0, *accumulate(counts)]
        self._chunk = chunk

    def update(
        self, out: Tensor, kinds: tuple[Kind, Kind], function: Callable[..., Tensor], *arguments: Tensor
    ) -> Tensor:
        """`out`, modified in place, with `function(*arguments)` in the samples between two kinds, inclusive."""
        start, stop = self._bounds[kinds[0]], self._bounds[kinds[1] + 1]
        pieces = -((start - stop) // self._chunk)
        for piece in range(pieces):
            part = slice(start + (stop - start) * piece // pieces, start + (stop - start) * (piece + 1) // pieces)
            out[part] = function(*(a[part] for a in arguments))
        return out


_KINDS = (
    Kind.NOTHING,
    *(Kind.WARP,) * 5,
    Kind.LEVELS,
    Kind.COLOR,
    Kind.CONTRAST,
    Kind.SHARPNESS,
    *(Kind.LEVELS,) * 2,
    Kind.AUTOCONTRAST,
    Kind.EQUALIZE,
)
_WARP = (Kind.WARP, Kind.WARP)
_COLOR = (Kind.COLOR, Kind.COLOR)
_SHARPNESS = (Kind.SHARPNESS, Kind.SHARPNESS)
_CONTRAST = (Kind.CONTRAST, Kind.CONTRAST)
_AUTOCONTRAST = (Kind.AUTOCONTRAST, Kind.AUTOCONTRAST)
_EQUALIZE = (Kind.EQUALIZE, Kind.EQUALIZE)
_TONE = (Kind.LEVELS, Kind.EQUALIZE)
_SMALL = 64 * 64  # pixels up to which the CPU caches the indices of all warps, at most 10 MB
_CHUNK = 2**19  # values of a group processed at a time on the CPU


@dataclass(frozen=True, eq=False)
class TrivialAugmentPlan:
    """The operation of each sample of a batch, on the images' device.

    Attributes:
        op: Index into `TrivialAugment.OPS`, int64 [B].
        magnitude_bin: Bin of the magnitude, int64 [B]; operations without a magnitude ignore it.
        negative: Whether the magnitude's sign is flipped, bool [B]; operations without a sign ignore it.
    """

    op: Tensor
    magnitude_bin: Tensor
    negative: Tensor


def _fill_values(fill: float | Sequence[float]) -> list[int]:
    values = list(fill) if isinstance(fill, Sequence) else [fill]
    if len(values) not in (1, 3) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError(f"fill must be a number, or one per channel (1 or 3), got {fill!r}")
    if any(not 0 <= v <= 255 or v != int(v) for v in values):
        raise ValueError(f"fill must be integer levels in [0, 255], got {fill!r}")
    return [int(v) for v in values]


class TrivialAugment(ImageStage):
    """One random operation of random strength for each sample, equal to torchvision's TrivialAugmentWide.

    Every operation gives the same bits as torchvision's uint8 tensor kernels with nearest interpolation, in eager and
    compiled code. On the CPU one pass in C computes them or, if that was not built, torch, grouped by operation; when
    compiled or on a device, shapes are static, nothing waits for the device, and `torch.compile(fullgraph=True)` and
    CUDA graphs capture it.

    Images have 1 or 3 channels. Floating-point images in [0, 1] are rounded to 256 levels, and the result is divided by
    255 in float32. On the CPU, uncompiled, a call raises ValueError for floating-point images outside [0, 1] and for
    operations and bins that do not exist; on a device such images are clamped, and such plans are undefined.

    Args:
        num_bins: Number of magnitudes, from none to the largest, at least 2.
        interpolation: "nearest" or "bilinear" for shear, translation and rotation. Bilinear differs from torchvision
            by one level at rounding ties, and at borders with a fill, which are too dark in torchvision.
        fill: Level outside the image, 0 to 255, for all channels or one per channel.
        backend: See `RobustAugment`.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For fewer than 2 bins, an unknown interpolation, or fill levels outside 0 to 255.
        RuntimeError: For an explicit backend that is not available; the message gives the reason.
    """

    OPS: tuple[str, ...] = tables.OPS

    def __init__(
        self,
        *,
        num_bins: int = 31,
        interpolation: str = "nearest",
        fill: float | Sequence[float] = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.num_bins = whole_number("num_bins", num_bins, 2)
        self.interpolation = one_of("interpolation", interpolation, ("nearest", "bilinear"))
        self._warps = slice(num_bins * 2 * self.OPS.index("ShearX"), num_bins * 2 * (self.OPS.index("Rotate") + 1))
        self._known: tuple[torch.Size, Tensor] | None = None
        self._channels = len(_fill_values(fill))
        self.register_buffer("_fill", torch.tensor(_fill_values(fill), dtype=torch.uint8), persistent=False)
        self.register_buffer("_luts", tables.lut_table(num_bins), persistent=False)
        self.register_buffer("_kinds", torch.tensor([int(k) for k in _KINDS]), persistent=False)
        keep_bits(self, "_matrices", tables.matrix_table(num_bins))
        keep_bits(self, "_factors", tables.factor_table(num_bins))

    def plan(self, keys: Tensor) -> TrivialAugmentPlan:
        """Draw an operation, a bin and a sign for each key, int64 [B]; three independent draws."""
        operation, magnitude, sign = bits_of_each(keys, Stream.OPERATION, Stream.SIGN).unbind(0)
        return TrivialAugmentPlan(
            op=to_int(operation, len(self.OPS)), magnitude_bin=to_int(magnitude, self.num_bins), negative=sign < 0
        )

    def _carry_out(self, images: Tensor, plan: TrivialAugmentPlan) -> Tensor:
        self._check(images, plan)
        if images.numel() == 0:
            return images.clone()
        grid = to_grid(images)
        _, operate = choose_stage(self.backend, images.device, "trivial")
        out = self._levels(grid.contiguous(), plan) if operate is None else operate(self, grid, plan)
        return from_grid(out, images.dtype)

    def backend_for(self, device: torch.device | str) -> str:
        """The backend that augments images on `device`: "torch", "native" or "triton"."""
        return choose_stage(self.backend, torch.device(device), "trivial")[0]

    def extra_repr(self) -> str:
        """The settings."""
        return f"num_bins={self.num_bins}, interpolation={self.interpolation!r}"

    def check_channels(self, images: Tensor) -> None:
        """Raise ValueError unless images [B, C, H, W] have 1 or 3 channels, and as many as a fill per channel."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
        if self._channels not in (1, images.shape[1]):
            raise ValueError(f"fill has {self._channels} channels, the images have {images.shape[1]}")

    def _check(self, images: Tensor, plan: TrivialAugmentPlan) -> None:
        self.check_channels(images)
        check_vector("plan.op", plan.op, images)
        check_vector("plan.magnitude_bin", plan.magnitude_bin, images)
        check_vector("plan.negative", plan.negative, images, torch.bool)
        check_range("plan.op", plan.op, len(self.OPS))
        check_range("plan.magnitude_bin", plan.magnitude_bin, self.num_bins)

    def _levels(self, images: Tensor, plan: TrivialAugmentPlan, grouped: bool | None = None) -> Tensor:
        """Apply the operations to contiguous uint8 images."""
        row = (plan.op * self.num_bins + plan.magnitude_bin) * 2 + plan.negative.long()
        kind = self.get_buffer("_kinds").to(images.device).index_select(0, plan.op)
        if not (readable(images) if grouped is None else grouped):
            return self._operate(images, row, Masked(kind))
        order = kind.argsort()
        groups = Grouped(kind, chunk=max(1, _CHUNK // images[0].numel()))
        out = self._operate(images.index_select(0, order), row.index_select(0, order), groups)
        return out.index_select(0, order.argsort())

    def _operate(self, images: Tensor, row: Tensor, groups: Masked | Grouped) -> Tensor:
        device = images.device
        factors = bits_of(self, "_factors", torch.float32, device).index_select(0, row)
        lut = self.get_buffer("_luts").to(device).index_select(0, row)
        lut = lut.unsqueeze(1).repeat(1, images.shape[1], 1)
        lut = groups.update(lut, _CONTRAST, levels.contrast_lut, images, factors)
        lut = groups.update(lut, _AUTOCONTRAST, levels.autocontrast_lut, images)
        lut = groups.update(lut, _EQUALIZE, levels.equalize_lut, images)
        out = self._warp(images, row, groups)
        out = groups.update(out, _COLOR, levels.color, images, factors)
        out = groups.update(out, _SHARPNESS, levels.sharpness, images, factors)
        return groups.update(out, _TONE, levels.look_up, images, lut)

    def _warp(self, images: Tensor, row: Tensor, groups: Masked | Grouped) -> Tensor:
        fill = self.get_buffer("_fill").to(images.device)
        if self.interpolation == "bilinear":
            terms = self._terms(row, images)
            return groups.update(images, _WARP, partial(warp.read_bilinear, fill=fill), images, *terms)
        if isinstance(groups, Grouped) and images.shape[2] * images.shape[3] <= _SMALL:
            return groups.update(images, _WARP, partial(self._read_known, fill=fill), images, row)

        def read(images: Tensor, *terms: Tensor) -> Tensor:
            return warp.read_nearest(images, warp.nearest_index(*terms), fill)

        return groups.update(images, _WARP, read, images, *self._terms(row, images))

    def _terms(self, row: Tensor, images: Tensor) -> warp.Terms:
        matrix = bits_of(self, "_matrices", torch.float64, images.device).index_select(0, row)
        return warp.grid_terms(matrix, images.shape[2], images.shape[3])

    def _read_known(self, images: Tensor, row: Tensor, fill: Tensor) -> Tensor:
        """Warp small images with cached indices of all warps, for the last image size."""
        known = self._known  # a local reference: another thread may process another image size
        if known is None or known[0] != images.shape[2:]:
            every = torch.arange(self._warps.start, self._warps.stop, device=row.device)
            known = self._known = (images.shape[2:], warp.nearest_index(*self._terms(every, images)))
        index = known[1].index_select(0, row - self._warps.start)
        return warp.read_nearest(images, index, fill)
