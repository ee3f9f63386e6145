"""A vote between ranks that no step waits for, by one collective."""

import functools

import torch
import torch.distributed as dist

from robust_dist.ranks.talk import world_size


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # One a device: each stream holds memory of its own, and torch has 32 of them to share out.
    return torch.cuda.Stream(device)


class Ballot:
    """One vote: one asynchronous one-element sum, counted later.

    On an accelerator the sum is started from a stream for votes alone and copied to pinned memory, so that counting
    waits for the reduction and never for the kernels that were queued since.

    Args:
        vote: This rank's.
        group: The ranks that vote; None is the default group.
    """

    def __init__(self, vote: bool, group: dist.ProcessGroup | None) -> None:
        self._work: dist.Work | None = None
        self._event: torch.cuda.Event | None = None
        self.num_voters = world_size(group)
        self._votes = torch.tensor([int(vote)], dtype=torch.int32)
        if self.num_voters > 1:
            device = _device_of(group)
            if device.type == "cuda":
                self._start_on_cuda(device, group)
            else:
                self._votes = self._votes.to(device)
                self._work = dist.all_reduce(self._votes, group=group, async_op=True)

    def _start_on_cuda(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._votes = self._votes.pin_memory()
        with torch.cuda.stream(_stream(device)):
            self._on_device = self._votes.to(device, non_blocking=True)
            work = dist.all_reduce(self._on_device, group=group, async_op=True)
            assert work is not None
            # Makes the side stream wait, not the host.
            work.wait()
            self._votes.copy_(self._on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def count(self) -> int:
        """The number of ranks that voted yes."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return int(self._votes[0])


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """The device that a tensor must be on for `group` to reduce it: the CPU where the backend takes it."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    kind = devices[0]
    return torch.device(kind, getattr(torch, kind).current_device())
