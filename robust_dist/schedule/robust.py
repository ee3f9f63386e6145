"""The paper's schedule: warm-up, cosine, and weight decay off for the last quarter."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from robust_dist.optim.dry_step import is_dry
from robust_dist.optim.rate import all_ignore_rate
from robust_dist.optim.settings import option
from robust_dist.schedule.curve import Curve, DecayKind, OwnDecay, checked_curve
from robust_dist.schedule.group_values import LearningRates
from robust_dist.schedule.hooks import attach, base_optimizer, is_repeated_call
from robust_dist.schedule.switch import WeightDecaySwitch
from robust_dist.validate import whole_number

_STATE_KEYS = ("last_epoch", "_step_count", "base_lrs", "weight_decay_switch")


class RobustSchedule(LRScheduler):
    """Linear warm-up, half-cosine decay of the learning rate, and the weight-decay switch, per optimizer step.

    With T = total_steps, W = warmup_steps, r = min_lr_ratio and a group's initial learning rate eta, optimizer step s
    (from 0) has the rate eta (s + 1)/(W + 1) for s < W, then eta (r + (1 - r)(1 + cos(pi (s - W)/(T - W)))/2). With
    W = r = 0 this is the paper's eq. 17, eta (1 + cos(pi s/T))/2, whose t and T are in epochs. From T on it is r eta.
    Weight decay is off for every s >= weight_decay_off_at * T; see `WeightDecaySwitch`, which also describes what the
    ranks compare and when.

    Call `step()` after each `optimizer.step()`. Several calls that an engine's wrapper makes for one call of its own
    count once, so `total_steps` is the number of optimizer steps of the run under every engine.

    After any load of the optimizer or the schedule, in any order, rate and decay follow from the step and this object's
    settings; the state holds the step and the base values. If a group's rate is also set or scaled elsewhere (another
    scheduler in SequentialLR or ChainedScheduler, SWALR, ReduceLROnPlateau, or by hand), the schedule behaves like
    torch's CosineAnnealingLR: the next `step()` continues from the present rate, and a load restores the optimizer's.
    The same holds if it is created for an optimizer whose rate another scheduler has set.

    If a group's rate or decay is a tensor, the group gets its own tensor when the schedule is created, which is filled
    in place from then on. So create the schedule before a step is captured in a CUDA graph.

    With RAdaBeliefW's `rate_guard=1`, which takes no rate, give decay="constant" and no warm-up: the switch of the
    weight decay is left. With its `averaging` a rate that falls is a warning.

    Args:
        optimizer: Any torch optimizer, or an engine's wrapper of one.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Number of warm-up steps, in [0, total_steps].
        weight_decay_off_at: Fraction of the steps after which decay is off, in [0, 1]; None leaves the decay to a
            WeightDecaySwitch of your own.
        min_lr_ratio: Final value of the cosine, as a fraction of eta, in [0, 1].
        decay: "cosine"; "step": eta/10 for s >= T/2 and eta/100 for s >= 3 T/4, the paper's baseline; "constant"; or a
            function of s and T that returns the fraction of eta at the steps after the warm-up.
        process_group: The ranks that must agree; None is the default group.
        last_epoch: As in torch: -1 for a new schedule, else the last step taken.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, or the rate changes although all param groups ignore it.
    """

    def __init__(
        self,
        optimizer: Any,
        total_steps: int,
        *,
        warmup_steps: int = 0,
        weight_decay_off_at: float | None = 0.75,
        min_lr_ratio: float = 0.0,
        decay: DecayKind | OwnDecay = "cosine",
        process_group: dist.ProcessGroup | None = None,
        last_epoch: int = -1,
    ) -> None:
        curve = checked_curve(total_steps, warmup_steps, min_lr_ratio, decay)
        done = whole_number("last_epoch", last_epoch, -1)
        self._start(optimizer, curve, weight_decay_off_at, process_group, done)

    def _start(
        self,
        optimizer: Any,
        curve: Curve,
        weight_decay_off_at: float | None,
        process_group: dist.ProcessGroup | None,
        last_epoch: int,
        base_lrs: Sequence[float] | None = None,
    ) -> None:
        """Take control of the optimizer; `base_lrs`, one per group, replace the groups' own."""
        self.optimizer = base_optimizer(optimizer)
        _check_has_effect(curve, self.optimizer.param_groups)
        self.curve = curve
        self.weight_decay_switch: WeightDecaySwitch | None = None
        if weight_decay_off_at is not None:
            self.weight_decay_switch = WeightDecaySwitch(
                self.optimizer, self.curve.total_steps, off_at=weight_decay_off_at, process_group=process_group
            )
        for group, lr in zip(self.optimizer.param_groups, base_lrs or (), strict=base_lrs is not None):
            group["initial_lr"] = lr
        self._rates = LearningRates(self.optimizer)
        # Rates that no scheduler in this process has set come from the optimizer's constructor or a load.
        self._rates_are_initial = base_lrs is not None or not hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        self._just_loaded = False
        attach(self.optimizer, self)
        super().__init__(self.optimizer, last_epoch)
        self._rates_are_initial = False
        # The same list, so that groups added later join it.
        self.base_lrs = self._rates.base  # type: ignore[assignment]

    def step(self, epoch: int | None = None, **ignored: Any) -> None:
        """Count an optimizer step, and set the rate and decay of the next one.

        Args:
            epoch: Go to this step instead, as in torch's schedulers.
            **ignored: Arguments that some engines pass on from their caller.

        Raises:
            RankDisagreementError: On every rank, if the ranks' settings, steps or groups differ.
            RuntimeError: An engine steps a SequentialLR or ChainedScheduler that contains this once per process.
            ValueError: `epoch` is not a whole number.
        """
        if is_repeated_call():
            return
        first = self._step_count == 0
        self._step_count += 1
        self._just_loaded = False
        if epoch is not None:
            self._go_to(_step_number(epoch))
        elif first:
            self._begin()
        else:
            self._advance()

    def _update_lr(self, epoch: int | None = None) -> None:
        # SequentialLR calls this instead of step() when a scheduler's turn begins; torch 2.6 calls step(0).
        if not is_repeated_call():
            self._go_to(self.last_epoch + 1 if epoch is None else _step_number(epoch))

    def get_lr(self) -> list[float | Tensor]:
        """Each group's current learning rate."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """The step, the groups' base values and the switch's state; only plain numbers and lists.

        "on_curve" tells for each group whether its rate is the one that this schedule has set.
        """
        self._rates.update_groups()
        switch = self.weight_decay_switch
        waits = self.last_epoch < 0
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": list(self._rates.base),
            "on_curve": [not waits and here for here in self._rates.on_curve()],
            "weight_decay_switch": None if switch is None else switch.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved step, and set its decay, and its rate in the groups that were on the curve.

        Raises:
            ValueError: This is not a state of a RobustSchedule, or it has another number of groups.
        """
        missing = [key for key in _STATE_KEYS if key not in state_dict]
        if missing:
            raise ValueError(f"this is not a state of a RobustSchedule: it has no {', '.join(missing)}")
        base, step = state_dict["base_lrs"], state_dict["last_epoch"]
        # States of 0.4.4 and older do not have it.
        on_curve = state_dict.get("on_curve", [step >= 0] * len(base))
        self._rates.take_up(base, on_curve, lambda base: self.curve.lr(step, base))
        switch = state_dict["weight_decay_switch"]
        if self.weight_decay_switch is not None and switch is not None:
            self.weight_decay_switch.load_state_dict(switch)
        self._step_count = state_dict["_step_count"]
        self._just_loaded = True
        self.last_epoch = step
        self._follow_up()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        attach(self.optimizer, self)

    def _go_to(self, step: int) -> None:
        self.last_epoch = step
        self._rates.write(self._rate_of)
        self._follow_up()

    def _begin(self) -> None:
        self.last_epoch += 1
        if self.last_epoch > 0:
            self._go_to(self.last_epoch)
            return
        self._rates.begin(self._rate_of, self._scaled, replace=self._rates_are_initial)
        self._follow_up()

    def _advance(self) -> None:
        self.last_epoch += 1
        self._rates.advance(self._rate_of, self._scaled)
        self._last_lr = self.get_lr()
        if self.weight_decay_switch is not None:
            self.weight_decay_switch.step()

    def _follow_up(self) -> None:
        """Update everything else that depends on the step, after a jump; while waiting in a SequentialLR it is -1."""
        self._last_lr = self.get_lr()
        if self.weight_decay_switch is not None:
            self.weight_decay_switch._go_to(max(0, self.last_epoch))

    def _rate_of(self, base: float) -> float:
        return self.curve.lr(self.last_epoch, base)

    def _scaled(self, base: float, rate: Any) -> Any:
        return self.curve.scaled(self.last_epoch, base, rate)

    def _before_step(self) -> None:
        self._rates.take_in_added_groups()
        # Some loads replace all settings without calling load hooks; dry steps need lr = 0.
        if self._just_loaded and not is_dry(self.optimizer):
            self._just_loaded = False
            self._rates.restore_on_curve(self._rate_of)

    def _after_load(self) -> None:
        # A schedule that waits in a SequentialLR sets no rate.
        self._rates.after_load(None if self.last_epoch < 0 else self._rate_of)
        self._last_lr = self.get_lr()


def _check_has_effect(curve: Curve, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a rate that changes where no group takes one; warn of one that falls beside an average."""
    named = [f"warmup_steps={curve.warmup_steps}"] if curve.warmup_steps else []
    named += [f"decay={curve.decay!r}"] if curve.decay != "constant" else []
    if all_ignore_rate(groups) and curve.changes:
        raise ValueError(
            f"RobustSchedule({', '.join(named)}) has no effect on RAdaBeliefW's rate_guard=1, which takes no learning "
            "rate: give decay='constant' and no warm-up, which still switches the weight decay off; or set rate_guard "
            "above 1, within which the rate counts"
        )
    averaging = next(filter(None, (option(group, "averaging") for group in groups)), None)
    if averaging is not None and curve.falls:
        warnings.warn(
            f"decay={curve.decay!r} lowers the learning rate, in place of which averaging={averaging!r} averages the "
            "weights: give RobustSchedule decay='constant', which still switches the weight decay off",
            UserWarning,
            stacklevel=4,
        )


def _step_number(epoch: Any) -> int:
    try:
        return whole_number("epoch", epoch, 0)
    except TypeError as error:
        # An engine may interpret a TypeError as a scheduler without this argument.
        raise ValueError(str(error)) from error
