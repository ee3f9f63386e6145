"""A record of a step's tensors and settings, so that the next step with the same ones need not collect them again.

A record is valid for the param groups, settings, parameters and states from which it was made. Each step checks, in
loops that run in C, that they are the same objects and that parameters and state have the same addresses: a swapped
`.data`, FSDP2's swap, loaded state, an added group, a gradient that is None again, or another dtype or layout lead to
a full step. A record keeps no gradients alive, and a tensor that the optimizer has dropped only until the next step.
"""

from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim.addresses import Contents, addresses, same
from robust_dist.optim.backends import Backend, Groups, Prepared
from robust_dist.optim.counting import count_of, value_of, views
from robust_dist.optim.settings import DEFAULTS, OPTIONS, Hyper
from robust_dist.optim.state import STEP, all_plain, is_dtensor, local_columns

ROWS = 1 << 15  # parameters in all records together
TRIES = 4  # records of the same parameters that were never valid again, before no more are made

_grad, _local, _layout = map(attrgetter, ("grad", "_local_tensor", "_spec"))
_params = itemgetter("params")
_fixed = itemgetter(*(name for name in DEFAULTS if name not in ("lr", "weight_decay")))
_flat = chain.from_iterable


def _settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_fixed(group), *map(group.get, OPTIONS))


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A test whether as many tensors have these classes, dtypes, devices, shapes and strides, and none is lazy."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if check(*tensors):
            return check
    except (ImportError, TypeError, AttributeError):  # not a public interface: another release may lack it
        pass
    kept = list(map(_kind, tensors))
    return lambda *found: list(map(_kind, found)) == kept


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        raise TypeError
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg(), tensor.is_conj()


class _HostCount:
    """The step counts of a record's parameters on the host, in one array of which the state's tensors are views.

    A count that somebody writes into a tensor of the state thus appears in the array.
    """

    def __init__(self, states: Sequence[dict[str, Any]], sizes: Sequence[int]) -> None:
        values = [state[STEP].item() for state in states]
        self.words = array("f", values)
        for state, view in zip(states, views(self.words), strict=True):
            state[STEP] = view
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        self.spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.expected = self.words.tobytes()

    def next(self) -> list[float] | None:
        """The next count of each group; None if the counts were changed elsewhere."""
        if self.words.tobytes() != self.expected:
            return None
        return [count_of(self.words[first]) + 1.0 if first < end else 0.0 for first, end in self.spans]

    def advance(self, counts: Sequence[float]) -> None:
        """Write the counts of a step that was taken."""
        for (first, end), count in zip(self.spans, counts, strict=True):
            self.words[first:end] = array("f", [value_of(count)]) * (end - first)
        self.expected = self.words.tobytes()


