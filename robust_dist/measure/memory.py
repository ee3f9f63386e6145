"""Memory in bytes: of storages, of a device, of this process."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

GIB, MIB = 2**30, 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def storage_key(tensor: Tensor) -> int:
    """A number shared by the tensors of one storage while it lives; also for fake tensors, which have no address."""
    return tensor.untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages under these tensors, each storage once; a DTensor counts as its local part."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors if tensor is not None]
    return sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in local}.values())


def peak_memory(device: torch.device) -> int:
    """The peak so far, bytes: allocated by torch on a GPU, else resident in this process. Does not synchronise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Unlike getrusage's figure, the kernel's starts afresh in a process that a larger one started.
    peak = resident(peak=True)
    if peak is not None:
        return peak
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes of memory that this machine and this process's control group have left."""
    import psutil

    available, allowed = int(psutil.virtual_memory().available), _from_cgroup()
    return available if allowed is None else min(available, allowed)


def _from_cgroup() -> int | None:
    """Bytes that a container (cgroup v2, then v1) may still use."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (root / limit).read_text().strip(), (root / used).read_text().strip()
        except OSError:
            continue
        return None if most == "max" else max(0, int(most) - int(now))
    return None


def text_of(count: int) -> str:
    """A number of bytes for a person to read: 1.5 GiB."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def total_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has; None for the CPU, whose memory other processes share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def resident(*, peak: bool = False) -> int | None:
    """Resident bytes of this process, or with `peak` the most since `restart_peak`; None outside Linux."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:" if peak else "VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


def restart_peak() -> bool:
    """Restart the process's peak from what is in memory now; False if the kernel does not allow it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")
        return True
    return False


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call takes while it runs and then frees, in bytes; None if it cannot be measured.

    On a GPU it is the allocator's peak. On the CPU it is the process's, off by up to some 100 KiB (Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(AttributeError, OSError):
        # Otherwise memory that an earlier call freed would be there already.
        ctypes.CDLL(None).malloc_trim(0)
    if not restart_peak():
        return None
    before_on_host = resident()
    call()
    highest = resident(peak=True)
    return None if highest is None or before_on_host is None else max(0, highest - before_on_host)
