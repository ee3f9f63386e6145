"""One hyperparameter of every param group, derived from base values that no load can overwrite."""

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# By key and id of the group. They outlive who made them: a captured step goes on reading them.
_Own = dict[tuple[str, int], Tensor]
_owned: "weakref.WeakKeyDictionary[Optimizer, _Own]" = weakref.WeakKeyDictionary()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class GroupValues:
    """The base values of one hyperparameter, by the group's place in the optimizer's whole list.

    Engines cut `param_groups` down to one group during a step and write one group's settings over all others
    when they load. So a group is known by its dict, kept from the last whole list, and the base values
    here are the authority; the group's copy of its own serves only an optimizer that was restored before this was made.

    A value that is a tensor may also be `optimizer.defaults`', another group's or the user's. So the first write puts a
    tensor of its own into the group, and later ones fill that.

    Args:
        optimizer: A torch optimizer, unwrapped.
        key: The hyperparameter, e.g. "weight_decay". Groups without it are left alone; their base value is 0.
        initial_key: Where each group keeps its base value, e.g. "initial_weight_decay".
    """

    def __init__(self, optimizer: Optimizer, key: str, initial_key: str) -> None:
        self.optimizer, self.key, self.initial_key = optimizer, key, initial_key
        self.base: list[float] = []
        self._groups: list[dict[str, Any]] = []
        self._own = _owned.setdefault(optimizer, {})
        self.update_groups()

    def update_groups(self) -> None:
        """Take the optimizer's list as its whole list: groups added, dropped, or replaced by a load."""
        groups = list(self.optimizer.param_groups)
        if len(groups) == len(self._groups) and all(map(operator.is_, groups, self._groups)):
            return
        known = {id(group): base for group, base in zip(self._groups, self.base, strict=True)}
        if not any(id(group) in known for group in groups):
            known = {id(group): base for group, base in zip(groups, self.base, strict=False)}
        # In place: others hold this list.
        self.base[:] = [known[id(group)] if id(group) in known else self._base_of(group) for group in groups]
        self._groups = groups
        self._forget_gone()

    def take_in_added_groups(self) -> None:
        """Take the base values of groups that were added, before another scheduler changes them."""
        if len(self.optimizer.param_groups) > len(self._groups):
            self.update_groups()

    def restore(self, base: list[float]) -> None:
        """Take base values from a checkpoint.

        Raises:
            ValueError: Their number is not that of the groups.
        """
        self.update_groups()
        if len(base) != len(self._groups):
            raise ValueError(
                f"the checkpoint's schedule has {len(base)} param groups ({self.initial_key} {list(base)}), the "
                f"optimizer has {len(self._groups)} ({self.base}); build the optimizer with the same groups as then"
            )
        self.base[:] = [float(value) for value in base]

    def write(self, value_of: Callable[[float], float]) -> None:
        """Set every group's value to `value_of(base value)`."""
        for group, base in self._whole():
            if self.key in group:
                self._put(group, value_of(base))
                group[self.initial_key] = base

    def _whole(self) -> list[tuple[dict[str, Any], float]]:
        """Each group of the whole list and its base value, also while an engine has cut the list down."""
        if len(self.optimizer.param_groups) >= len(self._groups):
            self.update_groups()
        return list(zip(self._groups, self.base, strict=True))

    def _put(self, group: dict[str, Any], value: float | Tensor) -> None:
        current = group[self.key]
        if not isinstance(current, Tensor):
            if current != value:
                group[self.key] = value
        # A fill inside a captured graph would bring this step's value back at every replay.
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
        # A value that is not 0 cannot have been switched off: the group's own is then the newest.
        return value if value != 0.0 else float(group.get(self.initial_key, value))
