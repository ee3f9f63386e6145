"""What the training loop asks of a data set, whether it lies on the device or is streamed."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from robust_dist.data.batch import Batch
from robust_dist.data.errors import BadImage


class EvalBatch(NamedTuple):
    """Samples to evaluate, on the device.

    Attributes:
        images: uint8 [b, C, H, W].
        labels: int64 [b].
        good: bool [b], whether a sample counts; None where all do.
    """

    images: Tensor
    labels: Tensor
    good: Tensor | None = None


class FirstSamples(NamedTuple):
    """The first samples of an epoch's first batch, on the device.

    Attributes:
        images: uint8 [count, C, H, W].
        labels: int64 [count].
        keys: int64 [count].
        bad: by place, those that could not be read, whose image and label are a stand-in's.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    bad: Mapping[int, BadImage]


class LabelledSet(Protocol):
    """A labelled image set, for training or evaluation.

    Attributes:
        name: what error messages call the set.
        classes: the name of each class, in the labels' order.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def channels(self) -> int:
        """Channels of the images given out."""
        ...

    @property
    def device(self) -> torch.device:
        """Where images are given out."""
        ...

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """See `ImageSource.group_sizes`."""
        ...

    def __len__(self) -> int:
        """How many samples there are, the same on every rank."""
        ...

    def loader(self, **cut: Any) -> "TrainLoader":
        """Epochs of the set; `cut` is batch_size, seed, rank, world_size, accumulation, block, drop_last."""
        ...

    def eval_batches(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order, at most `batch_size` at a time."""
        ...

    def filler(self) -> Tensor:
        """An image that counts for nothing, uint8 [1, C, H, W]."""
        ...

    @property
    def stage(self) -> str:
        """What the images given out are: as they are stored, or what was made of them."""
        ...

    def first_samples(self, seed: int, epoch: int, batch_size: int, count: int) -> FirstSamples:
        """The first `count` samples of an epoch's first batch."""
        ...

    def fingerprint(self) -> str:
        """A cheap hash of names and labels: a set that has another one is another set."""
        ...

    def take_bad(self) -> list[BadImage]:
        """The images that could not be read for evaluation since the last call, on this rank."""
        ...


class TrainLoader(Protocol):
    """Epochs of a set, as this rank sees them: DeviceLoader and StreamLoader."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps (global batches) of an epoch."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks, bad ones included."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One item an optimizer step: this rank's micro-batches, from `start_step` to the epoch's end."""
        ...

    def take_bad(self) -> list[BadImage]:
        """The bad images of this rank's steps since the last call."""
        ...
