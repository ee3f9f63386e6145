"""StreamSet: an ImageSource with the crop applied to its images and their device."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.data.batches import Cut, EpochOrder, Order, Request
from robust_dist.data.decode import CentralCrop, RandomCrop
from robust_dist.data.device_decode import Decode, DeviceReader, EncodedReader
from robust_dist.data.errors import BadImage
from robust_dist.data.identity import source_fingerprint
from robust_dist.data.image_cache import ImageCache
from robust_dist.data.loader import Loader, Reader
from robust_dist.data.reading import ImageReader, Workers
from robust_dist.data.sets import EvalBatch, LabelledSet
from robust_dist.data.source import ImageSource

SHUFFLE_WINDOW = 16_384


@dataclass(frozen=True, eq=False)
class StreamSet(LabelledSet):
    """A labelled set whose images are read, decoded and cropped on demand.

    Workers decode, crop (in training at random, by the sample's key) and resize, to uint8.

    Attributes:
        source: the images.
        crop: applied to each image.
        device: where images are yielded.
        workers: number of reading processes; 0 reads in this one, between the steps.
        prefetch: micro-batches that each worker reads ahead.
        shuffle_window: minimum number of samples shuffled together, if the source has several groups.
        decode: decodes JPEGs on the device; None if workers do.
        fast: whether workers decode JPEGs by `fast_crop`; otherwise exactly, by Pillow.
        cache: keeps decoded images for the workers; None without one, and with `decode`.
    """

    source: ImageSource
    crop: RandomCrop | CentralCrop
    device: torch.device
    workers: int = 4
    prefetch: int = 2
    shuffle_window: int = SHUFFLE_WINDOW
    decode: Decode | None = None
    fast: bool = False
    cache: ImageCache | None = None
    _bad: list[BadImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def name(self) -> str:
        """What error messages call the set."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class, in label order."""
        return self.source.classes

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """See `ImageSource.group_sizes`."""
        return self.source.group_sizes

    @property
    def channels(self) -> int:
        """3: all images become RGB."""
        return 3

    def order(self, seed: int, epoch: int) -> Order:
        """A permutation if the source is one group, otherwise shuffled within windows of groups."""
        return EpochOrder(seed, epoch, self.group_sizes, self.shuffle_window)

    def reader(self, *, block: int = 1, workers: int | None = None) -> Reader:
        """Worker processes, which live from the first request to `close`."""
        reader = ImageReader(self.source, self.crop, self.crop.size, block, fast=self.fast, cache=self.cache)
        read = Workers(
            reader if self.decode is None else EncodedReader(reader),
            workers=self.workers if workers is None else workers,
            prefetch=self.prefetch,
            pin=self.device.type == "cuda",
        )
        return read if self.decode is None else DeviceReader(read, reader, self.decode, self.device)

    def loader(self, cut: Cut) -> Loader:
        """Epochs of the set.

        Raises:
            ValueError: The set is for evaluation: its crop is not random.
        """
        if not isinstance(self.crop, RandomCrop):
            raise ValueError(f"{self.name} is for evaluation: training needs a RandomCrop, not {self.crop}")
        return super().loader(cut)

    def filler(self) -> Tensor:
        """A black image, uint8 [1, 3, size, size]."""
        return torch.zeros(1, 3, self.crop.size, self.crop.size, dtype=torch.uint8, device=self.device)

    def evaluation(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order; bad ones are marked, and reported by `take_bad`.

        Its workers live as long as the iterator.
        """
        spans = [(low, min(low + batch_size, stop)) for low in range(start, stop, batch_size)]
        indices = (torch.arange(low, high) for low, high in spans)
        requests = (Request(found, torch.zeros_like(found)) for found in indices)
        with closing(self.reader(workers=min(self.workers, len(spans)))) as reader:
            for _, pack in reader.read(requests):
                self._bad.extend(pack.bad)
                yield EvalBatch(pack.images, pack.labels, None if pack.weights is None else pack.weights > 0)

    @property
    def decoder(self) -> str:
        """The decoder of its JPEGs, in the words of a recipe's `data.decode`."""
        return "cuda" if self.decode is not None else "fast" if self.fast else "exact"

    @property
    def stage(self) -> str:
        """The form of the images yielded."""
        return "random crop" if isinstance(self.crop, RandomCrop) else "central crop"

    def fingerprint(self) -> str:
        """The source's own fingerprint, or else a hash of its classes and groups."""
        return source_fingerprint(self.source)

    def take_bad(self) -> list[BadImage]:
        """See `LabelledSet.take_bad`."""
        bad = list(self._bad)
        self._bad.clear()
        return bad
