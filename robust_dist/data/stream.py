"""StreamLoader: epochs of a set that does not fit on the device, read by workers and cut between ranks."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from robust_dist.augment.keys import sample_keys
from robust_dist.data.batch import Batch
from robust_dist.data.batches import BatchPlan
from robust_dist.data.crops import RandomCrop
from robust_dist.data.errors import BadImage
from robust_dist.data.moving import Mover, Moving
from robust_dist.data.order import EpochOrder
from robust_dist.data.reading import ImageReader, Request, Workers
from robust_dist.data.source import ImageSource

SHUFFLE_WINDOW = 16_384


class _Step(NamedTuple):
    """An optimizer step's micro-batches on their way to the device, and the bad images among them."""

    parts: list[Moving]
    bad: list[BadImage]


class StreamLoader:
    """Training batches of an ImageSource, a pure function of (seed, epoch, step, rank, world size).

    It has DeviceLoader's face and its cuts: global batches, keys and blocks do not depend on the world size, and every
    rank takes the same number of steps, so that none waits for another's longer shard. Workers decode, crop at random
    by the sample's key and resize, to uint8; a batch is moved to the device while the step before it runs.

    The order of an epoch is EpochOrder's: a permutation where the source is one group, else shuffled within windows of
    groups. A resumed epoch reads nothing of the steps that are done.

    A bad image is skipped: its slot holds a copy of a good one of the same block, or zeros where the micro-batch has
    none, and `Batch.weights` is 0 there. The copies do count in batch normalisation's statistics.

    Args:
        source: the images.
        size: height and width of the images given out.
        batch_size: samples of a global batch (all ranks, all micro-batches).
        seed: of the order and of the keys.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        accumulation: micro-batches an optimizer step.
        block: samples that are never parted.
        drop_last: leave out the last, shorter global batch of an epoch; else every sample is seen once an epoch.
        scale: lowest and highest share of an image's area that the random crop takes.
        ratio: lowest and highest width / height of the crop.
        device: where batches are given out.
        workers: processes that read; 0 reads in this one, between the steps.
        prefetch: micro-batches that each worker reads ahead.
        shuffle_window: samples that are shuffled among each other, at least, where the source has several groups.

    Raises:
        ValueError: as DeviceLoader.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        block: int = 8,
        drop_last: bool = False,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        device: torch.device | str = "cpu",
        workers: int = 4,
        prefetch: int = 2,
        shuffle_window: int = SHUFFLE_WINDOW,
    ) -> None:
        self.source, self.seed, self.shuffle_window = source, seed, shuffle_window
        self.plan = BatchPlan(source.name, len(source), batch_size, rank, world_size, accumulation, block, drop_last)
        self.mover = Mover(torch.device(device))
        reader = ImageReader(source, RandomCrop(size, scale, ratio), size, block)
        self._workers = Workers(reader, workers=workers, prefetch=prefetch, pin=self.mover.device.type == "cuda")
        self._bad: list[BadImage] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps (global batches) of an epoch."""
        return self.plan.steps

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks, bad ones included."""
        return self.plan.samples_per_epoch

    def take_bad(self) -> list[BadImage]:
        """The bad images of this rank's steps since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One item an optimizer step: this rank's `accumulation` micro-batches, from `start_step` to the epoch's end.

        A new epoch ends the one that was being read.

        Raises:
            ValueError: start_step outside 0 to steps_per_epoch (at which nothing is left).
            WorkersLostError: a worker was killed.
        """
        self.plan.check_start(start_step)
        return self._steps(epoch, start_step)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _steps(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        coming = self._coming(epoch, start_step)
        moving: deque[_Step] = deque()
        for step in range(start_step, self.plan.steps):
            while len(moving) <= self.mover.ahead and (following := next(coming, None)):
                moving.append(following)
            parts, bad = moving.popleft()
            batches = [self._arrive(part, self.plan.global_size(step)) for part in parts]
            self._bad += bad
            yield batches

    def _coming(self, epoch: int, start_step: int) -> Iterator[_Step]:
        packs = self._workers.read(self._requests(epoch, start_step))
        for _ in range(start_step, self.plan.steps):
            read = [next(packs) for _ in range(self.plan.accumulation)]
            parts = [
                self.mover.start(pack.images, pack.labels, request.indices, request.keys, pack.weights)
                for request, pack in read
            ]
            yield _Step(parts, [image for _, pack in read for image in pack.bad])

    def _requests(self, epoch: int, start_step: int) -> Iterator[Request]:
        order = EpochOrder(self.seed, epoch, self.source.group_sizes, self.shuffle_window)
        for step in range(start_step, self.plan.steps):
            start = step * self.plan.batch_size
            indices = order.batch(start, start + self.plan.global_size(step))
            for low, high in self.plan.runs(step):
                yield Request(indices[low:high], sample_keys(self.seed, epoch, indices[low:high]))

    def _arrive(self, part: Moving, global_size: int) -> Batch:
        *fields, weights = self.mover.finish(part)
        images, labels, indices, keys = cast(list[Tensor], fields)
        return Batch(images, labels, indices, keys, global_size, weights)
