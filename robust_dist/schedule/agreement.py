"""Whether a process group has other ranks, and where it reduces tensors."""

import torch
import torch.distributed as dist


def taking_part(group: dist.ProcessGroup | None) -> bool:
    """Whether this process has others in `group` (None: the default group) to agree with."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """The device that a tensor must be on for `group` to reduce it: the CPU where the backend takes it."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    kind = devices[0]
    return torch.device(kind, getattr(torch, kind).current_device())
