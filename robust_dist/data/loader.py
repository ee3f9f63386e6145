"""DeviceLoader: epochs of a set that lies whole on the device, cut between ranks; and exact evaluation."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from robust_dist.augment.keys import permutation, sample_keys
from robust_dist.data.cuts import can_cut, cut_batch, even_cuts
from robust_dist.data.image_set import ImageSet


class Batch(NamedTuple):
    """A micro-batch of b samples on the device.

    Attributes:
        images: uint8 [b, C, H, W].
        labels: int64 [b].
        indices: int64 [b], the samples' numbers in the set.
        keys: int64 [b], `sample_keys(seed, epoch, indices)`.
        global_size: samples in the whole global batch: the sum over its ranks and micro-batches, by which the
            summed loss is divided.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    keys: Tensor
    global_size: int


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
        image_set: ImageSet,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        block: int = 8,
        drop_last: bool = False,
    ) -> None:
        _check_counts(batch_size=batch_size, world_size=world_size, accumulation=accumulation, block=block)
        _check_rank(rank, world_size)
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.block = block
        self.drop_last = drop_last
        self._check_cut()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps (global batches) of an epoch."""
        full, rest = divmod(len(self.image_set), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One item an optimizer step: this rank's `accumulation` micro-batches, from `start_step` to the epoch's end.

        Raises:
            ValueError: start_step outside 0 to steps_per_epoch (at which nothing is left).
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must lie in 0 to {self.steps_per_epoch} (steps_per_epoch), not {start_step}")
        return self._steps(epoch, start_step)

    def _steps(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        order = permutation(self.seed, epoch, len(self.image_set), self.image_set.device)
        keys = sample_keys(self.seed, epoch, order)
        for step in range(start_step, self.steps_per_epoch):
            yield self._step(order, keys, step)

    def _step(self, order: Tensor, keys: Tensor, step: int) -> list[Batch]:
        start, size = step * self.batch_size, self._global_size(step)
        runs = cut_batch(
            size, block=self.block, rank=self.rank, world_size=self.world_size, accumulation=self.accumulation
        )
        return [self._batch(order[start + a : start + b], keys[start + a : start + b], size) for a, b in runs]

    def _batch(self, indices: Tensor, keys: Tensor, global_size: int) -> Batch:
        images = self.image_set.images.index_select(0, indices)
        labels = self.image_set.labels.index_select(0, indices)
        return Batch(images, labels, indices, keys, global_size)

    def _global_size(self, step: int) -> int:
        return min(self.batch_size, len(self.image_set) - step * self.batch_size)

    def _check_cut(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"drop_last=True with batch_size={self.batch_size} leaves no batch of the {len(self.image_set)} images "
                f"of {self.image_set.name}: set drop_last=False or a smaller batch_size"
            )
        for step in {0, self.steps_per_epoch - 1}:
            self._check_size(self._global_size(step), last=step > 0)

    def _check_size(self, size: int, *, last: bool) -> None:
        world_size, accumulation, block = self.world_size, self.accumulation, self.block
        if can_cut(size, block=block, world_size=world_size, accumulation=accumulation):
            return
        parts = world_size * accumulation
        remedies = ["drop_last=True"] if last else [f"batch_size of {parts * block} or more"]
        if size >= parts:
            remedies.append(f"block of {_largest_block(size, world_size, accumulation)} or less")
        remedies.append("fewer ranks or micro-batches")
        raise ValueError(
            f"{'the last' if last else 'a'} global batch of {size} samples (batch_size={self.batch_size}, "
            f"{len(self.image_set)} images) has {-(-size // block)} blocks of block={block}: too few for "
            f"world_size={world_size} x accumulation={accumulation}. Set {', or '.join(remedies)}."
        )


def evaluation_batches(
    image_set: ImageSet, batch_size: int, rank: int = 0, world_size: int = 1
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
    _check_counts(batch_size=batch_size, world_size=world_size)
    _check_rank(rank, world_size)
    start, stop = even_cuts(len(image_set), world_size)[rank]
    bounds = ((low, min(low + batch_size, stop)) for low in range(start, stop, batch_size))
    return ((image_set.images[low:high], image_set.labels[low:high]) for low, high in bounds)


def _largest_block(size: int, world_size: int, accumulation: int) -> int:
    fitting = (
        b for b in range(size, 0, -1) if can_cut(size, block=b, world_size=world_size, accumulation=accumulation)
    )
    return next(fitting, 1)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__} ({value!r})")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 to {world_size - 1} (world_size={world_size}), not {rank}")
