"""How an epoch of any set is ordered and divided into batches among ranks; a batch on its way to a step."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robust_dist.augment.keys import Stream, bits, permutation, sample_keys
from robust_dist.data.errors import BadImage
from robust_dist.validate import whole_number

Run = tuple[int, int]
Pipeline = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cut:
    """How epochs are ordered and divided into global batches, ranks and micro-batches.

    A global batch is `batch_size` consecutive positions, divided as evenly as possible into contiguous runs of whole
    blocks of `block` positions: one run per rank, and within a rank one per micro-batch. So 1, 2 or 4 ranks see the
    same global batches, and CutMix in mode "elem", which draws partners within a block, the same pairs.

    Attributes:
        batch_size: samples in a global batch (all ranks, all micro-batches).
        seed: seed of the order and of the keys.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        accumulation: micro-batches per optimizer step.
        block: samples that are never separated.
        drop_last: drop an epoch's last, shorter global batch; otherwise every sample is seen once per epoch.

    Raises:
        TypeError: a count is not an int.
        ValueError: a count is below 1, or the rank is outside the world.
    """

    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    block: int = 8
    drop_last: bool = False

    def __post_init__(self) -> None:
        check_counts(
            batch_size=self.batch_size,
            world_size=self.world_size,
            accumulation=self.accumulation,
            block=self.block,
        )
        check_rank(self.rank, self.world_size)

    def runs(self, size: int) -> list[Run]:
        """The rank's micro-batches as runs (start, stop) of positions in a global batch of `size` samples.

        The batch is divided into blocks of `block` samples (the last may be shorter), the blocks into one run per rank,
        and each rank's run into `accumulation` runs. So a block is never split, and the ranks' runs in order form the
        batch.
        """
        first, last = even_cuts(-(-size // self.block), self.world_size)[self.rank]
        runs = even_cuts(last - first, self.accumulation)
        return [((first + start) * self.block, min((first + stop) * self.block, size)) for start, stop in runs]

    def fits(self, size: int) -> bool:
        """Whether every micro-batch of every rank gets at least one block of a global batch of `size` samples."""
        return -(-size // self.block) // self.world_size >= self.accumulation


@dataclass(frozen=True)
class BatchPlan:
    """The positions of a set's epochs that a rank sees at each optimizer step.

    Attributes:
        name: what error messages call the set.
        samples: number of samples in the set.
        cut: how its epochs are divided; a number is the batch size of one process, as up to 0.6.0.

    Raises:
        ValueError: the cut leaves a rank or a micro-batch empty.
    """

    name: str
    samples: int
    cut: Cut

    def __post_init__(self) -> None:
        if not isinstance(self.cut, Cut):
            object.__setattr__(self, "cut", Cut(self.cut, seed=0))
        if self.steps == 0:
            raise ValueError(
                f"drop_last=True with batch_size={self.cut.batch_size} leaves no batch of the {self.samples} images "
                f"of {self.name}: set drop_last=False or a smaller batch_size"
            )
        for step in {0, self.steps - 1}:
            self._check_size(self.global_size(step), last=step > 0)

    @property
    def steps(self) -> int:
        """Optimizer steps (global batches) per epoch."""
        full, rest = divmod(self.samples, self.cut.batch_size)
        return full + (rest > 0 and not self.cut.drop_last)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks."""
        return min(self.steps * self.cut.batch_size, self.samples)

    def global_size(self, step: int) -> int:
        """Samples in the global batch of `step`."""
        return min(self.cut.batch_size, self.samples - step * self.cut.batch_size)

    def runs(self, step: int) -> list[Run]:
        """This rank's micro-batches as runs (start, stop) of positions in the global batch of `step`."""
        return self.cut.runs(self.global_size(step))

    def check_start(self, start_step: int) -> None:
        """Raise a ValueError if an epoch cannot start at `start_step` (at `steps` nothing is left)."""
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step must be from 0 to {self.steps} (steps_per_epoch), not {start_step}")

    def _check_size(self, size: int, *, last: bool) -> None:
        if self.cut.fits(size):
            return
        world_size, accumulation, block = self.cut.world_size, self.cut.accumulation, self.cut.block
        parts = world_size * accumulation
        remedies = ["drop_last=True"] if last else [f"batch_size of {parts * block} or more"]
        if size >= parts:
            remedies.append(f"block of {_largest_block(size, self.cut)} or less")
        remedies.append("fewer ranks or micro-batches")
        raise ValueError(
            f"{'the last' if last else 'a'} global batch of {size} samples (batch_size={self.cut.batch_size}, "
            f"{self.samples} images) has {-(-size // block)} blocks of block={block}: too few for "
            f"world_size={world_size} x accumulation={accumulation}. Set {', or '.join(remedies)}."
        )


