"""Memory that a rank uses: of its GPU, or of the host where it computes on the CPU."""

from pathlib import Path

import torch

GIB = 2**30


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest so far: allocated by torch on a GPU, else resident of this process. Waits for nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident()


def total_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has; None for the processor, whose limit is not its own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's figure, it begins anew in a process that was started by a larger one.
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0].split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)
