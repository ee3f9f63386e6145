"""Turns weight decay off for the last part of training, at the same step on every rank."""

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
    "another WeightDecaySwitch or RobustSchedule was created for this optimizer later and sets its weight decay; use "
    "only one: RobustSchedule(..., weight_decay_off_at=None) leaves the decay to a WeightDecaySwitch"
)
# Optimizer steps before and after the switch and the end at which the ranks are compared every time.
_NEAR = (4, 2)
_STATE_KEYS = ("step", "switch_step", "base_weight_decay", "verdict", "total_steps", "off_at")


def first_step_off(off_at: float, total_steps: int) -> int:
    """The first step s, from 0, with s >= off_at * total_steps; `off_at` means its exact decimal value."""
    return math.ceil(Fraction(repr(float(off_at))) * total_steps)


class WeightDecaySwitch:
    """Sets every group's weight decay to 0 after a fraction of the steps (the paper: 75 %).

    Call `step()` once per training step, after `optimizer.step()`. The groups then hold the decay of the next
    optimizer step: with total_steps=100 and off_at=0.75, steps 0 to 74 use the base decay and steps 75 on use 0.
    The base decays are read when the switch is created (for a group added later: when it is first seen) and belong to
    the switch from then on; values written into the groups by a load, or by hand, are replaced before the next step. An
    optimizer has one switch: the last one created.

    Ranks compare their settings, step and groups at the start, at every step around the switch and the end, and about
    once a second in between. This needs no collective, and no rank waits for another: ranks post their values in the
    process group's key-value store and look later. If two ranks differ, each rank that still runs raises
    RankDisagreementError from a step soon after, of the optimizer or of the switch; only then do ranks wait for each
    other, for a few seconds. Ranks that have ended, or have no switch for such an optimizer, are not waited for. Only
    optimizers of the same class, with equal shapes of the first two parameters, that start after the same number of the
    group's collectives are compared. A rank that skips both `optimizer.step()` and this `step()` is not detected,
    because a rank that has run out of batches under torch's Join does the same. Without such a store (MPI), or after
    the rank that hosts it has ended, nothing is compared.

    With `should_switch` the ranks decide, `off_at` is ignored, and each call of `step()` casts a vote through the same
    store: decay is off from optimizer step k + 1 on, where the k-th call of `step()` (from 1) was the first with enough
    votes. If a rank is already beyond that, decay is off, on every rank, from the step after the one reached by the
    foremost rank. A single rank has the same delay. Once off, decay stays off, and there are no more votes. "all" and
    "majority" count every rank of the process group.

    Args:
        optimizer: Any torch optimizer, or an engine's wrapper of one.
        total_steps: Optimizer steps of the whole run.
        off_at: Fraction of the steps after which decay is off, in [0, 1]; 1 keeps it for the whole run.
        should_switch: This rank's vote, called once per `step()`; ranks may differ.
        reduce: Whose votes are needed: "any" rank's, "all" ranks' or the "majority"'s.
        process_group: The ranks that must agree; None is the default group.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A setting is out of range.
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
        """The first optimizer step (from 0) without decay; None while the ranks' votes have not decided it."""
        return self._switch_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken: calls of `step()`, across resumes."""
        return self._step

    def step(self) -> None:
        """Count an optimizer step, and set the decay of the next one.

        Raises:
            RankDisagreementError: On every rank that still runs, if the ranks' settings, steps or groups differed at an
                earlier step; if `optimizer.step()` runs hooks, that call raises it instead.
            RuntimeError: Another switch was created for this optimizer later.
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
        """The step, the base decays, and the ranks' decision so far.

        With `should_switch`, before a decision, it waits up to five seconds for the votes of ranks at this step.
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
        """Load a saved step, and set its decay.

        The settings of this object are kept; a warning names those that differ from the saved ones.

        Raises:
            ValueError: This is not a state of a switch, or it has another number of groups.
        """
        missing = [key for key in _STATE_KEYS if key not in state_dict]
        if missing:
            raise ValueError(f"this is not a state of a WeightDecaySwitch: it has no {', '.join(missing)}")
        self._decays.restore(state_dict["base_weight_decay"])
        self._warn_of_other_settings(state_dict)
        self._step = whole_number("step", state_dict["step"], 0)
        if self.should_switch is not None:
            self._switch_step = state_dict["switch_step"]
            if self._switch_step is None and state_dict["verdict"]:
                # From a version that stored a decision separately until it was applied.
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
        # This also covers groups that were added since.
        self._write()
        # A single rank may take a dry step, to save.
        if self._rates_are_on_device() or not is_dry(self.optimizer):
            self._peers.before_step(self.process_group, self._report, self._is_near())

    def _after_load(self) -> None:
        if in_charge(self.optimizer) is not self:
            return
        self._decays.update_groups()
        self._write()

    def _rates_are_on_device(self) -> bool:
        """Whether reading a rate would synchronise, which fails during graph capture."""
        rates = (group.get("lr") for group in self.optimizer.param_groups)
        return any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)

    @property
    def _peers(self) -> Peers:
        return Peers.of(self.optimizer)

    def _report(self) -> Report:
        trigger = TRIGGERS[0] if self.should_switch is None else _REDUCE[self.reduce]
        return Report(self.total_steps, self.off_at, self._step, trigger, self.is_off, tuple(self._decays.base))

    def _is_near(self) -> bool:
        """Whether the switch or the end of the run is within a few steps."""
        before, after = _NEAR
        marks = (self._switch_step, self.total_steps)
        return any(mark is not None and mark - before <= self._step <= mark + after for mark in marks)

    def _take_in_decision(self, *, wait: bool = False) -> None:
        if self.should_switch is not None and self._switch_step is None:
            self._decide(self._peers.decided(self.process_group, wait=wait))
            self._write()

    def _decide(self, call: int | None) -> None:
        """Switch at the step whose decay that call of `step()` sets."""
        if call is not None:
            self._switch_step = self._step + call - self._peers.vote.calls

    def _warn_without_store(self) -> None:
        if not self._warned and self._peers.has_no_store(self.process_group):
            self._warned = True
            warnings.warn(
                "should_switch is ignored from now on and the weight decay stays on: the process group has no "
                "key-value store for its ranks' votes, or the rank that hosted it has ended",
                UserWarning,
                stacklevel=3,
            )

    def _warn_of_other_settings(self, saved: dict[str, Any]) -> None:
        for name in ("total_steps", "off_at"):
            if saved[name] != getattr(self, name):
                warnings.warn(
                    f"the checkpoint was written with {name}={saved[name]}, this run has {name}={getattr(self, name)}; "
                    "this run's value is used",
                    UserWarning,
                    stacklevel=3,
                )
