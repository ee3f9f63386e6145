"""Weight decay off for the last part of training, at the same step on every rank."""

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor

from robust_dist.optim.dry_step import is_dry
from robust_dist.schedule.comparison import TRIGGERS, Report
from robust_dist.schedule.group_values import GroupValues
from robust_dist.schedule.hooks import base_optimizer, in_charge, take_charge
from robust_dist.schedule.peers import Peers
from robust_dist.validate import one_of, real_number, whole_number

_REDUCE = dict(zip(("any", "all", "majority"), TRIGGERS[1:], strict=True))
_SUPERSEDED = (
    "another WeightDecaySwitch or RobustSchedule was made on this optimizer since, and sets its weight decay; use one "
    "of them: RobustSchedule(..., weight_decay_off_at=None) leaves the decay to a WeightDecaySwitch"
)
# Optimizer steps before and after one that matters at which the ranks are compared closely.
_NEAR = (4, 2)
_STATE_KEYS = ("step", "switch_step", "base_weight_decay", "verdict", "total_steps", "off_at")


def first_step_off(off_at: float, total_steps: int) -> int:
    """The first step s, from 0, with s >= off_at * total_steps; `off_at` counts as the decimal it is written as."""
    return math.ceil(Fraction(repr(float(off_at))) * total_steps)


