"""StreamSet: an ImageSource with what is made of its images and where they go; an ImageSet's face for streamed sets."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from robust_dist.augment.keys import sample_keys
from robust_dist.data.crops import CentralCrop, RandomCrop
from robust_dist.data.errors import BadImage
from robust_dist.data.identity import fingerprint
from robust_dist.data.moving import Mover, Moving
from robust_dist.data.order import EpochOrder
from robust_dist.data.reading import ImageReader, Pack, Request, Workers
from robust_dist.data.sets import EvalBatch, FirstSamples
from robust_dist.data.source import ImageSource
from robust_dist.data.stream import SHUFFLE_WINDOW, StreamLoader


@dataclass(frozen=True, eq=False)
class StreamSet:
    """A labelled set whose images are read, decoded and cropped when they are asked for.

    Attributes:
        source: the images.
        crop: what is made of each.
        device: where they are given out.
        workers: processes that read; 0 reads in this one.
        prefetch: batches that each worker reads ahead.
        shuffle_window: see StreamLoader.
    """

    source: ImageSource
    crop: RandomCrop | CentralCrop
    device: torch.device
    workers: int = 4
    prefetch: int = 2
    shuffle_window: int = SHUFFLE_WINDOW
    _bad: list[BadImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def name(self) -> str:
        """What error messages call the set."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class, in the labels' order."""
        return self.source.classes

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """See `ImageSource.group_sizes`."""
        return self.source.group_sizes

    @property
    def channels(self) -> int:
        """3: all images become RGB."""
        return 3

    def loader(self, **cut: Any) -> StreamLoader:
        """StreamLoader of the set; `cut` is how its epochs are cut.

        Raises:
            ValueError: The set is for evaluation, its crop is not random.
        """
        if not isinstance(self.crop, RandomCrop):
            raise ValueError(f"{self.name} is for evaluation: training wants a RandomCrop, not {self.crop}")
        return StreamLoader(
            self.source,
            size=self.crop.size,
            scale=self.crop.scale,
            ratio=self.crop.ratio,
            device=self.device,
            workers=self.workers,
            prefetch=self.prefetch,
            shuffle_window=self.shuffle_window,
            **cut,
        )

    def filler(self) -> Tensor:
        """A black image, uint8 [1, 3, size, size]."""
        return torch.zeros(1, 3, self.crop.size, self.crop.size, dtype=torch.uint8, device=self.device)

    def eval_batches(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order; bad ones are marked, and told by `take_bad`.

        Its workers live as long as the iterator.
        """
        spans = [(low, min(low + batch_size, stop)) for low in range(start, stop, batch_size)]
        indices = (torch.arange(low, high) for low, high in spans)
        requests = (Request(found, torch.zeros_like(found)) for found in indices)
        mover = Mover(self.device)
        ahead: deque[Moving] = deque()
        for pack in self._packs(requests, workers=min(self.workers, len(spans))):
            good = None if pack.weights is None else pack.weights > 0
            ahead.append(mover.start(pack.images, pack.labels, good))
            if len(ahead) > mover.ahead:
                yield _arrived(mover, ahead.popleft())
        for moving in ahead:
            yield _arrived(mover, moving)

    @property
    def stage(self) -> str:
        """What the images given out are."""
        return "random crop" if isinstance(self.crop, RandomCrop) else "central crop"

    def first_samples(self, seed: int, epoch: int, batch_size: int, count: int) -> FirstSamples:
        """The first `count` samples of an epoch's first batch, cropped."""
        indices = EpochOrder(seed, epoch, self.group_sizes, self.shuffle_window).batch(0, batch_size)[:count]
        keys = sample_keys(seed, epoch, indices)
        pack = next(self._packs(iter([Request(indices, keys)]), workers=0))
        slots = [] if pack.weights is None else (pack.weights == 0).nonzero().flatten().tolist()
        bad = dict(zip(slots, pack.bad, strict=True))
        return FirstSamples(pack.images.to(self.device), pack.labels.to(self.device), keys.to(self.device), bad)

    def fingerprint(self) -> str:
        """The source's, or of one that has none a hash of its classes and groups."""
        own = getattr(self.source, "fingerprint", None)
        return own() if own is not None else fingerprint(self.classes, self.group_sizes)

    def take_bad(self) -> list[BadImage]:
        """The bad images that `eval_batches` met since the last call."""
        bad = list(self._bad)
        self._bad.clear()
        return bad

    def _packs(self, requests: Iterator[Request], workers: int) -> Iterator[Pack]:
        reader = ImageReader(self.source, self.crop, self.crop.size)
        pool = Workers(reader, workers=workers, prefetch=self.prefetch, pin=self.device.type == "cuda")
        try:
            for _, pack in pool.read(requests):
                self._bad.extend(pack.bad)
                yield pack
        finally:
            pool.close()


def _arrived(mover: Mover, moving: Moving) -> EvalBatch:
    images, labels, good = mover.finish(moving)
    return EvalBatch(cast(Tensor, images), cast(Tensor, labels), good)
