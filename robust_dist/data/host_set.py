"""HostSet: a set that stays in the host's memory, and whose batches are copied to the device a step ahead."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from robust_dist.data.batch import Batch
from robust_dist.data.errors import BadImage
from robust_dist.data.image_set import ImageSet
from robust_dist.data.loader import DeviceLoader
from robust_dist.data.moving import Mover, Moving
from robust_dist.data.sets import EvalBatch, FirstSamples
from robust_dist.data.source import ImageSource


@dataclass(frozen=True, eq=False)
class HostSet:
    """A labelled set that lies whole in the host's memory and is given out on a device.

    Batches, their order and their keys are those of an ImageSet on the device.

    Attributes:
        image_set: the set, on the CPU.
        device: where batches are given out.
    """

    image_set: ImageSet
    device: torch.device

    def __len__(self) -> int:
        return len(self.image_set)

    @property
    def name(self) -> str:
        """What error messages call the set."""
        return self.image_set.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class, in the labels' order."""
        return self.image_set.classes

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.image_set.channels

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """All images lie together."""
        return self.image_set.group_sizes

    @property
    def nbytes(self) -> int:
        """Bytes that images and labels take in the host's memory."""
        return self.image_set.nbytes

    @property
    def source(self) -> ImageSource | None:
        """See `ImageSet`."""
        return self.image_set.source

    @property
    def unreadable(self) -> tuple[BadImage, ...]:
        """See `ImageSet`."""
        return self.image_set.unreadable

    @property
    def stage(self) -> str:
        """What the images given out are."""
        return self.image_set.stage

    def loader(self, **cut: Any) -> "HostLoader":
        """HostLoader of the set; `cut` is how its epochs are cut."""
        return HostLoader(self.image_set, self.device, **cut)

    def filler(self) -> Tensor:
        """The first image, uint8 [1, C, H, W]."""
        return self.image_set.filler().to(self.device)

    def eval_batches(self, start: int, stop: int, batch_size: int) -> Iterator[EvalBatch]:
        """The samples start to stop in the set's own order, at most `batch_size` at a time, copied one ahead."""
        mover = Mover(self.device)
        ahead: deque[Moving] = deque()
        for batch in self.image_set.eval_batches(start, stop, batch_size):
            ahead.append(mover.start(batch.images, batch.labels))
            if len(ahead) > mover.ahead:
                yield _evaluated(mover, ahead.popleft())
        for moving in ahead:
            yield _evaluated(mover, moving)

    def first_samples(self, seed: int, epoch: int, batch_size: int, count: int) -> FirstSamples:
        """The first `count` samples of an epoch's first batch."""
        images, labels, keys, bad = self.image_set.first_samples(seed, epoch, batch_size, count)
        return FirstSamples(images.to(self.device), labels.to(self.device), keys.to(self.device), bad)

    def fingerprint(self) -> str:
        """See `ImageSet.fingerprint`."""
        return self.image_set.fingerprint()

    def take_bad(self) -> list[BadImage]:
        """None: the images were checked when they were loaded."""
        return []


class HostLoader(DeviceLoader):
    """DeviceLoader's batches, gathered in the host's memory and copied to a device.

    A batch is gathered into pinned memory and copied on a stream of its own while the step before it runs; the order
    is the host's own permutation, which is the device's.

    Args:
        image_set: the set, on the CPU.
        device: where batches are given out.
        **cut: DeviceLoader's other arguments.

    Raises:
        ValueError: as DeviceLoader, or the set does not lie on the CPU.
    """

    def __init__(self, image_set: ImageSet, device: torch.device | str, **cut: Any) -> None:
        if image_set.device.type != "cpu":
            raise ValueError(f"{image_set.name} lies on {image_set.device}: a HostLoader wants it on the CPU")
        super().__init__(image_set, **cut)
        self.mover = Mover(torch.device(device))

    def _steps(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        coming = ((step, [self._start(*part) for part in parts]) for step, parts in self._drawn(epoch, start_step))
        moving: deque[tuple[int, list[Moving]]] = deque()
        for _ in range(start_step, self.steps_per_epoch):
            while len(moving) <= self.mover.ahead and (following := next(coming, None)):
                moving.append(following)
            step, parts = moving.popleft()
            yield [self._arrive(part, self.plan.global_size(step)) for part in parts]

    def _start(self, indices: Tensor, keys: Tensor) -> Moving:
        images, labels = (self._gather(of, indices) for of in (self.image_set.images, self.image_set.labels))
        return self.mover.start(images, labels, indices, keys)

    def _arrive(self, part: Moving, global_size: int) -> Batch:
        images, labels, indices, keys = cast(list[Tensor], list(self.mover.finish(part)))
        return Batch(images, labels, indices, keys, global_size)

    def _gather(self, values: Tensor, indices: Tensor) -> Tensor:
        # Pinned memory comes from torch's cache, which gives none out again before its copy is done.
        pinned = self.mover.device.type == "cuda"
        rows = torch.empty(len(indices), *values.shape[1:], dtype=values.dtype, pin_memory=pinned)
        return torch.index_select(values, 0, indices, out=rows)


def _evaluated(mover: Mover, moving: Moving) -> EvalBatch:
    images, labels = cast(list[Tensor], list(mover.finish(moving)))
    return EvalBatch(images, labels)
