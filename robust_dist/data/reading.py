"""Reading images in worker processes: requests in, packs of uint8 images out, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from robust_dist.data.batches import Pack, Request
from robust_dist.data.decode import decode_rgb
from robust_dist.data.errors import BadImage, BadImageError, WorkersLostError
from robust_dist.data.fast_decode import fast_crop
from robust_dist.data.image_cache import CachedImages, ImageCache
from robust_dist.data.source import ImageSource

# Makes the final image; called with the result of `decode_rgb` and the sample's key.
Crop = Callable[[Any, int], Tensor]
T = TypeVar("T", bound=tuple[Any, ...])
# Tensors up to this many bytes are sent to the rank by value.
BY_VALUE = 2**16
# Seconds in which a worker's death is noticed after its missing results.
GONE_WITHIN = 0.5
# Signals sent to ranks, to save or stop; workers stay until their rank no longer needs them.
SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class ImageReader(Dataset[Pack]):
    """A worker's job: read, decode and crop the images of a request; a bad one's place is filled.

    Args:
        source: the images.
        crop: turns each of them into uint8 [3, size, size].
        size: height and width of the result.
        block: a bad image's place is filled with a copy of a good one from the same `block` slots, if there is one.
        fast: whether JPEGs are decoded by `fast_crop`; the crop must then be one that it takes.
        cache: keeps decoded images; requires the same crops.
    """

    def __init__(
        self,
        source: ImageSource,
        crop: Crop,
        size: int,
        block: int = 1,
        *,
        fast: bool = False,
        cache: ImageCache | None = None,
    ) -> None:
        self.source, self.crop, self.size, self.block, self.fast = source, crop, size, block, fast
        self.cached = None if cache is None else CachedImages(source, crop, fast, cache)

    def __getitem__(self, request: tuple[list[int], list[int]]) -> Pack:
        """Read the images of the indices, cropped by the keys.

        Raises:
            ValueError: the source returned a label outside its classes.
        """
        indices, keys = request
        images = room(len(indices), self.size)
        labels = torch.zeros(len(indices), dtype=torch.int64)
        bad: dict[int, BadImage] = {}
        for slot, (index, key) in enumerate(zip(indices, keys, strict=True)):
            try:
                images[slot], labels[slot] = self.sample(index, key)
            except BadImageError as error:
                bad[slot] = BadImage(self.source.where(index), str(error))
        return filled(images, labels, bad, self.block)

    def sample(self, index: int, key: int) -> tuple[Tensor, int]:
        """A sample's image, uint8 [3, size, size], and its label.

        Raises:
            BadImageError: see `ImageSource.read` and `decode_rgb`.
        """
        if self.cached is not None:
            image, label = self.cached.read(index, key)
            return image, self._checked(index, label)
        data, label = self.read(index)
        return fast_crop(data, self.crop, key) if self.fast else self.crop(decode_rgb(data), key), label

    def read(self, index: int) -> tuple[bytes, int]:
        """A sample's file and its label."""
        data, label = self.source.read(index)
        return data, self._checked(index, label)

    def _checked(self, index: int, label: int) -> int:
        if not 0 <= label < len(self.source.classes):
            raise ValueError(
                f"{self.source.where(index)} has label {label}, outside the {len(self.source.classes)} classes of "
                f"{self.source.name} (0 to {len(self.source.classes) - 1})"
            )
        return label


def filled(images: Tensor, labels: Tensor, bad: Mapping[int, BadImage], block: int) -> Pack:
    """The pack of images, with stand-ins of weight 0 in the `bad` slots; changes images and labels."""
    if not bad:
        return Pack(images, labels)
    weights, slots = torch.ones(len(labels)), sorted(bad)
    weights[slots] = 0
    for slot, other in stand_ins(slots, len(labels), block).items():
        images[slot], labels[slot] = images[other], labels[other]
    return Pack(images, labels, weights, tuple(bad[slot] for slot in slots))


def room(count: int, size: int) -> Tensor:
    """Zeros for a batch of images, uint8 [count, 3, size, size]; in a worker, in memory shared with its rank.

    So a batch is written where the rank reads it; torch copies other tensors when it sends them.
    """
    if get_worker_info() is None:
        return torch.zeros(count, 3, size, size, dtype=torch.uint8)
    # The system provides new pages zeroed.
    storage = torch.UntypedStorage._new_shared(count * 3 * size * size)
    whole = torch.empty(0, dtype=torch.uint8)
    whole.set_(storage)
    return whole.view(count, 3, size, size)


