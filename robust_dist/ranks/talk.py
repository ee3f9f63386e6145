"""Values, decisions and errors shared by all ranks, so that no rank waits for one that has failed.

Each function also works in one process without a process group. `group` contains the participating ranks, which all
make the same calls; None is the default group.
"""

import functools
import pickle
import socket
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = dist.ProcessGroup | None
_ORIGIN = "_robust_dist_origin"


@dataclass(frozen=True)
class Origin:
    """The origin of an error that every rank raises.

    Attributes:
        rank: The lowest rank on which it was raised first.
        host: Its host.
        traceback: Its traceback there.
    """

    rank: int
    host: str
    traceback: str


def has_group() -> bool:
    """Whether torch has a default process group."""
    return dist.is_available() and dist.is_initialized()


def taking_part(group: Group = None) -> bool:
    """Whether this process is in `group` together with others."""
    return has_group() and dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def rank(group: Group = None) -> int:
    """This process's rank in `group`; 0 if it is alone."""
    return dist.get_rank(group) if taking_part(group) else 0


def world_size(group: Group = None) -> int:
    """The number of ranks in `group`; 1 if this process is alone."""
    return dist.get_world_size(group) if taking_part(group) else 1


def gather(value: T, group: Group = None) -> list[T]:
    """Every rank's value, in rank order; a collective."""
    if not taking_part(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(ours: Mapping[str, Any], problem: str, *, kind: type[Exception] = ValueError, group: Group = None) -> None:
    """Compare the reprs of named values between the ranks.

    Raises:
        kind: On every rank: `problem`, and for each name that differs the values and their ranks.
    """
    lines = differences(dict(enumerate(gather({name: repr(value) for name, value in ours.items()}, group))))
    if lines:
        raise kind(f"{problem}:\n  " + "\n  ".join(lines))


def raise_together(error: Exception | None, group: Group = None) -> None:
    """Raise any rank's error on every rank; the lowest rank's if there are several.

    `origin_of` returns the rank where it was raised.
    """
    found = gather(None if error is None else _portable(error), group)
    _raise(next((failure for failure in found if failure is not None), None))


def raise_problems(kind: type[Exception], problem: str | None, group: Group = None) -> None:
    """Raise `kind` on every rank if any rank has a problem; names the ranks unless all have the same one."""
    problems = gather(problem, group)
    if len(set(problems)) > 1:
        problem = "\n".join(by_rank({number: text for number, text in enumerate(problems) if text is not None}))
    if problem is not None:
        raise kind(problem)


def attempt(action: Callable[[], T], *, here: bool = True, group: Group = None) -> T | None:
    """Call `action` if `here` is true, and return its value, or None; if it fails on a rank, all raise the error."""
    value: T | None = None
    error: Exception | None = None
    if here:
        try:
            value = action()
        except Exception as caught:
            error = caught
    raise_together(error, group)
    return value


def on_rank_0(action: Callable[[], T], group: Group = None) -> T:
    """Call `action` on rank 0 and return its value, or raise its error, on every rank; rank 0 does not wait."""
    if not taking_part(group):
        return cast(T, attempt(action))
    box: list[Any] = [None]
    if rank(group) == 0:
        try:
            # Pickled here: the others must also receive the error for a value that cannot be sent.
            box = [pickle.dumps((action(), None))]
        except Exception as error:
            box = [pickle.dumps((None, _portable(error)))]
    dist.broadcast_object_list(box, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    value, failure = pickle.loads(box[0])
    _raise(failure)
    return cast(T, value)


def origin_of(error: BaseException) -> Origin | None:
    """The origin of an error raised on every rank; None for an error of only this rank."""
    return getattr(error, _ORIGIN, None)


def _portable(error: Exception) -> tuple[Exception, Origin]:
    """The error, or an equivalent one if it cannot be pickled for the other ranks, and its origin."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    origin = Origin(rank(), socket.gethostname(), text)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), origin
    return error, origin


def _raise(failure: tuple[Exception, Origin] | None) -> None:
    if failure is not None:
        error, origin = failure
        setattr(error, _ORIGIN, origin)
        raise error


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3` or `ranks 0-4, 7 and 9`, naming every rank."""
    runs: list[list[int]] = []
    for number in sorted(ranks):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    *parts, last = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    text = f"{', '.join(parts)} and {last}" if parts else last
    return ("rank " if text.isdigit() else "ranks ") + text


def by_rank(texts: Mapping[int, str]) -> list[str]:
    """`ranks 0-2: this`, `rank 3: that`: each text with its ranks, the lowest rank's first."""
    holders: dict[str, list[int]] = {}
    for number, text in sorted(texts.items()):
        holders.setdefault(text, []).append(number)
    return [f"{ranks_text(ranks)}: {text}" for text, ranks in holders.items()]


def differences(values: Mapping[int, Mapping[str, str]]) -> list[str]:
    """A line for each name whose texts differ between the ranks."""
    names = dict.fromkeys(name for texts in values.values() for name in texts)
    lines = {name: by_rank({number: texts.get(name, "missing") for number, texts in values.items()}) for name in names}
    return [f"{name}: " + "; ".join(parts) for name, parts in lines.items() if len(parts) > 1]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # One per device: each stream reserves its own memory, and torch has only 32 of them.
    return torch.cuda.Stream(device)


class Ballot:
    """A vote between ranks that no step waits for: an asynchronous sum of one element, counted later.

    On an accelerator the sum is started from a stream only for votes and copied to pinned memory, so that counting
    waits for the reduction but not for kernels queued since.
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
            # This makes the side stream wait, not the host.
            work.wait()
            self._votes.copy_(self._on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def count(self) -> int:
        """The number of yes votes."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return int(self._votes[0])


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """The device of tensors that `group` can reduce: the CPU if its backend supports it."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    kind = devices[0]
    return torch.device(kind, getattr(torch, kind).current_device())