def _largest_block(size: int, cut: Cut) -> int:
    return next((block for block in range(size, 0, -1) if replace(cut, block=block).fits(size)), 1)


def even_cuts(count: int, parts: int) -> list[Run]:
    """Divide range(count) into `parts` contiguous runs (start, stop) whose lengths differ by at most one."""
    bounds = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def check_counts(**counts: int) -> None:
    """Raise a TypeError for a count that is not a whole number, and a ValueError for one below 1, by name."""
    for name, value in counts.items():
        whole_number(name, value, 1)


def check_rank(rank: int, world_size: int) -> None:
    """Raise a ValueError for a rank outside the world."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1} (world_size={world_size}), not {rank}")


class Request(NamedTuple):
    """One micro-batch to read.

    Attributes:
        indices: int64 [b], the samples' numbers in the set.
        keys: int64 [b], `sample_keys(seed, epoch, indices)`, from which the crops are drawn.
    """

    indices: Tensor
    keys: Tensor


class Pack(NamedTuple):
    """One micro-batch as it was read.

    Attributes:
        images: uint8 [b, C, H, W]; for a whole set [N, C, H, W].
        labels: int64 [b]; for a whole set [N].
        weights: float32 [b], 0 for bad images; None if there are none.
        bad: the bad images.
        whole: images and labels are those of the whole set, from which a pipeline gathers the samples.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor | None = None
    bad: tuple[BadImage, ...] = ()
    whole: bool = False