def stand_ins(bad: Sequence[int], count: int, block: int) -> dict[int, int]:
    """For each bad slot of `count`, a good one whose image takes its place; empty if all slots are bad.

    It is in the same block of `block` slots, so that CutMix still pastes from an image of the block; if the whole block
    is bad, it is in the nearest block that has one.
    """
    spoiled = set(bad)
    good = [slot for slot in range(count) if slot not in spoiled]
    if not good:
        return {}
    return {slot: min(good, key=lambda other: abs(other // block - slot // block)) for slot in bad}


class Workers:
    """Worker processes that serve requests; they live from the first request to `close`.

    They are forked from a server process without this process's threads (multiprocessing's "forkserver"): a fork of a
    process with a CUDA context or with NCCL's or gloo's threads can inherit a lock that is never released. They ignore
    the signals that ask a rank to save or stop, and end when this process ends, however it ends.

    Args:
        reader: what each of them runs; it is pickled.
        workers: number of processes; 0 reads in this process.
        prefetch: requests read ahead by each.
        pin: whether images are returned in pinned memory.
    """

    def __init__(self, reader: Dataset[Any], *, workers: int, prefetch: int = 2, pin: bool = False) -> None:
        self.requests = _Requests()
        options: dict[str, Any] = {"collate_fn": _small_parts_by_value if workers else _unchanged}
        if workers:
            options |= {
                "multiprocessing_context": _server(),
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": shield,
            }
        self._loader: DataLoader[Any] | None = DataLoader(
            reader,
            batch_size=None,
            sampler=self.requests,
            num_workers=workers,
            pin_memory=pin,
            # Its own generator: starting workers must not consume a number from the one that dropout uses.
            generator=torch.Generator(),
            **options,
        )
        self._reading: Generator[tuple[Request, Pack], None, None] = _nothing()
        self._processes: list[BaseProcess] = []

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pack]]:
        """Each request with its pack, in order. A new call ends the previous one.

        Raises:
            WorkersLostError: a worker was killed or exited.
        """
        self._reading.close()
        self._reading = self._read(requests)
        return self._reading

    def close(self) -> None:
        """Stop the workers."""
        self._reading.close()
        self._loader, self._processes = None, []

    def _read(self, requests: Iterator[Request]) -> Generator[tuple[Request, Pack], None, None]:
        assert self._loader is not None, "the workers were closed"
        asked: deque[Request] = deque()
        self.requests.source = requests, asked
        try:
            for pack in self._started(self._loader):
                yield asked.popleft(), _as_tensors(pack)
        except (RuntimeError, OSError, EOFError) as error:
            # A worker's error is raised again here, and that worker lives on.
            if not (self._processes and wait([one.sentinel for one in self._processes], GONE_WITHIN)):
                raise
            raise WorkersLostError(
                f"a worker process that reads images is gone ({error}). Usually memory ran out and the system killed"
                " it, or /dev/shm is too small: set fewer data.workers or a smaller data.prefetch, or give the"
                " container more shared memory"
            ) from error

    def _started(self, loader: "DataLoader[Pack]") -> Iterator[Pack]:
        before = multiprocessing.active_children()
        packs = iter(loader)
        self._processes += [one for one in multiprocessing.active_children() if one not in before]
        return packs


class _Requests(Sampler[tuple[list[int], list[int]]]):
    """Hands requests to workers as they have room, and keeps those in flight."""

    def __init__(self) -> None:
        self.source: tuple[Iterator[Request], deque[Request]] = (iter(()), deque())

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        requests, asked = self.source
        for request in requests:
            asked.append(request)
            yield request.indices.tolist(), request.keys.tolist()


def _nothing() -> Generator[tuple[Request, Pack], None, None]:
    yield from ()


def _unchanged(pack: T) -> T:
    return pack


def _small_parts_by_value(pack: T) -> T:
    """For a worker's pack: sending a tensor costs a file and several messages, so small ones become arrays."""
    small = (isinstance(part, Tensor) and part.nbytes <= BY_VALUE for part in pack)
    return type(pack)(*(part.numpy() if is_small else part for part, is_small in zip(pack, small, strict=True)))


def _as_tensors(pack: T) -> T:
    return type(pack)(*(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in pack))


def _server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "robust_dist.data.worker_server"])
    return context


def shield(worker: int = 0) -> None:
    """Make this process a worker: deaf to signals meant for ranks, and gone when its rank is."""
    rank = multiprocessing.parent_process()
    if rank is None or rank.pid is None:
        return
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Left to `_until_told`; threads created later have it blocked too.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_until_told, args=(rank.pid,), daemon=True, name="told-to-end").start()
    threading.Thread(target=_until_alone, args=(rank.sentinel,), daemon=True, name="left-alone").start()


def _until_told(rank: int) -> None:
    """End this process when its rank, and nobody else, terminates it."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
        pass
    os._exit(0)


def _until_alone(rank_ended: int) -> None:
    """End this process with its rank: torch's watchdog checks the parent, which is the server and lives on."""
    wait([rank_ended])
    os._exit(1)
