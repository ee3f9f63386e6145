"""How an epoch of any set is cut into global batches, and these between ranks and micro-batches."""

from dataclasses import dataclass, replace
from itertools import pairwise

from robust_dist.validate import whole_number

Run = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How epochs are drawn, and cut into global batches, ranks and micro-batches.

    A global batch is `batch_size` consecutive positions, cut into contiguous runs of whole blocks of `block`
    positions, as even as possible: one a rank, and within a rank one a micro-batch. So 1, 2 or 4 ranks see the same
    global batches, and CutMix of mode "elem", which draws partners within a block, the same pairs.

    Attributes:
        batch_size: samples of a global batch (all ranks, all micro-batches).
        seed: of the order and of the keys.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        accumulation: micro-batches an optimizer step.
        block: samples that are never parted.
        drop_last: leave out the last, shorter global batch of an epoch; else every sample is seen once an epoch.

    Raises:
        TypeError: a count that is no int.
        ValueError: a count below 1, or a rank outside the world.
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

        The batch is cut into blocks of `block` samples (the last one may be shorter), the blocks into one run a rank,
        each rank's run into `accumulation` runs. So a block is never torn, and the ranks' runs in order are the batch.
        """
        first, last = even_cuts(-(-size // self.block), self.world_size)[self.rank]
        runs = even_cuts(last - first, self.accumulation)
        return [((first + start) * self.block, min((first + stop) * self.block, size)) for start, stop in runs]

    def fits(self, size: int) -> bool:
        """Whether every micro-batch of every rank gets at least one block of a global batch of `size` samples."""
        return -(-size // self.block) // self.world_size >= self.accumulation


@dataclass(frozen=True)
class BatchPlan:
    """The positions in a set's epochs that a rank sees at each optimizer step.

    Attributes:
        name: what error messages call the set.
        samples: samples of the set.
        cut: how its epochs are cut; a number is the batch size of one process, as up to 0.6.0.

    Raises:
        ValueError: a cut that leaves a rank or a micro-batch empty.
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
        """Optimizer steps (global batches) of an epoch."""
        full, rest = divmod(self.samples, self.cut.batch_size)
        return full + (rest > 0 and not self.cut.drop_last)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks."""
        return min(self.steps * self.cut.batch_size, self.samples)

    def global_size(self, step: int) -> int:
        """Samples of the global batch of `step`."""
        return min(self.cut.batch_size, self.samples - step * self.cut.batch_size)

    def runs(self, step: int) -> list[Run]:
        """This rank's micro-batches as runs (start, stop) of positions in the global batch of `step`."""
        return self.cut.runs(self.global_size(step))

    def check_start(self, start_step: int) -> None:
        """Raise a ValueError where an epoch cannot start at `start_step` (at `steps` nothing is left)."""
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step must lie in 0 to {self.steps} (steps_per_epoch), not {start_step}")

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
    """Cut range(count) into `parts` contiguous runs (start, stop) whose lengths differ by one at most."""
    bounds = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def check_counts(**counts: int) -> None:
    """Raise a TypeError for what is no whole number, and a ValueError for what is below 1, by its name."""
    for name, value in counts.items():
        whole_number(name, value, 1)


def check_rank(rank: int, world_size: int) -> None:
    """Raise a ValueError for a rank outside the world."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 to {world_size - 1} (world_size={world_size}), not {rank}")
