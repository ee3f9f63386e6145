"""A hyperparameter of all param groups, derived from base values that no load overwrites; the learning rates."""

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# By key and id of the group. They outlive their creator, because a captured step still reads them.
_Own = dict[tuple[str, int], Tensor]
_owned: "weakref.WeakKeyDictionary[Optimizer, _Own]" = weakref.WeakKeyDictionary()
# Identifies a written value: the value itself, or a device tensor's identity and version.
_Mark = float | tuple[int, int]
# By id of the group: the last rate set by any schedule's curve. They outlive the schedule, for the next one.
_from_a_curve: "weakref.WeakKeyDictionary[Optimizer, dict[int, _Mark]]" = weakref.WeakKeyDictionary()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class GroupValues:
    """The base values of a hyperparameter, by the group's position in the optimizer's full list.

    Some engines reduce `param_groups` to one group during a step, or overwrite all groups' settings with those of one
    group when they load. So groups are identified by their dicts from the last full list, and the base values are kept
    here; the copies in the groups are only used if the optimizer was restored before this object was created.

    A tensor value may be shared with `optimizer.defaults`, another group or the user. So the first write puts a new
    tensor into the group, and later writes fill it.

    Args:
        optimizer: A torch optimizer, not wrapped.
        key: The hyperparameter, e.g. "weight_decay". Groups without it are not changed; their base value is 0.
        initial_key: The groups' key for the base value, e.g. "initial_weight_decay".
    """

    def __init__(self, optimizer: Optimizer, key: str, initial_key: str) -> None:
        self.optimizer, self.key, self.initial_key = optimizer, key, initial_key
        self.base: list[float] = []
        self._groups: list[dict[str, Any]] = []
        self._own = _owned.setdefault(optimizer, {})
        self.update_groups()

    def update_groups(self) -> None:
        """Read the optimizer's full list, after groups were added, removed or replaced by a load."""
        groups = list(self.optimizer.param_groups)
        if len(groups) == len(self._groups) and all(map(operator.is_, groups, self._groups)):
            return
        known = {id(group): base for group, base in zip(self._groups, self.base, strict=True)}
        if not any(id(group) in known for group in groups):
            known = {id(group): base for group, base in zip(groups, self.base, strict=False)}
        # In place: the list is shared.
        self.base[:] = [known[id(group)] if id(group) in known else self._base_of(group) for group in groups]
        self._groups = groups
        self._forget_gone()

    def take_in_added_groups(self) -> None:
        """Read the base values of added groups, before another scheduler changes them."""
        if len(self.optimizer.param_groups) > len(self._groups):
            self.update_groups()

    def restore(self, base: list[float]) -> None:
        """Load base values from a checkpoint; raises ValueError if their number is not that of the groups."""
        self.update_groups()
        if len(base) != len(self._groups):
            raise ValueError(
                f"the checkpoint's schedule has {len(base)} param groups ({self.initial_key} {list(base)}), the "
                f"optimizer has {len(self._groups)} ({self.base}); build the optimizer with the checkpoint's groups"
            )
        self.base[:] = [float(value) for value in base]

    def write(self, value_of: Callable[[float], float]) -> None:
        """Set every group's value to `value_of(base value)`."""
        for group, base in self._whole():
            if self.key in group:
                self._put(group, value_of(base))
                group[self.initial_key] = base

    def _whole(self) -> list[tuple[dict[str, Any], float]]:
        """Each group of the full list and its base value, also while an engine has reduced the list."""
        if len(self.optimizer.param_groups) >= len(self._groups):
            self.update_groups()
        return list(zip(self._groups, self.base, strict=True))

    def _put(self, group: dict[str, Any], value: float | Tensor) -> None:
        current = group[self.key]
        if not isinstance(current, Tensor):
            if current != value:
                group[self.key] = value
        # A captured fill would write this step's value again at every replay.
        elif not _capturing():
            name = (self.key, id(group))
            if self._own.get(name) is not current:
                current = self._own[name] = group[self.key] = current.detach().clone()
            current.copy_(value) if isinstance(value, Tensor) else current.fill_(value)

    def _forget_gone(self) -> None:
        alive = {id(group) for group in self._groups}
        for name in [name for name in self._own if name[1] not in alive]:
            del self._own[name]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = _owned.setdefault(self.optimizer, {})

    def _base_of(self, group: dict[str, Any]) -> float:
        value = float(group.get(self.key, 0.0))
        # A value other than 0 has not been switched off, so it is newer than the saved base value.
        return value if value != 0.0 else float(group.get(self.initial_key, value))


@dataclass(slots=True)
class _Written:
    """The last write into a group: whether it was the curve's rate, and the loaded rate that it replaced."""

    group: dict[str, Any]
    mark: _Mark
    exact: bool
    replaced: float | Tensor | None


def _mark(value: float | Tensor) -> _Mark:
    if not isinstance(value, Tensor):
        return value
    # Reading a tensor on a device would synchronise.
    return float(value) if value.device.type == "cpu" else (id(value), value._version)


