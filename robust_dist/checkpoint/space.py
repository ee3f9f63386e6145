"""Room for checkpoints: what is free, what one takes, and what to say where it does not fit."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def free_memory() -> int | None:
    """Bytes of memory that this machine and this process's control group still have; None where nothing tells."""
    limits = [_from_meminfo(), _from_cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _from_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _from_cgroup() -> int | None:
    """What a container (cgroup v2, then v1) may still take."""
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
    """Bytes as a person reads them: 1.5 GiB."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file that could not be written."""
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
    """What of a model decides on the size of its checkpoints.

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
        """Of a prepared model, without its outermost wrapper."""
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
    """Whether staging at `path` takes no memory of the host's."""
    return SHARED_MEMORY not in (path, *path.parents)


def room_for_staging(path: Path) -> int:
    """Bytes that may be staged at `path`: of the memory at most half, or training would be killed for it."""
    free = free_bytes(path)
    memory: Any = None if unlike_memory(path) else free_memory()
    return free if memory is None else min(free, memory // 2)
