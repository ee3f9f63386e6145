"""ImageSet: a labelled set of small images, whole, as uint8 on one device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robust_dist.augment.keys import permutation, sample_keys
from robust_dist.data.errors import BadImage, DataError
from robust_dist.data.identity import fingerprint, spread
from robust_dist.data.loader import DeviceLoader
from robust_dist.data.sets import EvalBatch, FirstSamples, TrainLoader
from robust_dist.data.source import ImageSource

# Images that a fingerprint looks at.
SPREAD = 64


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled image set that lies whole on one device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in [0, len(classes)).
        classes: the name of each class, in the labels' order.
        name: what error messages call the set.
        source: the files that the images were decoded from; None of a set by name.
        unreadable: images of the source that were left out.

    Raises:
        TypeError: images or labels of another dtype.
        ValueError: wrong shapes, different counts, no image at all, different devices, or a label outside the
            classes (named with its index).
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    source: ImageSource | None = None
    unreadable: tuple[BadImage, ...] = ()

    def __post_init__(self) -> None:
        _check_dtypes(self)
        _check_shapes(self)
        _check_labels(self)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each of them occurs."""
        return len(self.classes)

    @property
    def nbytes(self) -> int:
        """Bytes that images and labels take on their device."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def device(self) -> torch.device:
        """The device of images and labels."""
        return self.images.device

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.images.shape[1]

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """All images lie together."""
        return (len(self),)

    def loader(self, **cut: Any) -> TrainLoader:
        """DeviceLoader of the set; `cut` is its other arguments."""
        return DeviceLoader(self, **cut)

    def filler(self) -> Tensor:
        """The first image, uint8 [1, C, H, W]."""
        return self.images[:1]

    def eval_batches(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order, at most `batch_size` at a time, as views (no copy)."""
        bounds = ((low, min(low + batch_size, stop)) for low in range(start, stop, batch_size))
        return (EvalBatch(self.images[low:high], self.labels[low:high]) for low, high in bounds)

    @property
    def stage(self) -> str:
        """What the images given out are."""
        return "as stored"

    def first_samples(self, seed: int, epoch: int, batch_size: int, count: int) -> FirstSamples:
        """The first `count` samples of an epoch's first batch."""
        indices = permutation(seed, epoch, len(self), self.device)[:count]
        return FirstSamples(self.images[indices], self.labels[indices], sample_keys(seed, epoch, indices), {})

    def fingerprint(self) -> str:
        """A hash of the labels and of a few of the images, evenly spread; the source's own, where it has one."""
        own = getattr(self.source, "fingerprint", None)
        if own is not None:
            return str(own())
        few = self.images[torch.tensor(spread(len(self), SPREAD), device=self.device)]
        return fingerprint(self.labels.cpu().numpy(), few.cpu().numpy(), list(self.images.shape))

    def take_bad(self) -> list[BadImage]:
        """None: the images were checked when they were loaded."""
        return []

    def fits_on(self, device: torch.device | str) -> None:
        """Check that the set fits into the device's free memory (CUDA; other devices are not asked).

        Raises:
            DataError: it does not; names the bytes needed and the bytes free.
        """
        free = free_bytes(torch.device(device))
        if free is not None and self.nbytes > free:
            raise DataError(
                f"{self.name}: {self.nbytes:,} bytes are needed on {device}, where {free:,} are free. "
                "Free that device's memory, take another device, stream the set from the host's memory "
                "(data.keep_on=host), or have workers read the images from files while training: "
                "data.name=imagefolder, hub or webdataset (configs/README.md)."
            )

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on `device`; itself where it lies there already.

        Raises:
            DataError: the set does not fit (see `fits_on`).
        """
        target = _with_index(torch.device(device))
        if self.device == target:
            return self
        self.fits_on(target)
        return replace(self, images=self.images.to(target), labels=self.labels.to(target))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device in bytes; None for a device that cannot be asked."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0]


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_dtypes(image_set: ImageSet) -> None:
    wanted = {"images": torch.uint8, "labels": torch.int64}
    for field, dtype in wanted.items():
        found = getattr(image_set, field).dtype
        if found != dtype:
            raise TypeError(f"{image_set.name}: {field} must be {dtype}, not {found}")


def _check_shapes(image_set: ImageSet) -> None:
    images, labels, name = image_set.images, image_set.labels, image_set.name
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name}: images must be [N, C, H, W] with no empty side, not {list(images.shape)}")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(f"{name}: labels must be [{len(images)}], one an image, not {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"{name}: images lie on {images.device} but labels on {labels.device}")


def _check_labels(image_set: ImageSet) -> None:
    outside = (image_set.labels < 0) | (image_set.labels >= image_set.num_classes)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"{image_set.name}: image {index} has label {int(image_set.labels[index])}, "
            f"outside the {image_set.num_classes} classes (0 to {image_set.num_classes - 1})"
        )