class Record:
    """The tensors of a step, and how to step them again.

    Args:
        optimizer: The optimizer with their `state` and `param_groups`; not kept.
        params: The parameters with a gradient, one group after the other.
        sizes: The number of them in each group.
        prepared: Steps them.
        counts_on_host: Whether their step counts are on the host.
    """

    def __init__(
        self, optimizer: Any, params: Sequence[Tensor], sizes: Sequence[int], prepared: Prepared, counts_on_host: bool
    ) -> None:
        self.groups: list[dict[str, Any]] = list(optimizer.param_groups)
        self.settings = list(map(_settings, self.groups))
        self.held = list(_flat(map(_params, self.groups)))
        self.params = list(params)
        chosen = set(map(id, params))
        self.absent = [param for param in self.held if id(param) not in chosen]
        self.states = [optimizer.state[param] for param in params]
        self.prepared = prepared
        self.count = _HostCount(self.states, sizes) if counts_on_host else None
        self.sharded = not all_plain(params)
        self.columns = tuple(self.states[0])
        self.layouts = list(map(_layout, params)) if self.sharded else []
        self.entries, self.contents = Contents([optimizer.state]), Contents(self.states)
        self.tensors = [*params, *self.contents.values]
        self.addresses = self._addresses()
        self.guard = _guard(self._local_grads(list(map(_grad, params))))
        self.held_once = False

    def _local_grads(self, grads: list[Any]) -> list[Tensor]:
        if not self.sharded:
            return grads
        if not same(map(_layout, grads), self.layouts):
            raise TypeError
        return list(map(_local, grads))

    def _addresses(self) -> "array[int]":
        """The addresses of the parameters and all their state."""
        if not self.sharded:
            return addresses(self.tensors)
        width, values = len(self.columns), self.contents.values
        named = zip(self.columns, (values[first::width] for first in range(width)), strict=True)
        local = (column if name == STEP else map(_local, column) for name, column in named)
        return addresses([*map(_local, self.params), *_flat(local)])

    def grads(self, optimizer: Any) -> list[Tensor] | None:
        """The local gradients if the record is valid; else None."""
        groups, state = optimizer.param_groups, optimizer.state
        if len(groups) != len(self.groups) or not same(groups, self.groups):
            return None
        held = list(_flat(map(_params, groups)))
        if len(held) != len(self.held) or not same(held, self.held) or list(map(_settings, groups)) != self.settings:
            return None
        if not (self.entries.are_in([state]) and self.contents.are_in(self.states)):
            return None
        try:
            if self._addresses() != self.addresses:
                return None
            grads = self._local_grads(list(map(_grad, self.params)))
            if not self.guard(*grads) or any(grad is not None for grad in map(_grad, self.absent)):
                return None
        except (TypeError, AttributeError, RuntimeError):  # not a tensor, no memory, or another layout
            return None
        return grads

    def step(
        self, grads: list[Tensor], hypers: list[Hyper], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """Step again; False, without any change, if that is not possible."""
        if self.count is None:
            return self.prepared.run(grads, hypers, grad_scale, found_inf, [])
        counts = self.count.next()
        if counts is None:
            return False
        if found_inf is None or float(found_inf) == 0.0:
            self.prepared.run(grads, hypers, grad_scale, None, counts)
            self.count.advance(counts)
        return True


@dataclass(frozen=True)
class Found:
    """A record that is valid for the coming step, with its gradients.

    Attributes:
        record: The record.
        grads: The local gradients.
    """

    record: Record
    grads: list[Tensor]

    @property
    def params(self) -> list[Tensor]:
        """The parameters with a gradient."""
        return self.record.params

    def sum_abs(self) -> float | Tensor | None:
        """The sum of the absolute values of the local gradients; None if there is no fast way."""
        return self.record.prepared.sum_abs(self.grads)


class Records:
    """The records of an optimizer: ZeRO-3 steps one part after the other, and the set of gradients may change."""

    def __init__(self) -> None:
        self._last: Record | None = None
        self._kept: dict[Hashable, Record] = {}
        self._tries: dict[Hashable, int] = {}

    def find(self, optimizer: Any) -> Found | None:
        """A valid record, or None."""
        if not self._kept:
            return None
        record, grads = self._last, None if self._last is None else self._last.grads(optimizer)
        if grads is None:
            record = self._kept.get(_key(optimizer))
            grads = None if record is None or record is self._last else record.grads(optimizer)
        return None if record is None or grads is None else Found(record, grads)

    def step(self, found: Found, hypers: list[Hyper], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Step with a record; False, without any change, if that is not possible."""
        record = found.record
        if not record.step(found.grads, hypers, grad_scale, found_inf):
            return False
        self._last, record.held_once = record, True
        return True

    def add(self, optimizer: Any, backend: Backend, memory: dict[Any, Any], groups: Groups) -> None:
        """Keep a record of a step that `backend` has just taken, if its tensors allow it and it is worthwhile.

        Args:
            optimizer: The optimizer that stepped.
            backend: The backend of all its groups.
            memory: What that backend keeps between steps.
            groups: The tensors and settings of each param group.
        """
        key = _key(optimizer)
        before = self._kept.pop(key, None)
        self._tries[key] = 1 if before is not None and before.held_once else self._tries.get(key, 0) + 1
        self._last = None
        made = _record(optimizer, backend, memory, groups) if self._tries[key] <= TRIES else None
        if made is None:
            return
        # Do not keep alive what the optimizer has dropped.
        self._kept = {k: kept for k, kept in self._kept.items() if kept.params[0] in optimizer.state}
        while self._kept and sum(len(kept.params) for kept in self._kept.values()) + len(made.params) > ROWS:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = self._last = made


def _record(optimizer: Any, backend: Backend, memory: dict[Any, Any], groups: Groups) -> Record | None:
    params = [param for lists, _ in groups for param in lists.params]
    if backend.prepare is None or not _can_record(params, [optimizer.state[param] for param in params]):
        return None
    # Preparing would redistribute them once more, and no record is valid for gradients of another layout.
    if not all_plain(params) and local_columns(params, list(map(_grad, params))) is None:
        return None
    prepared = backend.prepare(memory, groups)
    if prepared is None:
        return None
    sizes = [len(lists.params) for lists, _ in groups]
    try:
        return Record(optimizer, params, sizes, prepared, counts_on_host=backend.step_on_device is None)
    except (TypeError, AttributeError, RuntimeError):  # gradients of a kind that a record cannot distinguish
        return None


def _key(optimizer: Any) -> Hashable:
    held = list(_flat(map(_params, optimizer.param_groups)))
    return tuple(map(id, held)), tuple([grad is None for grad in map(_grad, held)])


def _can_record(params: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a record can detect changes of these: all plain or all DTensors, with the same state keys."""
    if not params or not (all_plain(params) or all(map(is_dtensor, params))):
        return False
    names = list(states[0])
    return all(list(state) == names for state in states) and all(
        type(value) is Tensor or is_dtensor(value) for state in states for value in state.values()
    )
