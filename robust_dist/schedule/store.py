"""The key-value store through which the ranks that schedule one optimizer tell each other things without waiting."""

import weakref
import zlib
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.optim import Optimizer

from robust_dist.schedule.engine_facts import shape_on_every_rank

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NAMESPACE = "robust_dist"
# Seconds that one of our calls may take where a connection of our own can be had.
_TIMEOUT = 30.0

_opened: "tuple[weakref.ref[Any], Store | None] | None" = None
_begun: "Counter[str]" = Counter()


def kind_of(optimizer: Optimizer) -> str:
    """What ranks that share an optimizer have alike in it: its class and the shapes of its first two parameters."""
    shapes = [shape_on_every_rank(p) for group in optimizer.param_groups for p in group["params"]][:2]
    return f"{type(optimizer).__name__} {zlib.crc32(repr(shapes).encode()):x}"


def store_of(kind: str, group: dist.ProcessGroup) -> "Store | None":
    """The part of the training's store for an optimizer that is about to make its first step on this group.

    Ranks share it where they make that step with an optimizer of the same kind after the same number of the group's
    collectives. So a rank that trains something else beside what it shares, or before it, still meets the others.

    Returns:
        None where the training has no store that several ranks reach (MPI, torch's fake process group).
    """
    store = _training_store()
    if store is None:
        return None
    ranks = zlib.crc32(repr(dist.get_process_group_ranks(group)).encode())
    name = f"{ranks:x}/{kind}/{_collectives(group)}"
    _begun[name] += 1
    return part_of(store, f"{name}/{_begun[name]}")


def _collectives(group: dist.ProcessGroup) -> int:
    """How many the group has begun, which tells one training in a process from the next; 0 where it does not count."""
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


def part_of(store: "Store", name: str) -> "Store":
    """A store whose keys are those of `store` under `name`."""
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _training_store() -> "Store | None":
    global _opened
    world = dist.group.WORLD
    if _opened is None or _opened[0]() is not world:
        _begun.clear()
        _opened = weakref.ref(world), _open()
    return _opened[1]


def _open() -> "Store | None":
    try:
        # Private, and the one way to the store that all ranks reach without a collective; it is named here alone.
        store = dist.distributed_c10d._get_default_store()
        # torch's FakeStore claims to have every key. A host that has ended raises here: to clone would wait for it.
        if store.check([f"{_NAMESPACE}/no such key"]):
            return None
        if hasattr(store, "clone"):
            # A connection of our own: the training's calls block theirs for as long as they wait.
            store = store.clone()
            store.set_timeout(timedelta(seconds=_TIMEOUT))
        # torchrun's store outlives a process group; each one made over it has keys of its own.
        count = store.add(f"{_NAMESPACE}/process groups of rank {dist.get_rank()}", 1)
        return part_of(store, f"{_NAMESPACE}/{count}")
    except Exception:
        return None
