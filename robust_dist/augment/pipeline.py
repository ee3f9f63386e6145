"""The paper's complete training augmentation as one module: crop, flip, TrivialAugment, CutMix, normalise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robust_dist.augment.backends import check_backend, choose, module_of
from robust_dist.augment.checks import check_images, check_index, check_labels, check_vector, readable
from robust_dist.augment.crop_flip import RandomCrop, RandomHorizontalFlip
from robust_dist.augment.cutmix import CutMix, soft_targets
from robust_dist.augment.keys import random_keys
from robust_dist.augment.layout import bits_of, keep_bits, memory_format, select, to_grid
from robust_dist.augment.trivial import TrivialAugment
from robust_dist.validate import whole_number

Repeat = Callable[["RobustAugment", Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be an int or (height, width), got {size!r}")
    return whole_number("size", sides[0], 1), whole_number("size", sides[1], 1)


def _channel_values(name: str, values: Sequence[float]) -> Tensor:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) not in (1, 3):
        raise ValueError(f"{name} must have one number for each of 1 or 3 channels, got {values!r}")
    tensor = torch.tensor([float(v) for v in values], dtype=torch.float32)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {values!r}")
    return tensor.view(1, -1, 1, 1)


class RobustAugment(nn.Module):
    """Turns uint8 images and labels into augmented, normalised images and soft targets.

    In training: crop, flip, TrivialAugment, CutMix, then (x / 255 - mean) / std and the cast. In `eval()`: only the
    last step, with one-hot targets. The stages are the attributes `crop`, `flip`, `trivial`, `cutmix`; None if off.
    The module's state_dict is empty.

    Args:
        num_classes: Number of classes C.
        size: Required side, or (height, width), of the images in pixels.
        mean: Mean of each channel, for values from 0 to 1; its length is the number of channels, 1 or 3.
        std: Standard deviation of each channel, above 0.
        crop: Padding of the random crop in pixels; None or 0 for no crop.
        flip: Whether images are flipped with probability 0.5.
        trivial: Whether TrivialAugment is applied.
        cutmix: Whether CutMix is applied; targets are soft in any case.
        dtype: Floating-point dtype of the returned images.
        cutmix_mode: "elem" or "batch", see `CutMix`.
        cutmix_alpha: See `CutMix`.
        cutmix_p: See `CutMix`.
        block: See `CutMix`.
        num_bins: See `TrivialAugment`.
        interpolation: See `TrivialAugment`.
        fill: Level outside the image, 0 to 255, for the crop and TrivialAugment; per channel only without a crop.
        channels_last: Whether returned images are channels_last; otherwise they have the memory format of the input.
        backend: "torch"; "native", one pass in C on the CPU; "triton", on a GPU; "auto", the fastest available backend
            for the images' device. All give the same bits.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range.
        RuntimeError: For an explicit backend that is not available; the message gives the reason.
    """

    def __init__(
        self,
        num_classes: int,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop: int | None = 4,
        flip: bool = True,
        trivial: bool = True,
        cutmix: bool = True,
        dtype: torch.dtype = torch.float32,
        cutmix_mode: str = "elem",
        cutmix_alpha: float = 1.0,
        cutmix_p: float = 1.0,
        block: int = 8,
        num_bins: int = 31,
        interpolation: str = "nearest",
        fill: float | Sequence[float] = 0,
        channels_last: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = whole_number("num_classes", num_classes, 1)
        self.size = _size(size)
        self._set_scale(mean, std, dtype)
        self.channels_last = channels_last
        self.backend = check_backend(backend)
        self._repeat: Repeat | None = None  # from the backend, after the first batch
        alone = "torch" if backend == "torch" else "auto"
        mixing = CutMix(num_classes, alpha=cutmix_alpha, p=cutmix_p, mode=cutmix_mode, block=block, backend=alone)
        operations = TrivialAugment(num_bins=num_bins, interpolation=interpolation, fill=fill, backend=alone)
        if crop and isinstance(fill, Sequence):
            raise ValueError(f"fill must be one level if crop is on, got {fill!r}: set crop=None")
        self.crop = RandomCrop(crop, fill=fill) if crop and not isinstance(fill, Sequence) else None
        self.flip = RandomHorizontalFlip() if flip else None
        self.trivial = operations if trivial else None
        self.cutmix = mixing if cutmix else None

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: uint8 [B, C, H, W] with the module's size, or floating-point in [0, 1], which is rounded to 256
                levels.
            labels: Class numbers, integers [B] on the images' device.
            keys: From `sample_keys`, int64 [B] on the images' device; None draws them.
            generator: Generator for drawing keys; None is torch's default generator.
            index: int64 [B] on the images' device. With it, images and labels are those of a whole dataset,
                [N, C, H, W] and [N], and the batch is images[index] and labels[index], gathered during augmentation.

        Returns:
            Images [B, C, H, W] in the module's dtype, and targets, float32 [B, num_classes].

        Raises:
            TypeError: For wrong dtypes.
            ValueError: For wrong shapes or devices; on the CPU, uncompiled, also for labels outside [0, C),
                floating-point images outside [0, 1] and an index outside the dataset.
            RuntimeError: For an explicit backend that does not support the images' device.
        """
        if not torch.compiler.is_compiling() and self._repeat is not None and keys is not None:
            known = self._repeat(self, images, labels, keys, index)
            if known is not None:
                return known
        self._check(images)
        if index is not None:
            check_index(index, images)
        check_labels(labels, images, self.num_classes)
        if index is not None and (not self.training or images.dtype != torch.uint8):
            images, labels, index = select(images, index), labels.index_select(0, index), None
        if not self.training:
            return self.normalize(images), soft_targets(labels, self.num_classes)
        batch = images if index is None else index
        if keys is None:
            keys = random_keys(batch.shape[0], generator, images.device)
        check_vector("keys", keys, batch)
        backend = self.backend_for(images.device)
        if backend == "torch":
            return self._by_torch(to_grid(images), labels, keys, index)
        module = module_of(backend)
        if not readable(images):
            self._repeat = getattr(module, "repeat", None)
        result: tuple[Tensor, Tensor] = module.augment(self, to_grid(images), labels, keys, index)
        return result

    def backend_for(self, device: torch.device | str) -> str:
        """The backend that augments images on `device`: "torch", "native" or "triton"."""
        if (strange := self._strange_stage()) is None:
            return choose(self.backend, torch.device(device))
        if self.backend not in ("auto", "torch"):
            raise RuntimeError(
                f'backend="{self.backend}" does not support a stage of type {strange}: set backend="auto"'
            )
        return "torch"

    def out_format(self, images: Tensor) -> torch.memory_format:
        """The memory format of the result for `images`."""
        return torch.channels_last if self.channels_last else memory_format(images)

    def normalize(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std and the cast, for evaluation; images as in `forward`."""
        self._check(images)
        return self.scaled(to_grid(images))

    def extra_repr(self) -> str:
        """The settings that no stage prints."""
        return f"num_classes={self.num_classes}, size={self.size}, dtype={self.dtype}"

    def _set_scale(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        centre, spread = _channel_values("mean", mean), _channel_values("std", std)
        if centre.shape != spread.shape:
            raise ValueError(f"mean and std must have the same length, got {len(mean)} and {len(std)}")
        if not bool((spread > 0).all()):
            raise ValueError(f"std must be above 0, got {std!r}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype!r}")
        self.dtype = dtype
        keep_bits(self, "_mean", centre)
        keep_bits(self, "_std", spread)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of input and output images."""
        return self.get_buffer("_mean").shape[1], *self.size

    def _check(self, images: Tensor) -> None:
        check_images(images)
        wanted = self.image_shape
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images must have shape [B, {', '.join(map(str, wanted))}], got {list(images.shape)}")

    def _strange_stage(self) -> str | None:
        """The type of a stage from outside this package, which the fused backends do not support, or None."""
        stages = (self.crop, self.flip, self.trivial, self.cutmix)
        known = (RandomCrop, RandomHorizontalFlip, TrivialAugment, CutMix)
        pairs = [pair for pair in zip(stages, known, strict=True) if pair[0] is not None]
        strange = [type(stage).__name__ for stage, own in pairs if type(stage) is not own]
        return strange[0] if strange else None

    def _by_torch(self, images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """The backend "torch"."""
        if index is not None:
            images, labels = select(images, index), labels.index_select(0, index)
        levels = self._transform(images, keys)
        if self.cutmix is None:
            return self.scaled(levels), soft_targets(labels, self.num_classes)
        levels, targets = self.cutmix(levels, labels, keys)
        return self.scaled(levels), targets

    def _transform(self, images: Tensor, keys: Tensor) -> Tensor:
        for stage in (self.crop, self.flip, self.trivial):
            if stage is not None:
                images = stage(images, keys)
        return images

    def scaled(self, levels: Tensor) -> Tensor:
        """(x / 255 - mean) / std and the cast, for uint8 levels [B, C, H, W]."""
        mean, std = (bits_of(self, name, torch.float32, levels.device) for name in ("_mean", "_std"))
        images = levels.float().div_(255).sub_(mean).div_(std).to(self.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