class LearningRates(GroupValues):
    """The groups' learning rates: the curve's, or torch's recursion if they are also set elsewhere.

    A group is on the curve as long as it has the last rate written here, and that was the curve's. A rate that was
    changed elsewhere (by another scheduler or a user) is scaled from step to step, like torch's CosineAnnealingLR,
    until `write` restores it. Loads only change groups on the curve.

    The base values are the groups' `initial_lr`, which every torch scheduler writes, or else their `lr`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._written: dict[int, _Written] = {}
        self._left = _from_a_curve.setdefault(optimizer, {})
        super().__init__(optimizer, "lr", "initial_lr")

    def on_curve(self) -> list[bool]:
        """For each group, whether it has the curve's rate, written here, or was just added."""
        return [self._is_on_curve(group) for group in self._groups]

    def write(self, rate_of: Callable[[float], float]) -> None:
        """Put every group on the curve, at `rate_of(base rate)`."""
        for group, base in self._whole():
            self._set(group, base, rate_of(base))

    def begin(self, rate_of: Callable[[float], float], next_of: Callable[[float, Any], Any], *, replace: bool) -> None:
        """Take the first step: put groups on the curve that have their base rate or another schedule's last rate.

        Args:
            rate_of: The curve's rate from the base rate.
            next_of: The rate from base rate and current rate, for a group that another scheduler has scaled.
            replace: Whether to put all groups on the curve, because no scheduler has set the current rates.
        """
        for group, base in self._whole():
            present = group["lr"]
            if float(present) == base or self._left.get(id(group)) == _mark(present):
                self._set(group, base, rate_of(base))
            elif replace:
                self._set(group, base, rate_of(base), replaced=_copied(present))
            else:
                self._set(group, base, next_of(base, present), exact=False)

    def advance(self, rate_of: Callable[[float], float], next_of: Callable[[float, Any], Any]) -> None:
        """Advance one step: groups on the curve to `rate_of(base)`, others to `next_of(base, current)`."""
        for group, base in self._whole():
            if self._is_on_curve(group):
                self._set(group, base, rate_of(base))
            else:
                self._set(group, base, next_of(base, group["lr"]), exact=False)

    def after_load(self, rate_of: Callable[[float], float] | None) -> None:
        """After a load of the optimizer, put groups back that were on the curve; others keep the loaded rate.

        `rate_of` is the curve's rate from the base rate; None if no group was on the curve.
        """
        were = self.on_curve()
        self.update_groups()
        for group, base, was in zip(self._groups, self.base, were, strict=False):
            if was and rate_of is not None:
                self._set(group, base, rate_of(base), replaced=_copied(group["lr"]))
            else:
                self._leave(group, base)

    def take_up(self, base: list[float], on_curve: list[bool], rate_of: Callable[[float], float]) -> None:
        """Continue from a checkpoint: put groups on the curve that were on it when saved; others keep their rate.

        If the optimizer was loaded first and its rate was replaced here, such a group gets that rate back. Raises
        ValueError if the number of base values is not that of the groups.
        """
        self.restore(base)
        for group, own, was in zip(self._groups, self.base, on_curve, strict=True):
            last = self._last(group)
            if was:
                self._set(group, own, rate_of(own))
            elif last is not None and last.replaced is not None and last.mark == _mark(group["lr"]):
                self._set(group, own, last.replaced, exact=False)
            else:
                self._leave(group, own)

    def restore_on_curve(self, rate_of: Callable[[float], float]) -> None:
        """Put groups back on the curve whose settings were all replaced without a load hook."""
        for group, base in self._whole():
            last = self._last(group)
            # By identity: code that sets only the rate does not replace this number.
            if last is not None and last.exact and group.get(self.initial_key) is not base:
                self._set(group, base, rate_of(base))

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key != "_left"}
        return {**state, "_written": self.on_curve()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        were, self._written, self._left = state["_written"], {}, _from_a_curve.setdefault(self.optimizer, {})
        for group, base, exact in zip(self._groups, self.base, were, strict=True):
            self._note(group, base, exact, None)

    def _is_on_curve(self, group: dict[str, Any]) -> bool:
        last = self._last(group)
        return last is None or (last.exact and last.mark == _mark(group["lr"]))

    def _last(self, group: dict[str, Any]) -> _Written | None:
        return self._written.get(id(group))

    def _set(
        self,
        group: dict[str, Any],
        base: float,
        rate: float | Tensor,
        *,
        exact: bool = True,
        replaced: float | Tensor | None = None,
    ) -> None:
        self._put(group, rate)
        self._note(group, base, exact, replaced)

    def _leave(self, group: dict[str, Any], base: float) -> None:
        self._note(group, base, False, None)

    def _note(self, group: dict[str, Any], base: float, exact: bool, replaced: float | Tensor | None) -> None:
        group[self.initial_key] = base
        mark = _mark(group["lr"])
        self._written[id(group)] = _Written(group, mark, exact, replaced)
        if exact:
            self._left[id(group)] = mark
        else:
            self._left.pop(id(group), None)

    def _forget_gone(self) -> None:
        super()._forget_gone()
        alive = {id(group) for group in self._groups}
        self._written = {name: last for name, last in self._written.items() if name in alive}
        for gone in self._left.keys() - alive:
            del self._left[gone]

    def _base_of(self, group: dict[str, Any]) -> float:
        return float(group.get(self.initial_key, group[self.key]))


def _copied(rate: float | Tensor) -> float | Tensor:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
