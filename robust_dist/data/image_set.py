"""Sets held whole on the device or in the host's memory, and the choice between the two."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robust_dist.data.batches import Order, Pack, Permutation, Request
from robust_dist.data.errors import BadImage, DataError
from robust_dist.data.identity import fingerprint, spread
from robust_dist.data.loader import Direct, Prefetcher
from robust_dist.data.sets import EvalBatch, LabelledSet
from robust_dist.data.source import ImageSource

# Images that a fingerprint samples.
SPREAD = 64
KeepOn = Literal["auto", "device", "host"]
Place = Literal["device", "host"]
# Fraction of the device's free memory; the rest is for the model, its optimizer and activations.
SHARE = 0.5


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledSet):
    """A labelled image set held whole on one device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in [0, len(classes)).
        classes: the name of each class, in the labels' order.
        name: what error messages call the set.
        source: the files that the images were decoded from; None for a set by name.
        unreadable: images of the source that were left out.

    Raises:
        TypeError: images or labels have the wrong dtype.
        ValueError: wrong shapes, different counts, no images, different devices, or a label outside the classes (named
            with its index).
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
        """The number of classes, whether or not each occurs."""
        return len(self.classes)

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels on their device."""
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
        """One group: all images lie together."""
        return (len(self),)

    @property
    def stage(self) -> str:
        """The form of the images yielded."""
        return "as stored"

    def order(self, seed: int, epoch: int) -> Order:
        """A permutation, drawn on the device."""
        return Permutation(seed, epoch, len(self), self.device)

    def reader(self, *, block: int = 1, workers: int | None = None) -> Direct:
        """The whole set, from which the pipeline gathers the samples."""
        return Direct(lambda request: Pack(self.images, self.labels, whole=True))

    def prefetcher(self) -> Prefetcher:
        """No copying: batches are already on the device."""
        return Prefetcher(None)

    def filler(self) -> Tensor:
        """The first image, uint8 [1, C, H, W]."""
        return self.images[:1]

    def evaluation(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order, at most `batch_size` at a time, as views."""
        bounds = ((low, min(low + batch_size, stop)) for low in range(start, stop, batch_size))
        return (EvalBatch(self.images[low:high], self.labels[low:high]) for low, high in bounds)

    def fingerprint(self) -> str:
        """The source's own fingerprint, or else a hash of the labels and a few evenly spread images."""
        own = getattr(self.source, "fingerprint", None)
        if own is not None:
            return str(own())
        few = self.images[torch.tensor(spread(len(self), SPREAD), device=self.device)]
        return fingerprint(self.labels.cpu().numpy(), few.cpu().numpy(), list(self.images.shape))

    def fits_on(self, device: torch.device | str) -> None:
        """Check that the set fits into the device's free memory (CUDA only).

        Raises:
            DataError: it does not fit; names the bytes needed and free.
        """
        free = free_bytes(torch.device(device))
        if free is not None and self.nbytes > free:
            raise DataError(
                f"{self.name}: {self.nbytes:,} bytes are needed on {device}, but {free:,} are free. "
                "Free that device's memory, use another device, stream the set from the host's memory "
                "(data.keep_on=host), or have workers read the images from files during training: "
                "data.name=imagefolder, hub or webdataset (configs/README.md)."
            )

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on `device`; itself if it is already there.

        Raises:
            DataError: the set does not fit (see `fits_on`).
        """
        target = _with_index(torch.device(device))
        if self.device == target:
            return self
        self.fits_on(target)
        return replace(self, images=self.images.to(target), labels=self.labels.to(target))


class HostSet(LabelledSet):
    """A labelled set held whole in the host's memory, with batches copied to a device one step ahead.

    Batches, order and keys are those of an ImageSet on the device.

    Args:
        image_set: the set, on the CPU.
        device: where batches are given out.

    Raises:
        ValueError: the set is not on the CPU.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    device: torch.device
    group_sizes: tuple[int, ...]
    stage: str

    def __init__(self, image_set: ImageSet, device: torch.device) -> None:
        if image_set.device.type != "cpu":
            raise ValueError(f"{image_set.name} is on {image_set.device}: a HostSet needs it on the CPU")
        self.image_set, self.device = image_set, device
        self.name, self.classes, self.channels = image_set.name, image_set.classes, image_set.channels
        self.group_sizes, self.stage, self.nbytes = image_set.group_sizes, image_set.stage, image_set.nbytes
        self.source, self.unreadable = image_set.source, image_set.unreadable

    def __len__(self) -> int:
        return len(self.image_set)

    def order(self, seed: int, epoch: int) -> Order:
        """The host's own permutation, identical to the device's."""
        return self.image_set.order(seed, epoch)

    def reader(self, *, block: int = 1, workers: int | None = None) -> Direct:
        """The samples, gathered into pinned memory if bound for a GPU."""
        return Direct(self._gathered)

    def filler(self) -> Tensor:
        """The first image, uint8 [1, C, H, W]."""
        return self.image_set.filler().to(self.device)

    def fingerprint(self) -> str:
        """See `ImageSet.fingerprint`."""
        return self.image_set.fingerprint()

    def evaluation(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """Views of the set in the host's memory."""
        return self.image_set.evaluation(start, stop, batch_size)

    def _gathered(self, request: Request) -> Pack:
        whole, indices = self.image_set, request.indices
        return Pack(self._rows(whole.images, indices), self._rows(whole.labels, indices))

    def _rows(self, values: Tensor, indices: Tensor) -> Tensor:
        # torch's cache does not reuse pinned memory before its copy is done.
        pinned = self.device.type == "cuda"
        rows = torch.empty(len(indices), *values.shape[1:], dtype=values.dtype, pin_memory=pinned)
        return torch.index_select(values, 0, indices, out=rows)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device in bytes; None for other devices."""
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
        raise ValueError(f"{name}: labels must be [{len(images)}], one per image, not {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"{name}: images are on {images.device} but labels on {labels.device}")


def _check_labels(image_set: ImageSet) -> None:
    outside = (image_set.labels < 0) | (image_set.labels >= image_set.num_classes)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"{image_set.name}: image {index} has label {int(image_set.labels[index])}, "
            f"outside the {image_set.num_classes} classes (0 to {image_set.num_classes - 1})"
        )


def choose_places(sizes: Sequence[int], free: int | None, keep_on: KeepOn = "auto") -> list[Place]:
    """Where to put sets of these sizes; earlier ones have priority.

    Args:
        sizes: Bytes of each.
        free: Free bytes on the device; None if unknown, as for a CPU, whose memory is the host's.
        keep_on: "auto" chooses the device for sets that together need at most half of its free memory, else the host.
    """
    places: list[Place] = []
    room = 0.0 if free is None else SHARE * free
    for size in sizes:
        fits = keep_on == "device" or (keep_on == "auto" and (free is None or size <= room))
        places.append("device" if fits else "host")
        room -= size if fits else 0
    return places


def place(sets: Sequence[ImageSet], device: torch.device, keep_on: KeepOn = "auto") -> list[ImageSet | HostSet]:
    """The sets in their places, yielding batches on `device`.

    Raises:
        DataError: keep_on="device" and a set does not fit; names the bytes needed and free.
    """
    places = choose_places([one.nbytes for one in sets], free_bytes(device), keep_on)
    return [
        HostSet(one, device) if where == "host" else _on_device(one, device, keep_on)
        for one, where in zip(sets, places, strict=True)
    ]


def _on_device(image_set: ImageSet, device: torch.device, keep_on: KeepOn) -> ImageSet:
    free = free_bytes(device)
    if free is not None and image_set.nbytes > free:
        raise DataError(
            f"data.keep_on={keep_on!r}: {image_set.name} needs {image_set.nbytes:,} bytes on {device}, but {free:,} "
            "are free; set data.keep_on=host (or auto), which streams it from the host's memory, or free device memory"
        )
    return image_set.to(device)
