"""Epochs of a set as batches on the device, copied there during the previous step; evaluation batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from robust_dist.data.batches import Batch, BatchPlan, Cut, Pack, Request, check_counts, check_rank, even_cuts
from robust_dist.data.errors import BadImage

T = TypeVar("T", bound=tuple[Any, ...])
if TYPE_CHECKING:
    from robust_dist.data.sets import LabelledSet


class Prefetcher:
    """Yields items on a device, copying the next one while the current one is in use.

    On a CPU nothing runs ahead.

    Args:
        device: where tensors go; None leaves them where they are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """Number of items worth copying ahead."""
        return 0 if self._stream is None else 1

    def run(self, items: Iterable[list[T]]) -> Iterator[list[T]]:
        """The items, each a list of named tuples, with their tensors on the device; other values are unchanged.

        Copies from pinned memory are asynchronous.
        """
        under_way: deque[list[tuple[T, torch.cuda.Event | None]]] = deque()
        for item in items:
            under_way.append([self._start(part) for part in item])
            if len(under_way) > self.ahead:
                yield [self._finish(*part) for part in under_way.popleft()]
        for rest in under_way:
            yield [self._finish(*part) for part in rest]

    def _start(self, part: T) -> tuple[T, torch.cuda.Event | None]:
        if self.device is None:
            return part, None
        if self._stream is None:
            return _with_tensors(part, lambda tensor: tensor.to(self.device)), None
        with torch.cuda.stream(self._stream):
            moved = _with_tensors(part, lambda tensor: _pinned(tensor).to(self.device, non_blocking=True))
            return moved, self._stream.record_event()

    def _finish(self, part: T, arrived: torch.cuda.Event | None) -> T:
        """The copies, ready for use on the current stream, which waits for them; this process does not."""
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for value in part:
                if isinstance(value, Tensor):
                    # Their memory belongs to the copying stream, which must not reuse it while this one reads.
                    value.record_stream(current)
        return part


def _with_tensors(part: T, change: Callable[[Tensor], Tensor]) -> T:
    changed: T = type(part)(*(change(value) if isinstance(value, Tensor) else value for value in part))
    return changed


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()


class Reader(Protocol):
    """Reads a set's samples."""

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pack]]:
        """Each request with its pack, in order."""
        ...

    def close(self) -> None:
        """Stop the reading."""
        ...


class Direct:
    """Reads in this process, on demand.

    `fetch` makes the pack of a request.
    """

    def __init__(self, fetch: Callable[[Request], Pack]) -> None:
        self.fetch = fetch

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pack]]:
        """See `Reader.read`."""
        return ((request, self.fetch(request)) for request in requests)

    def close(self) -> None:
        """Nothing to stop."""


class _Part(NamedTuple):
    """A micro-batch on its way to the device: `Pack` and `Request`."""

    images: Tensor
    labels: Tensor
    weights: Tensor | None
    bad: tuple[BadImage, ...]
    whole: bool
    indices: Tensor
    keys: Tensor


class Loader:
    """Training batches of a set, a pure function of (seed, epoch, step, rank, world size).

    The order of an epoch depends on (seed, epoch) alone and is divided by `Cut`: every rank takes the same number of
    steps. Micro-batches may differ in size, so the loss is a sum divided by `Batch.global_size`.

    A batch that is not on the set's device is copied there during the previous step. A resumed epoch does not read the
    steps already done.

    A bad image is skipped: its slot holds a copy of a good one from the same block, or zeros if the micro-batch has
    none, and `Batch.weights` is 0 there. The copies do count in batch normalisation's statistics.

    Args:
        dataset: the set.
        cut: how its epochs are ordered and divided.

    Raises:
        ValueError: the cut leaves a rank or a micro-batch empty.
    """

    def __init__(self, dataset: "LabelledSet", cut: Cut) -> None:
        self.plan = BatchPlan(dataset.name, len(dataset), cut)
        self.order = partial(dataset.order, cut.seed)
        self.reader, self.prefetcher = dataset.reader(block=cut.block), dataset.prefetcher()
        self._bad: list[BadImage] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps (global batches) per epoch."""
        return self.plan.steps

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on, over all ranks, including bad ones."""
        return self.plan.samples_per_epoch

    def take_bad(self) -> list[BadImage]:
        """The bad images in this rank's steps since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's `accumulation` micro-batches for each optimizer step, from `start_step` to the epoch's end.

        With workers, a new epoch ends the one being read.

        Raises:
            ValueError: start_step is outside 0 to steps_per_epoch (where nothing is left).
            WorkersLostError: a worker was killed.
        """
        self.plan.check_start(start_step)
        return self._steps(epoch, range(start_step, self.plan.steps))

    def close(self) -> None:
        """Stop the workers, if any."""
        self.reader.close()

    def _steps(self, epoch: int, steps: range) -> Iterator[list[Batch]]:
        read = self.reader.read(self._requests(epoch, steps))
        parts = (_Part(*pack, *request) for request, pack in read)
        of_steps = (list(islice(parts, self.plan.cut.accumulation)) for _ in steps)
        for step, moved in zip(steps, self.prefetcher.run(of_steps), strict=True):
            size = self.plan.global_size(step)
            batches = [
                Batch(one.images, one.labels, one.indices, one.keys, size, one.weights, whole=one.whole)
                for one in moved
            ]
            self._bad += [image for one in moved for image in one.bad]
            yield batches

    def _requests(self, epoch: int, steps: range) -> Iterator[Request]:
        order = self.order(epoch)
        for step in steps:
            start = step * self.plan.cut.batch_size
            yield from order.requests(start, start + self.plan.global_size(step), self.plan.runs(step))


class DeviceLoader(Loader):
    """The Loader of a set whose batches lie on the set's device, with the fields of `Cut` as arguments.

    Raises:
        TypeError: a count is not an int.
        ValueError: a count is below 1, the rank is outside the world, or a rank or a micro-batch is left empty.
    """

    def __init__(
        self,
        image_set: "LabelledSet",
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        block: int = 8,
        drop_last: bool = False,
    ) -> None:
        super().__init__(image_set, Cut(batch_size, seed, rank, world_size, accumulation, block, drop_last))


def evaluation_batches(
    image_set: "LabelledSet", batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's contiguous share of the set, every sample on exactly one rank; for an ImageSet as views.

    Shares differ by at most one sample, so ranks may have different numbers of batches, and with fewer samples than
    ranks some have none: reduce over ranks after the loop, not inside it.

    Returns:
        Iterator of (images uint8 [b, C, H, W], labels int64 [b]) in the set's own order, with b at most `batch_size`.

    Raises:
        ValueError: batch_size or world_size is below 1, or the rank is outside the world.
    """
    check_counts(batch_size=batch_size, world_size=world_size)
    check_rank(rank, world_size)
    start, stop = even_cuts(len(image_set), world_size)[rank]
    return ((batch.images, batch.labels) for batch in image_set.eval_batches(start, stop, batch_size))