class Batch:
    """A micro-batch of b samples on the device; its length is b.

    If the set lies on the device, the batch holds all of it: `images` and `labels` are gathered on first access, and
    `augmented` does not need them.

    Args:
        images: uint8 [b, C, H, W]; for a whole set [N, C, H, W].
        labels: int64 [b]; for a whole set [N].
        indices: int64 [b], the samples' numbers in the set.
        keys: int64 [b], `sample_keys(seed, epoch, indices)`.
        global_size: samples in the whole global batch, over its ranks and micro-batches, by which the summed loss is
            divided; it includes bad images, so that it does not depend on who read them.
        weights: float32 [b], 1 for a sample and 0 for an unreadable one, whose place a copy of another sample takes;
            None if all count.
        whole: images and labels are those of the whole set.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        keys: Tensor,
        global_size: int,
        weights: Tensor | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.source, self.whole = (images, labels), whole
        self.indices, self.keys, self.global_size, self.weights = indices, keys, global_size, weights

    @cached_property
    def images(self) -> Tensor:
        """The samples' images, uint8 [b, C, H, W]."""
        return self._own(self.source[0])

    @cached_property
    def labels(self) -> Tensor:
        """The samples' labels, int64 [b]."""
        return self._own(self.source[1])

    def augmented(self, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
        """`pipeline(images, labels, keys)`; for a set on the device, the pipeline gathers what it reads.

        Args:
            pipeline: A RobustAugment, compiled or not.

        Returns:
            Images and targets, as returned by the pipeline.
        """
        images, labels = self.source
        if self.whole:
            return pipeline(images, labels, self.keys, index=self.indices)
        return pipeline(images, labels, self.keys)

    def __len__(self) -> int:
        return len(self.indices)

    def _own(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.indices) if self.whole else values


class Order(Protocol):
    """Every sample of a set, once."""

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """For each run, its positions in the global batch that spans positions start to stop of the order."""
        ...


class Permutation:
    """The order of a set held whole in memory: drawn at once with its keys; requests are views of it.

    Args:
        seed: seed of the run.
        epoch: the epoch.
        count: number of samples in the set.
        device: where indices and keys are created.
    """

    def __init__(self, seed: int, epoch: int, count: int, device: torch.device) -> None:
        self.indices = permutation(seed, epoch, count, device)
        self.keys = sample_keys(seed, epoch, self.indices)

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """See `Order.requests`."""
        indices, keys = self.indices[start:stop], self.keys[start:stop]
        return [Request(indices[low:high], keys[low:high]) for low, high in runs]


class EpochOrder:
    """The order of a set stored in groups: shuffled, but with few groups read at a time by each rank.

    The groups (shards, row groups) are permuted and joined, in that order, into windows of at least `window` samples;
    the samples of a window are permuted. With one group, or a window as large as the set, this is a permutation of the
    whole set, and with one group it is `augment.keys.permutation`. A batch's samples are then sorted by group, so that
    ranks, which take contiguous parts of it, read different groups, and the same ones at the next step.

    It holds one window's indices at a time (4 or 8 bytes per sample, and briefly about 50 while it is drawn), and one
    number per group.

    Args:
        seed: seed of the run.
        epoch: the epoch.
        group_sizes: number of samples in each group of consecutive indices, see `ImageSource.group_sizes`.
        window: minimum number of samples shuffled together.
    """

    def __init__(self, seed: int, epoch: int, group_sizes: Sequence[int], window: int) -> None:
        self.seed, self.epoch = seed, epoch
        self.group_sizes = group_sizes
        self.group_starts = [0, *accumulate(group_sizes)]
        self.dtype = torch.int32 if self.group_starts[-1] < 2**31 else torch.int64
        self.windows = _windows(self._permuted_groups(), group_sizes, window)
        sizes = (sum(group_sizes[group] for group in groups) for groups in self.windows)
        self.window_starts = [0, *accumulate(sizes)]
        self._number, self._held = -1, (torch.empty(0), torch.empty(0))

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """See `Order.requests`."""
        indices = self.batch(start, stop)
        return [Request(indices[low:high], sample_keys(self.seed, self.epoch, indices[low:high])) for low, high in runs]

    def batch(self, start: int, stop: int) -> Tensor:
        """The samples at positions start to stop of the order, as one global batch: int64 [stop - start]."""
        indices, places, found = [], [], start
        while found < stop:
            number = bisect_right(self.window_starts, found) - 1
            end = min(stop, self.window_starts[number + 1])
            part = slice(found - self.window_starts[number], end - self.window_starts[number])
            window = self._window(number)
            indices.append(window[0][part])
            places.append(window[1][part])
            found = end
        by_group = torch.argsort(torch.cat(places), stable=True)
        return torch.cat(indices)[by_group].long()

    def _permuted_groups(self) -> list[int]:
        # Groups are counted backwards from -1, so that their draws differ from all samples'.
        numbers = torch.arange(-1, -len(self.group_sizes) - 1, -1, dtype=torch.int64)
        drawn = bits(sample_keys(self.seed, self.epoch, numbers), Stream.ORDER)
        order: list[int] = torch.argsort(drawn, stable=True).tolist()
        return [group for group in order if self.group_sizes[group]]

    def _window(self, number: int) -> tuple[Tensor, Tensor]:
        """The shuffled indices of a window, and for each the place of its group among the window's groups."""
        if number != self._number:
            self._held = self._draw(self.windows[number], self.window_starts[number])
            self._number = number
        return self._held

    def _draw(self, groups: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        indices = torch.cat([torch.arange(self.group_starts[g], self.group_starts[g + 1]) for g in groups])
        order = torch.argsort(bits(sample_keys(self.seed, self.epoch, indices), Stream.ORDER), stable=True)
        indices = indices[order].to(self.dtype)
        # `start` puts a later window's groups after an earlier one's in a batch that has both.
        places = torch.arange(start, start + len(groups), dtype=self.dtype)
        if len(groups) == 1:
            return indices, places.expand(len(indices))
        sizes = torch.tensor([self.group_sizes[group] for group in groups])
        return indices, torch.repeat_interleave(places, sizes)[order]


def _windows(groups: Sequence[int], sizes: Sequence[int], window: int) -> list[list[int]]:
    """Join consecutive groups until they hold `window` samples."""
    windows: list[list[int]] = []
    room = 0
    for group in groups:
        if room <= 0:
            windows.append([])
            room = window
        windows[-1].append(group)
        room -= sizes[group]
    return windows
