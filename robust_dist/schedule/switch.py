"""Weight decay off for the last part of training, at the same step on every rank."""

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch.distributed as dist

from robust_dist.schedule.agreement import TRIGGERS, Report, compare, taking_part
from robust_dist.schedule.ballot import Ballot
from robust_dist.schedule.group_values import GroupValues
from robust_dist.schedule.hooks import in_charge, is_dry, take_charge
from robust_dist.schedule.unwrap import base_optimizer
from robust_dist.schedule.validate import one_of, real_number, whole_number

_REDUCE = dict(zip(("any", "all", "majority"), TRIGGERS[1:], strict=True))
_SUPERSEDED = (
    "another WeightDecaySwitch or RobustSchedule was made on this optimizer since, and sets its weight decay; use one "
    "of them: RobustSchedule(..., weight_decay_off_at=None) leaves the decay to a WeightDecaySwitch"
)
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

    The ranks compare their settings, step and groups once before the first update and once at the switch: two
    collectives in a run, none without a process group. Loading a checkpoint starts a new run.

    With `should_switch` the decision is the ranks' own, `off_at` plays no part, and each call of `step()` starts
    one asynchronous one-element reduction whose result the next call applies: the decay is off from optimizer step
    k + 1 on, where the k-th call of `step()` (from 1) was the first whose votes sufficed. One rank alone has the same
    delay. Once off, the decay stays off, and nothing is asked or reduced any more.

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
        self._verdict: bool | None = None
        self._ballot: Ballot | None = None
        self._agreed = False
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
            RankDisagreementError: On every rank, if the ranks' settings, steps or groups differ.
            RuntimeError: Another switch was made on this optimizer since.
        """
        if in_charge(self.optimizer) is not self:
            raise RuntimeError(_SUPERSEDED)
        self._decays.follow()
        self._agree_at_start()
        was_off = self.is_off
        self._step += 1
        if self.should_switch is not None and not was_off:
            self._poll(self.should_switch)
        self._write()
        if self.should_switch is None and self.is_off and not was_off:
            self._compare("at the switch")

    def state_dict(self) -> dict[str, Any]:
        """The step, the base decays, and what the ranks decided; a vote under way is counted first.

        Counting needs no rank but those that voted, so that one rank alone may save.
        """
        self._decays.follow()
        self._count_votes()
        return {
            "step": self._step,
            "switch_step": self._switch_step if self.is_off else None,
            "base_weight_decay": list(self._decays.base),
            "verdict": self._verdict,
            "total_steps": self.total_steps,
            "off_at": self.off_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved step, and set the decay that it has.

        The settings stay this object's own; a warning names those that were others when the state was saved.

        Args:
            state_dict: What `state_dict()` gave.

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
        self._verdict, self._ballot = state_dict["verdict"], None
        self._agreed = False
        self._write()

    def __getstate__(self) -> dict[str, Any]:
        self._count_votes()
        # A process group cannot be copied: a copy asks the default group.
        return self.__dict__ | {"process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        take_charge(self.optimizer, self)

    def _seek(self, step: int) -> None:
        self._step = step
        self._write()

    def _write(self) -> None:
        off = self.is_off
        self._decays.write(lambda base: 0.0 if off else base)

    def _before_step(self) -> None:
        if in_charge(self.optimizer) is not self:
            return
        # It also notices groups that were added since.
        self._write()
        # A rank may make a dry step alone, to save.
        if not self._agreed and not is_dry(self.optimizer):
            self._agree_at_start()

    def _after_load(self) -> None:
        if in_charge(self.optimizer) is not self:
            return
        self._decays.follow()
        self._write()

    def _agree_at_start(self) -> None:
        if not self._agreed:
            self._compare("at the start")
            self._agreed = True

    def _compare(self, when: str) -> None:
        if not taking_part(self.process_group):
            return
        trigger = TRIGGERS[0] if self.should_switch is None else _REDUCE[self.reduce]
        base = tuple(self._decays.base)
        report = Report(self.total_steps, self.off_at, self._step, trigger, len(base), base)
        compare(report, self.process_group, when)

    def _poll(self, should_switch: Callable[[], bool]) -> None:
        self._count_votes()
        verdict, self._verdict = self._verdict, None
        if verdict:
            self._switch_step = self._step
            return
        self._ballot = Ballot(bool(should_switch()), self.process_group)

    def _count_votes(self) -> None:
        if self._ballot is None:
            return
        votes, voters = self._ballot.count(), self._ballot.num_voters
        needed = {"any": 1, "all": voters, "majority": voters // 2 + 1}[self.reduce]
        self._verdict, self._ballot = votes >= needed, None

    def _warn_of_other_settings(self, saved: dict[str, Any]) -> None:
        for name in ("total_steps", "off_at"):
            if saved[name] != getattr(self, name):
                warnings.warn(
                    f"the checkpoint was written with {name}={saved[name]}, this run has {name}={getattr(self, name)}; "
                    "this run's is used",
                    UserWarning,
                    stacklevel=3,
                )
