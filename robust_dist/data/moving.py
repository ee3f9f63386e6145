"""Moving batches to the device on a stream of their own, while the last step runs."""

from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


class Moving(NamedTuple):
    """Tensors on their way to a device, and the event that says when they are there (None: they are)."""

    tensors: Tensors
    arrived: torch.cuda.Event | None


class Mover:
    """Copies to one device; on a CPU, or where the tensors lie there already, it does nothing.

    Args:
        device: where tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """How many batches are worth moving before they are asked for."""
        return 0 if self._stream is None else 1

    def start(self, *tensors: Tensor | None) -> Moving:
        """Begin to move tensors; does not wait where they lie in pinned memory."""
        if self._stream is None:
            return Moving(tuple(None if t is None else t.to(self.device) for t in tensors), None)
        with torch.cuda.stream(self._stream):
            moved = tuple(None if t is None else _pinned(t).to(self.device, non_blocking=True) for t in tensors)
            return Moving(moved, self._stream.record_event())

    def finish(self, moving: Moving) -> Tensors:
        """The moved tensors, for use on the current stream, which waits for them; this process does not."""
        if moving.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(moving.arrived)
            for tensor in moving.tensors:
                if tensor is not None:
                    # Their memory belongs to the copying stream, which must not reuse it while this one reads.
                    tensor.record_stream(current)
        return moving.tensors


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()
