"""What the training loop asks of a data set, whether it lies on the device or is streamed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from robust_dist.data.batches import Batch, Cut, Order
from robust_dist.data.errors import BadImage
from robust_dist.data.loader import Loader, Prefetcher, Reader


class EvalBatch(NamedTuple):
    """Samples to evaluate, on the device: uint8 [b, C, H, W], int64 [b], and bool [b], or None if all count."""

    images: Tensor
    labels: Tensor
    good: Tensor | None = None


class FirstSamples(NamedTuple):
    """The first samples of an epoch's first batch, on the device.

    Attributes:
        images: uint8 [count, C, H, W].
        labels: int64 [count].
        keys: int64 [count].
        bad: by position, the unreadable ones, whose image and label are a stand-in's.
        indices: int64 [count], the samples' numbers in the set.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    bad: Mapping[int, BadImage]
    indices: Tensor


class LabelledSet(ABC):
    """A labelled image set for training or evaluation. Sets differ in where their images lie and how they are read.

    Attributes:
        name: what error messages call the set.
        classes: the name of each class, in label order.
        channels: channels of the images yielded.
        device: where images are yielded.
        group_sizes: see `ImageSource.group_sizes`.
        stage: the form of the images yielded: as stored, or which crop of them.
    """

    if TYPE_CHECKING:
        # Fields of some sets, properties of others.
        @property
        def name(self) -> str: ...  # noqa: D102
        @property
        def classes(self) -> tuple[str, ...]: ...  # noqa: D102
        @property
        def channels(self) -> int: ...  # noqa: D102
        @property
        def device(self) -> torch.device: ...  # noqa: D102
        @property
        def group_sizes(self) -> tuple[int, ...]: ...  # noqa: D102
        @property
        def stage(self) -> str: ...  # noqa: D102

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples, the same on every rank."""

    @abstractmethod
    def order(self, seed: int, epoch: int) -> Order:
        """The order of an epoch."""

    @abstractmethod
    def reader(self, *, block: int = 1, workers: int | None = None) -> Reader:
        """A reader of training samples.

        Args:
            block: a bad image's place is filled with a copy of a good one from the same `block` slots, if there is one.
            workers: number of reading processes; None for the set's own number.
        """

    @abstractmethod
    def filler(self) -> Tensor:
        """An image of weight 0, uint8 [1, C, H, W]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A cheap hash of names and labels; sets with different ones are different sets."""

    @abstractmethod
    def evaluation(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """`eval_batches`, in the set's own memory."""

    def prefetcher(self) -> Prefetcher:
        """Moves batches to the device."""
        return Prefetcher(self.device)

    def loader(self, cut: Cut) -> Loader:
        """Epochs of the set."""
        return Loader(self, cut)

    def eval_batches(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order, at most `batch_size` at a time, on the device."""
        one_each = ([batch] for batch in self.evaluation(start, stop, batch_size))
        return (batch for (batch,) in self.prefetcher().run(one_each))

    def first_samples(self, seed: int, epoch: int, batch_size: int, count: int) -> FirstSamples:
        """The first `count` samples of an epoch's first batch."""
        size = min(batch_size, len(self))
        requests = self.order(seed, epoch).requests(0, size, [(0, min(count, size))])
        ((request, pack),) = self.reader(workers=0).read(iter(requests))
        batch = Batch(pack.images, pack.labels, *request, size, pack.weights, whole=pack.whole)
        places = [] if pack.weights is None else (pack.weights == 0).nonzero().flatten().tolist()
        images, labels, keys = (one.to(self.device) for one in (batch.images, batch.labels, batch.keys))
        return FirstSamples(images, labels, keys, dict(zip(places, pack.bad, strict=True)), request.indices)

    def take_bad(self) -> list[BadImage]:
        """The images that could not be read for evaluation since the last call, on this rank."""
        return []
