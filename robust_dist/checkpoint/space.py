"""Disk and memory: what is free, what a checkpoint takes, and the error where it does not fit."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.engines.engine import Engine

SHARED_MEMORY = Path("/dev/shm")
# Headers, random states, the schedule, names.
_SMALL = 1 << 20


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, or will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory() -> int:
    """Bytes of memory that this machine and this process's control group still have."""
    import psutil

    available, allowed = int(psutil.virtual_memory().available), _from_cgroup()
    return available if allowed is None else min(available, allowed)


def _from_cgroup() -> int | None:
    """Bytes that a container (cgroup v2, then v1) may still take."""
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


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    try:
        count = free_bytes(path.parent)
        free = f"{text_of(count)} ({count} bytes) are free there"
    except OSError as second:
        free = f"its file system cannot be asked what is free ({second.strerror})"
    return CheckpointError(
        f"{path} could not be written: {reason}; {free}. What was half-written is not used, whole checkpoints are "
        "as they were: make room or mend the disk, and start the same command again"
    )


def _held(param: nn.Parameter) -> int:
    """Elements of a parameter that this rank holds."""
    local = param.to_local() if hasattr(param, "to_local") else param
    return int(local.numel())


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model on which those of its checkpoints depend.

    Attributes:
        elements: Elements of all parameters.
        held: Those that this rank holds.
        bytes_each: Of one element.
        buffers: Bytes of all buffers.
        moments: Bytes of the optimizer's state for one element: two float32 moments.
    """

    elements: int
    held: int
    bytes_each: int
    buffers: int
    moments: int = 2 * 4

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """The sizes of a prepared model, without its outermost wrapper."""
        params = list(model.parameters())
        return cls(
            # ZeRO-3 leaves the size of the whole parameter at the shard.
            elements=sum(int(getattr(param, "ds_numel", param.numel())) for param in params),
            held=sum(_held(param) for param in params),
            bytes_each=max((param.element_size() for param in params), default=4),
            buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        )


def checkpoint_bytes(
    engine: Engine, model: nn.Module, *, rank: int, world_size: int, whole: bool = False, averaged: bool = False
) -> int:
    """An upper estimate of what this rank writes into one checkpoint, in bytes.

    Args:
        engine: The engine that writes it.
        model: The prepared model, without its outermost wrapper.
        rank: This rank.
        world_size: All ranks.
        whole: The first rank gathers everything, as `Engine.saves_whole`.
        averaged: An exponential moving average of the weights is saved, too.
    """
    sizes = Sizes.of(model)
    average = sizes.elements * sizes.bytes_each + sizes.buffers if averaged and rank == 0 else 0
    saved = engine.saved_bytes(sizes, rank, world_size, whole=whole) + sizes.buffers + average
    return int(saved * 1.1) + _SMALL


def unlike_memory(path: Path) -> bool:
    """Whether files at `path` take none of the host's memory."""
    return SHARED_MEMORY not in (path, *path.parents)


def room_for_staging(path: Path) -> int:
    """Bytes that may be staged at `path`: at most half of the memory, or the system might kill training."""
    free = free_bytes(path)
    return free if unlike_memory(path) else min(free, free_memory() // 2)
