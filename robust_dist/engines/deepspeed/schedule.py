"""RobustSchedule with the settings and warm-ups of DeepSpeed's schedulers in a JSON."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from robust_dist.schedule import RobustSchedule, base_optimizer
from robust_dist.schedule.curve import Curve, DecayKind, checked_curve
from robust_dist.validate import one_of, real_number, whole_number

NAMES = (
    "total_num_steps",
    "warmup_num_steps",
    "warmup_min_lr",
    "warmup_max_lr",
    "warmup_min_ratio",
    "warmup_type",
    "cos_min_ratio",
    "last_batch_iteration",
)
# Numbers of steps, which may also be written as 1000.0 or 1e4.
COUNTS = ("total_num_steps", "warmup_num_steps", "last_batch_iteration")
NO_TOTAL = (
    "total_steps is missing; give the number of optimizer steps of the whole run (in a DeepSpeed JSON as "
    '"total_num_steps", or write "total_num_steps": "auto" where Trainer or Accelerate fills it in)'
)
_OURS = "total_steps, warmup_steps, weight_decay_off_at, min_lr_ratio, decay, process_group, last_epoch"


class DeepSpeedRobustSchedule(RobustSchedule):
    """The schedule for "RobustSchedule" in a DeepSpeed JSON, which also accepts DeepSpeed's names of settings.

    With any of DeepSpeed's names the warm-up equals DeepSpeed's, step by step ("log" unless warmup_type is "linear");
    without warmup_num_steps there is none, and without warmup_max_lr the groups' own rates are the peak.

    Args:
        optimizer: Any torch optimizer, or an engine's wrapper of one.
        total_steps: As in RobustSchedule, like the next six; or total_num_steps.
        warmup_steps: Or warmup_num_steps.
        weight_decay_off_at: As in RobustSchedule.
        min_lr_ratio: Or cos_min_ratio.
        decay: As in RobustSchedule.
        process_group: As in RobustSchedule.
        last_epoch: Or last_batch_iteration.
        **theirs: DeepSpeed's names: the above, warmup_min_lr, warmup_max_lr, warmup_min_ratio, warmup_type.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An unknown name, a setting given under two names, or a value out of range.
    """

    def __init__(
        self,
        optimizer: Any,
        total_steps: int | None = None,
        *,
        warmup_steps: int = 0,
        weight_decay_off_at: float | None = 0.75,
        min_lr_ratio: float = 0.0,
        decay: DecayKind = "cosine",
        process_group: dist.ProcessGroup | None = None,
        last_epoch: int = -1,
        **theirs: Any,
    ) -> None:
        curve, peak, done = settings(total_steps, warmup_steps, min_lr_ratio, last_epoch, theirs, decay)
        peaks = _peaks(peak, len(base_optimizer(optimizer).param_groups))
        self._start(optimizer, curve, weight_decay_off_at, process_group, done, peaks)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCurve(Curve):
    """A curve with DeepSpeed's warm-up from a start to eta; its step s uses DeepSpeed's iteration s - 1.

    Attributes:
        warmup: For s <= W, the completed fraction is log(s)/log(W) for "log" and (s - 1)/W for "linear".
        start_ratio: Start of the warm-up, as a fraction of eta.
        start_lr: Start of the warm-up as a learning rate; added to that of `start_ratio`.
    """

    warmup: Literal["log", "linear"] = "log"
    start_ratio: float = 0.0
    start_lr: float = 0.0

    def lr(self, step: int, base_lr: float) -> float:
        """The learning rate of optimizer step `step` (from 0) for the base learning rate `base_lr`."""
        if not self.warmup_steps or step > self.warmup_steps:
            return super().lr(step, base_lr)
        start = self.start_ratio * base_lr + self.start_lr
        return start + (base_lr - start) * self._share(step)

    def _share(self, step: int) -> float:
        if self.warmup == "log":
            return math.log(max(1, step)) / math.log(self.warmup_steps)
        return max(0, step - 1) / self.warmup_steps


def settings(
    total_steps: Any, warmup_steps: Any, min_lr_ratio: Any, last_epoch: Any, theirs: dict[str, Any], decay: Any
) -> tuple[Curve, float | list[float] | None, int]:
    """Check all settings and translate DeepSpeed's names; raises TypeError or ValueError naming the wrong one.

    Returns:
        The curve; the base learning rates (one for all groups, a list with one per group, or None for the groups'
        own); and torch's last_epoch.
    """
    unknown = [name for name in theirs if name not in NAMES]
    if unknown:
        raise ValueError(
            f"RobustSchedule has no parameter {', '.join(map(repr, unknown))}; it has {_OURS}, and DeepSpeed's "
            + ", ".join(NAMES)
        )
    given = {name: whole(value) if name in COUNTS else value for name, value in theirs.items()}
    warmup_name = "warmup_num_steps" if "warmup_num_steps" in given else "warmup_steps"
    total = _either("total_steps", total_steps, None, "total_num_steps", given)
    warmup = _either("warmup_steps", warmup_steps, 0, "warmup_num_steps", given)
    ratio = _either("min_lr_ratio", min_lr_ratio, 0.0, "cos_min_ratio", given)
    last = _either("last_epoch", last_epoch, -1, "last_batch_iteration", given)
    if total is None:
        raise ValueError(NO_TOTAL)
    warmup = whole_number(warmup_name, warmup, 0, whole_number("total_steps", total, 1))
    curve = checked_curve(total, warmup, ratio, decay)
    curve = _with_warmup(curve, given) if theirs else curve
    return curve, _peak_lr(given.get("warmup_max_lr")), whole_number("last_epoch", last, -1)


def whole(value: Any) -> Any:
    """Convert a float without a fraction to an int; return anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _either(ours: str, value: Any, default: Any, name: str, given: dict[str, Any]) -> Any:
    if name not in given:
        return value
    if value != default:
        raise ValueError(f"{ours}={value!r} and {name}={given[name]!r} are the same setting; give only one of them")
    return given[name]


def _with_warmup(curve: Curve, given: dict[str, Any]) -> DeepSpeedCurve:
    warmup = one_of("warmup_type", given.get("warmup_type", "log"), ("log", "linear"))
    start_lr, start_ratio = given.get("warmup_min_lr", 0.0), given.get("warmup_min_ratio", 0.0)
    if start_lr and start_ratio:
        raise ValueError(
            f"warmup_min_lr={start_lr!r} and warmup_min_ratio={start_ratio!r} both set the start of the warm-up"
        )
    return DeepSpeedCurve(
        total_steps=curve.total_steps,
        # DeepSpeed's minimum, for its logarithm.
        warmup_steps=max(2, curve.warmup_steps) if curve.warmup_steps else 0,
        min_lr_ratio=curve.min_lr_ratio,
        decay=curve.decay,
        warmup="log" if warmup == "log" else "linear",
        start_ratio=real_number("warmup_min_ratio", start_ratio, 0.0, 1.0),
        start_lr=real_number("warmup_min_lr", start_lr, 0.0),
    )


def _peak_lr(value: Any) -> float | list[float] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [real_number("warmup_max_lr", lr, 0.0) for lr in value]
    return real_number("warmup_max_lr", value, 0.0)


def _peaks(peak: float | list[float] | None, num_groups: int) -> list[float] | None:
    """The peak of every group."""
    if not isinstance(peak, list):
        return None if peak is None else [peak] * num_groups
    if len(peak) != num_groups:
        raise ValueError(f"warmup_max_lr={peak} has {len(peak)} values for {num_groups} param groups; give one each")
    return peak
