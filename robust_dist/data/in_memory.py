"""Image files of one size, decoded once and kept in memory: a source with the speed of a set by name."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_dist.augment.keys import sample_keys
from robust_dist.data.batches import Request
from robust_dist.data.decode import decode_rgb, to_tensor
from robust_dist.data.errors import BadImage, BadImageError, DataError
from robust_dist.data.image_set import ImageSet
from robust_dist.data.reading import ImageReader, Workers
from robust_dist.data.source import ImageSource, printable

# Images per request to a worker; number of a set's first images tried to find their size.
AT_ONCE, TRIED = 512, 100
NAMED = 5


@dataclass(frozen=True)
class AsStored:
    """Images as decoded, all of one size.

    Attributes:
        size: height and width that each must have.
        name: the set's name, for the error.
    """

    size: int
    name: str

    def __call__(self, image: Any, key: int) -> Tensor:
        """uint8 [3, size, size].

        Raises:
            DataError: the image has another size.
        """
        if image.size != (self.size, self.size):
            raise DataError(_other_size(self.name, image.size, self.size))
        return to_tensor(image)


def load_into_memory(
    source: ImageSource, size: int, *, workers: int, max_bad_share: float, free: int | None = None
) -> ImageSet:
    """Decode every image of a source into an ImageSet on the CPU.

    Args:
        source: The images.
        size: Height and width of all of them; checked before any worker starts, as is the free memory.
        workers: Processes that decode, at most one per core; 0 decodes in this one.
        max_bad_share: The largest fraction of images that may be unreadable. They are left out and listed in
            `ImageSet.unreadable`.
        free: Bytes of host memory that may be used; None if unknown.

    Returns:
        uint8 images and int64 labels in the source's order.

    Raises:
        DataError: Images have another size, the host's memory is too small, or too many images are unreadable; says
            what would be right.
    """
    count = len(source)
    _check_size(source, size)
    _check_room(source.name, count * (3 * size * size + 8), free)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    good = torch.ones(count, dtype=torch.bool)
    unreadable: list[BadImage] = []
    pool = Workers(ImageReader(source, AsStored(size, source.name), size), workers=_useful(workers, count))
    try:
        for request, pack in pool.read(_requests(count)):
            rows = slice(int(request.indices[0]), int(request.indices[-1]) + 1)
            images[rows], labels[rows] = pack.images, pack.labels
            if pack.weights is not None:
                good[rows] = pack.weights > 0
                unreadable += pack.bad
    finally:
        pool.close()
    if unreadable:
        _check_share(source.name, unreadable, count, max_bad_share)
        images, labels = images[good], labels[good]
    return ImageSet(images, labels, source.classes, source.name, source=source, unreadable=tuple(unreadable))


def _requests(count: int) -> Iterator[Request]:
    """All samples in the source's order; nothing is drawn, so the keys do not matter."""
    for start in range(0, count, AT_ONCE):
        indices = torch.arange(start, min(start + AT_ONCE, count))
        yield Request(indices, sample_keys(0, 0, indices))


def _useful(workers: int, count: int) -> int:
    """No more workers than cores or requests; a small set is decoded before a worker would start."""
    requests = -(-count // AT_ONCE)
    return 0 if requests < 4 else min(workers, requests, len(os.sched_getaffinity(0)))


def _check_size(source: ImageSource, size: int) -> None:
    """Reject a set by its first readable image, before all of it is decoded."""
    for index in range(min(TRIED, len(source))):
        try:
            image = decode_rgb(source.read(index)[0])
        except BadImageError:
            continue
        if image.size != (size, size):
            raise DataError(_other_size(source.name, image.size, size))
        return


def _other_size(name: str, found: tuple[int, int], size: int) -> str:
    width, height = found
    fitting = f"set data.size={width} (data.eval_size for evaluation) if all images have it" if width == height else ""
    streaming = "or have workers crop them during training (data.keep_on=auto, data.crop_scale=[0.08, 1.0])"
    return (
        f"{name}: an image is {width}x{height} pixels, not {size}x{size}, but a set kept whole in memory needs "
        f"square images of one size: {', '.join(filter(None, (fitting, streaming)))}"
    )


def _check_room(name: str, needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise DataError(
            f"{name}: {needed:,} bytes are needed to keep the set whole in memory, but {free:,} are free; have workers "
            "read the images during training (data.keep_on=auto, data.crop_scale=[0.08, 1.0])"
        )


def _check_share(name: str, unreadable: list[BadImage], count: int, max_bad_share: float) -> None:
    if len(unreadable) <= max_bad_share * count and len(unreadable) < count:
        return
    named = "; ".join(printable(f"{one.where} ({one.reason})") for one in unreadable[:NAMED])
    more = f"; and {len(unreadable) - NAMED:,} more" if len(unreadable) > NAMED else ""
    raise DataError(
        f"{name}: {len(unreadable):,} of {count:,} images could not be read, more than data.max_bad_share="
        f"{max_bad_share} allows: {named}{more}. Repair them in place, or raise data.max_bad_share"
    )
