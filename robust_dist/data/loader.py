"""DeviceLoader: epochs of a set that lies whole on the device, cut between ranks; and exact evaluation."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from robust_dist.augment.keys import permutation, sample_keys
from robust_dist.data.batch import Batch
from robust_dist.data.batches import BatchPlan, check_counts, check_rank
from robust_dist.data.cuts import even_cuts
from robust_dist.data.errors import BadImage

if TYPE_CHECKING:
    from robust_dist.data.image_set import ImageSet


class DeviceLoader:
    """Training batches of an ImageSet, a pure function of (seed, epoch, step, rank, world size).

    The order of an epoch is a permutation drawn from (seed, epoch) alone, so 1, 2 or 4 ranks see the same global
    batches; each is `batch_size` consecutive samples of it, cut into contiguous runs of whole blocks of `block`
    samples, as even as possible: one a rank, and within a rank one a micro-batch. Parts may differ in size, so the
    loss is a sum divided by `Batch.global_size`. CutMix of mode "elem" draws partners within a block and so sees the
    same pairs at any world size, provided that it has the same `block`.

    Args:
        image_set: the set; batches lie on its device.
        batch_size: samples of a global batch (all ranks, all micro-batches).
        seed: of the order and of the keys.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        accumulation: micro-batches an optimizer step.
        block: samples that are never parted.
        drop_last: leave out the last, shorter global batch of an epoch; else every sample is seen once an epoch.

    Raises:
        ValueError: a count below 1, a rank outside the world, or a cut that leaves a rank or a micro-batch empty.
    """

    def __init__(
        self,
        image_set: "ImageSet",
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        block: int = 8,
        drop_last: bool = False,
    ) -> None:
        self.image_set = image_set
        self.seed = seed
        self.plan = BatchPlan(
            image_set.name, len(image_set), batch_size, rank, world_size, accumulation, block, drop_last
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps (global batches) of an epoch."""
        return self.plan.steps

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks."""
        return self.plan.samples_per_epoch

    def take_bad(self) -> list[BadImage]:
        """None: the images were checked when they were loaded."""
        return []

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One item an optimizer step: this rank's `accumulation` micro-batches, from `start_step` to the epoch's end.

        Raises:
            ValueError: start_step outside 0 to steps_per_epoch (at which nothing is left).
        """
        self.plan.check_start(start_step)
        return self._steps(epoch, start_step)

    def _steps(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        images, labels = self.image_set.images, self.image_set.labels
        for step, parts in self._drawn(epoch, start_step):
            size = self.plan.global_size(step)
            yield [Batch(images, labels, indices, keys, size, whole=True) for indices, keys in parts]

    def _drawn(self, epoch: int, start_step: int) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """Each step and its micro-batches as (indices, keys), views of the epoch's, on the set's device."""
        order = permutation(self.seed, epoch, len(self.image_set), self.image_set.device)
        keys = sample_keys(self.seed, epoch, order)
        for step in range(start_step, self.steps_per_epoch):
            start = step * self.plan.batch_size
            runs = [slice(start + low, start + high) for low, high in self.plan.runs(step)]
            yield step, [(order[run], keys[run]) for run in runs]


def evaluation_batches(
    image_set: "ImageSet", batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's contiguous share of the set, every sample on exactly one rank, as views (no copy).

    Shares differ by one sample at most, so ranks may have different numbers of batches, and with fewer samples than
    ranks some have none: sum over ranks after the loop, not in it.

    Args:
        image_set: the set, walked in its own order.
        batch_size: samples a batch at most, on each rank.
        rank: this process.
        world_size: number of processes.

    Returns:
        Iterator of (images uint8 [b, C, H, W], labels int64 [b]).

    Raises:
        ValueError: batch_size or world_size below 1, or a rank outside the world.
    """
    check_counts(batch_size=batch_size, world_size=world_size)
    check_rank(rank, world_size)
    start, stop = even_cuts(len(image_set), world_size)[rank]
    return ((batch.images, batch.labels) for batch in image_set.eval_batches(start, stop, batch_size))
