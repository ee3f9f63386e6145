"""One hyperparameter of every param group, derived from base values that no load can overwrite."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class GroupValues:
    """The base values of one hyperparameter, by the group's place in the optimizer's whole list.

    Engines cut `param_groups` down to one group during a step and write one group's settings over all others
    when they load (DeepSpeed). So a group is known by its dict, kept from the last whole list, and the base values
    here are the authority; the group's copy of its own serves only an optimizer that was restored before this was made.

    Args:
        optimizer: A torch optimizer, unwrapped.
        key: The hyperparameter, e.g. "weight_decay". Groups without it are left alone; their base value is 0.
        initial_key: Where each group keeps its base value, e.g. "initial_weight_decay".
    """

    def __init__(self, optimizer: Optimizer, key: str, initial_key: str) -> None:
        self.optimizer, self.key, self.initial_key = optimizer, key, initial_key
        self.base: list[float] = []
        self._groups: list[dict[str, Any]] = []
        self.follow()

    def follow(self) -> None:
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

    def restore(self, base: list[float]) -> None:
        """Take base values from a checkpoint.

        Raises:
            ValueError: Their number is not that of the groups.
        """
        self.follow()
        if len(base) != len(self._groups):
            raise ValueError(
                f"the checkpoint's schedule has {len(base)} param groups ({self.initial_key} {list(base)}), the "
                f"optimizer has {len(self._groups)} ({self.base}); build the optimizer with the same groups as then"
            )
        self.base[:] = [float(value) for value in base]

    def write(self, value_of: Callable[[float], float]) -> None:
        """Set every group's value to `value_of(base value)`; tensors are filled in place."""
        if len(self.optimizer.param_groups) >= len(self._groups):
            self.follow()
        for group, base in zip(self._groups, self.base, strict=True):
            if self.key in group:
                _assign(group, self.key, value_of(base))
                group[self.initial_key] = base

    def _base_of(self, group: dict[str, Any]) -> float:
        value = float(group.get(self.key, 0.0))
        # A value that is not zero cannot have been switched off: the group's own is then the newest.
        return value if value != 0.0 else float(group.get(self.initial_key, value))


class LearningRates(GroupValues):
    """The base learning rates; a group's `initial_lr`, written by every torch scheduler, comes before its `lr`."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "lr", "initial_lr")

    def _base_of(self, group: dict[str, Any]) -> float:
        return float(group.get(self.initial_key, group[self.key]))


def _assign(group: dict[str, Any], key: str, value: float) -> None:
    current = group[key]
    if not isinstance(current, Tensor):
        if current != value:
            group[key] = value
    # A fill inside a captured graph would bring this step's value back at every replay.
    elif not _capturing():
        current.fill_(value)
