"""Copies to the device on a stream of their own, while the last step runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple[Any, ...])


class Prefetcher:
    """Gives items out on a device, and copies the next one while the last one is in use.

    On a CPU nothing runs ahead.

    Args:
        device: where tensors go; None leaves them where they are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """How many items are worth copying before they are asked for."""
        return 0 if self._stream is None else 1

    def run(self, items: Iterable[list[T]]) -> Iterator[list[T]]:
        """The items, named tuples each, with their tensors on the device; what is no tensor stays as it is.

        The copies do not wait where tensors lie in pinned memory.
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
        """The copies, for use on the current stream, which waits for them; this process does not."""
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
