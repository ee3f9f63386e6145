"""The learning rates of all param groups, when other code sets them, too."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from robust_dist.schedule.group_values import GroupValues

# What shows that a value is still the one that was written: itself, or a device tensor's identity and version.
_Mark = float | tuple[int, int]
# By id of the group: the last rate that any schedule's curve set. They outlive the schedule: the next one asks.
_from_a_curve: "weakref.WeakKeyDictionary[Optimizer, dict[int, _Mark]]" = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class _Written:
    """The last write into a group: whether it was the curve's own rate, and the loaded rate that it replaced."""

    group: dict[str, Any]
    mark: _Mark
    exact: bool
    replaced: float | Tensor | None


def _mark(value: float | Tensor) -> _Mark:
    if not isinstance(value, Tensor):
        return value
    # Reading a tensor on a device would wait for it.
    return float(value) if value.device.type == "cpu" else (id(value), value._version)


class LearningRates(GroupValues):
    """The groups' learning rates: the curve's own where nobody else sets them, else torch's recursion.

    A group is on the curve as long as it carries the last rate written here and that was the curve's. One that somebody
    else has changed since (another scheduler, or a user) goes on from there, scaled from step to step as torch's
    CosineAnnealingLR does, until `write` puts it back. Loads touch groups on the curve alone.

    The base values are the groups' `initial_lr`, written by every torch scheduler, before their `lr`.

    Args:
        optimizer: A torch optimizer, unwrapped.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._written: dict[int, _Written] = {}
        self._left = _from_a_curve.setdefault(optimizer, {})
        super().__init__(optimizer, "lr", "initial_lr")

    def on_curve(self) -> list[bool]:
        """For each group, whether it carries the curve's own rate, written here, or was only just added."""
        return [self._is_on_curve(group) for group in self._groups]

    def write(self, rate_of: Callable[[float], float]) -> None:
        """Put every group on the curve: `rate_of(base rate)`."""
        for group, base in self._whole():
            self._set(group, base, rate_of(base))

    def begin(self, rate_of: Callable[[float], float], next_of: Callable[[float, Any], Any], *, replace: bool) -> None:
        """The first step: groups at their base rate, or where another schedule's curve left them, get on the curve.

        Args:
            rate_of: The curve's rate by base rate.
            next_of: The same from base rate and present rate, for a group that another scheduler has scaled.
            replace: No scheduler has set the present rates: all groups get on the curve.
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
        """Go one step on: groups on the curve to `rate_of(base)`, others to `next_of(base, present)`."""
        for group, base in self._whole():
            if self._is_on_curve(group):
                self._set(group, base, rate_of(base))
            else:
                self._set(group, base, next_of(base, group["lr"]), exact=False)

    def after_load(self, rate_of: Callable[[float], float] | None) -> None:
        """The optimizer was loaded: groups that were on the curve are put back, others keep what the load brought.

        Args:
            rate_of: The curve's rate by base rate; None: no group was on the curve.
        """
        were = self.on_curve()
        self.update_groups()
        for group, base, was in zip(self._groups, self.base, were, strict=False):
            if was and rate_of is not None:
                self._set(group, base, rate_of(base), replaced=_copied(group["lr"]))
            else:
                self._leave(group, base)

    def take_up(self, base: list[float], on_curve: list[bool], rate_of: Callable[[float], float]) -> None:
        """Go on from a checkpoint: groups that were on the curve when it was saved get on it, others keep their rate.

        A load of the optimizer may have come first, and its rate been replaced here; such a group gets it back.

        Raises:
            ValueError: The number of base values is not that of the groups.
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
        """Put groups back that were on the curve, until all their settings were replaced without a load hook."""
        for group, base in self._whole():
            last = self._last(group)
            # By identity: code that sets only the rate leaves this number.
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
