"""What a call does, counted: operations or kernels, the bytes that they touch, waits of the host for a value."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They reserve memory without touching it.
_RESERVING = frozenset(("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"))
# Their results, or the results' shapes, are values that the host must have.
_READING = frozenset(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"))
_INDEXING = frozenset(("aten::index", "aten::index_put_", "aten::index_put"))
_COPYING = frozenset(("aten::_to_copy", "aten::copy_"))
# They do not read what they write to.
_OVERWRITING = frozenset(("aten::copy_", "aten::fill_", "aten::zero_"))
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Counts:
    """A call's work; means where calls differ.

    Attributes:
        operations: ATen operations that are no views; on a GPU, kernels, copies and fills.
        bytes: Of the inputs and outputs of these operations. Work that does not pass through torch's operators (a C or
            Triton kernel, PIL) is not in it.
        reads: Times that the host waited for a value of a tensor on the device, as `.item()` does.
    """

    operations: float
    bytes: float
    reads: float


class OperationCounter(TorchDispatchMode):
    """Counts ATen operations that are no views while it is active, and the bytes of their inputs and outputs.

    Attributes:
        operations: How many.
        bytes: Their inputs' and outputs', each operation for itself; an expanded tensor has those of its storage.
        reads: Operations that give the host a value of a tensor on `device`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device_type = device.type
        self.operations = self.bytes = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and count it."""
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        name = func.name().partition(".")[0]
        self.reads += self._is_read(name, inputs, outputs)
        if name not in _RESERVING and name != "aten::_local_scalar_dense" and not _is_view(func, inputs, outputs):
            self.operations += 1
            read = inputs[1:] if name in _OVERWRITING else _tensors((args, _without_out(kwargs)))
            self.bytes += sum(_bytes(tensor) for tensor in (*read, *outputs))
        return out

    def _is_read(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        by_mask = name in _INDEXING and any(tensor.dtype == torch.bool for tensor in inputs[1:])
        if name in _READING or by_mask:
            return inputs[0].device.type == self.device_type
        leaves = name in _COPYING and self.device_type != "cpu" and inputs[-1].device.type == self.device_type
        return leaves and outputs[0].device.type == "cpu"


def _without_out(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (kwargs or {}).items() if key != "out"}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable or not inputs or not outputs:
        return False
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs} - {0}
    return all(tensor.untyped_storage().data_ptr() in known for tensor in outputs)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count(call: Callable[[], object], device: torch.device, calls: int = 4) -> Counts:
    """Count some calls; call it once before, so that what it keeps is made.

    Args:
        call: The work; calls may differ by their random draws.
        device: Where it works. On a GPU the kernels of further calls are counted by torch's profiler.
        calls: How many.
    """

    def several() -> None:
        for _ in range(calls):
            call()

    with OperationCounter(device) as counter:
        several()
    operations = _kernels(several) if device.type == "cuda" else counter.operations
    return Counts(operations / calls, counter.bytes / calls, counter.reads / calls)


def _kernels(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in profiler.events() or [])


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call takes while it runs and gives back, in bytes; None where nothing tells.

    On a GPU it is the allocator's peak. On the CPU the kernel's record of the process's largest resident size, which
    is off by up to some 100 KiB, is started afresh (Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    before_on_host = _start_record()
    if before_on_host is None:
        return None
    call()
    after = _resident("VmHWM")
    return None if after is None else max(0, after - before_on_host)


def _start_record() -> int | None:
    with contextlib.suppress(AttributeError, OSError):
        # Else what an earlier call freed would be there already.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(key: str) -> int | None:
    found = list(_values(key))
    return found[0] if found else None


def _values(key: str) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                yield int(line.split()[1]) * 1024