class WeightDecaySwitch:
    """Sets every group's weight decay to 0 once a share of the steps is done (the paper: 75 %).

    Call `step()` once per training step, after `optimizer.step()`. Afterwards the groups carry what the next
    optimizer step uses: with total_steps=100 and off_at=0.75, steps 0 to 74 use the decay and steps 75 on use 0.
    Each group's base decay is taken when this is made (a group added later: when it is first seen) and belongs to this
    object from then on; values written into the groups by a load, or by hand, are replaced before the next step. One
    optimizer has one switch: the one made last.

    Ranks compare their settings, step and groups: at the start, closely around the switch and the end, and about once a
    second in between. That runs no collective, and no rank waits for another: they post what they have in the process
    group's key-value store, and look later. Where two ranks differ, each rank that still runs raises
    RankDisagreementError from a step soon after, of the optimizer or of this; only then ranks wait for each other, some
    seconds at most. A rank that has ended, or has no switch on such an optimizer, is not waited for. Optimizers are
    compared that have the same class and the same shapes of their first two parameters, and that begin after the same
    number of the group's collectives. What cannot be seen is a rank that leaves out `optimizer.step()` and this
    `step()` alike: that is also what a rank does that has run out of batches under torch's Join. Without such a store
    (MPI), or once the rank that hosts it has ended, nothing is compared.

    With `should_switch` the decision is the ranks' own, `off_at` plays no part, and each call of `step()` is a vote
    through the same store: the decay is off from optimizer step k + 1 on, where the k-th call of `step()` (from 1) was
    the first whose votes sufficed. Where a rank is further than that as this is decided, it is off from the step after
    the one that the foremost rank has reached, on every rank. One rank alone has the same delay. Once off, the decay
    stays off, and nothing is asked any more. "all" and "majority" count every rank of the process group.

    Args:
        optimizer: Any torch optimizer, or an engine's wrapper of one.
        total_steps: Optimizer steps of the whole run.
        off_at: Share of the steps after which the decay is off, in [0, 1]; 1 keeps it for the whole run.
        should_switch: This rank's wish, asked once per `step()`; ranks may differ.
        reduce: Whose wish decides: "any" rank's, "all" ranks', or the "majority"'s.
        process_group: The ranks that must agree; None is the default group.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A setting outside its range.
    """

    def __init__(
        self,
        optimizer: Any,
        total_steps: int,
        *,
        off_at: float = 0.75,
        should_switch: Callable[[], bool] | None = None,
        reduce: str = "any",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.total_steps = whole_number("total_steps", total_steps, 1)
        self.off_at = real_number("off_at", off_at, 0.0, 1.0)
        self.reduce = one_of("reduce", reduce, tuple(_REDUCE))
        if should_switch is not None and not callable(should_switch):
            raise TypeError(f"should_switch={should_switch!r} must be a function without arguments, or None")
        self.should_switch, self.process_group = should_switch, process_group
        self.optimizer = base_optimizer(optimizer)
        self._decays = GroupValues(self.optimizer, "weight_decay", "initial_weight_decay")
        self._step = 0
        self._switch_step = None if should_switch else first_step_off(self.off_at, self.total_steps)
        self._warned = False
        Peers.of(self.optimizer).vote.forget()
        take_charge(self.optimizer, self)
        self._write()

    @property
    def is_off(self) -> bool:
        """Whether the next optimizer step uses no decay."""
        return self._switch_step is not None and self._step >= self._switch_step

    @property
    def switch_step(self) -> int | None:
        """The first optimizer step (from 0) without decay; None while ranks' own triggers have not decided it."""
        return self._switch_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps done: calls of `step()`, across resumes."""
        return self._step

    def step(self) -> None:
        """Note that an optimizer step was made; set the decay of the next one.

        Raises:
            RankDisagreementError: On every rank that still runs, if the ranks' settings, steps or groups differed at an
                earlier step; where `optimizer.step()` runs hooks, it is that call which raises.
            RuntimeError: Another switch was made on this optimizer since.
        """
        if in_charge(self.optimizer) is not self:
            raise RuntimeError(_SUPERSEDED)
        self._decays.update_groups()
        self._peers.after_step(self.process_group, self._report, self._is_near())
        self._step += 1
        if self.should_switch is not None and self._switch_step is None:
            wish = bool(self.should_switch())
            self._decide(self._peers.cast(self.process_group, wish, self.reduce))
            self._warn_without_store()
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The step, the base decays, and what the ranks have decided up to now.

        Before an own trigger has decided it waits, five seconds at most, for the votes of ranks that are at this step.
        """
        self._decays.update_groups()
        self._take_in_decision(wait=True)
        return {
            "step": self._step,
            "switch_step": self._switch_step if self.is_off or self.should_switch is not None else None,
            "base_weight_decay": list(self._decays.base),
            "verdict": None,
            "total_steps": self.total_steps,
            "off_at": self.off_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved step, and set the decay that it has.

        The settings stay this object's own; a warning names those that were others when the state was saved.

        Raises:
            ValueError: It is no state of a switch, or one of an optimizer with another number of groups.
        """
        missing = [key for key in _STATE_KEYS if key not in state_dict]
        if missing:
            raise ValueError(f"this is no state of a WeightDecaySwitch: it has no {', '.join(missing)}")
        self._decays.restore(state_dict["base_weight_decay"])
        self._warn_of_other_settings(state_dict)
        self._step = whole_number("step", state_dict["step"], 0)
        if self.should_switch is not None:
            self._switch_step = state_dict["switch_step"]
            if self._switch_step is None and state_dict["verdict"]:
                # Written by a version that kept a decision apart until the step that applied it.
                self._switch_step = self._step + 1
        self._peers.vote.forget()
        self._write()

    def __getstate__(self) -> dict[str, Any]:
        self._take_in_decision()
        # A process group cannot be copied: a copy uses the default group.
        return self.__dict__ | {"process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        take_charge(self.optimizer, self)

    def _go_to(self, step: int) -> None:
        self._step = step
        self._write()

    def _write(self) -> None:
        off = self.is_off
        self._decays.write(lambda base: 0.0 if off else base)

    def _before_step(self) -> None:
        if in_charge(self.optimizer) is not self:
            return
        # This also notices groups that were added since.
        self._write()
        # A rank may make a dry step alone, to save.
        if self._rates_are_on_device() or not is_dry(self.optimizer):
            self._peers.before_step(self.process_group, self._report, self._is_near())

    def _after_load(self) -> None:
        if in_charge(self.optimizer) is not self:
            return
        self._decays.update_groups()
        self._write()

    def _rates_are_on_device(self) -> bool:
        """Whether reading a rate would wait for a device, and fail in a graph's capture."""
        rates = (group.get("lr") for group in self.optimizer.param_groups)
        return any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)

    @property
    def _peers(self) -> Peers:
        return Peers.of(self.optimizer)

    def _report(self) -> Report:
        trigger = TRIGGERS[0] if self.should_switch is None else _REDUCE[self.reduce]
        return Report(self.total_steps, self.off_at, self._step, trigger, self.is_off, tuple(self._decays.base))

    def _is_near(self) -> bool:
        """Whether the switch or the end of the run is near."""
        before, after = _NEAR
        marks = (self._switch_step, self.total_steps)
        return any(mark is not None and mark - before <= self._step <= mark + after for mark in marks)

    def _take_in_decision(self, *, wait: bool = False) -> None:
        if self.should_switch is not None and self._switch_step is None:
            self._decide(self._peers.decided(self.process_group, wait=wait))
            self._write()

    def _decide(self, call: int | None) -> None:
        """Switch at the step whose decay this call of `step()` sets."""
        if call is not None:
            self._switch_step = self._step + call - self._peers.vote.calls

    def _warn_without_store(self) -> None:
        if not self._warned and self._peers.has_no_store(self.process_group):
            self._warned = True
            warnings.warn(
                "should_switch is not counted any more and the weight decay stays on: the process group has no "
                "key-value store that its ranks can vote through, or the rank that hosted it has ended",
                UserWarning,
                stacklevel=3,
            )

    def _warn_of_other_settings(self, saved: dict[str, Any]) -> None:
        for name in ("total_steps", "off_at"):
            if saved[name] != getattr(self, name):
                warnings.warn(
                    f"the checkpoint was written with {name}={saved[name]}, this run has {name}={getattr(self, name)}; "
                    "this run's is used",
                    UserWarning,
                    stacklevel=3,
                )
