"""RobustSchedule's settings under the names that DeepSpeed's schedulers give them in a JSON."""

from dataclasses import dataclass, replace
from typing import Any

from robust_dist.schedule.curve import DECAYS, Curve, DecayKind, WarmupKind
from robust_dist.schedule.validate import one_of, real_number, whole_number

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
# Numbers of steps, which people also write as 1000.0 or 1e4.
COUNTS = ("total_num_steps", "warmup_num_steps", "last_batch_iteration")
NO_TOTAL = (
    "total_steps is missing; give the number of optimizer steps of the whole run (in a DeepSpeed JSON as "
    '"total_num_steps", or write "total_num_steps": "auto" where Trainer or Accelerate fills it in)'
)
_OURS = "total_steps, warmup_steps, weight_decay_off_at, min_lr_ratio, decay, process_group, last_epoch"
_KINDS: dict[str, WarmupKind] = {"log": "deepspeed_log", "linear": "deepspeed_linear"}


@dataclass(frozen=True)
class Settings:
    """What RobustSchedule was asked for, whatever the names.

    Attributes:
        curve: The learning rate by step.
        peak_lr: Base learning rate for every group, one per group, or None: the groups' own.
        last_epoch: torch's meaning: -1 for a new schedule, else the last step done.
    """

    curve: Curve
    peak_lr: float | list[float] | None
    last_epoch: int


def settings(
    total_steps: Any,
    warmup_steps: Any,
    min_lr_ratio: Any,
    last_epoch: Any,
    deepspeed: dict[str, Any],
    decay: DecayKind = "cosine",
) -> Settings:
    """Check all settings and bring DeepSpeed's names to ours.

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: An unknown name, a setting given under two names, or a value outside its range.
    """
    unknown = [name for name in deepspeed if name not in NAMES]
    if unknown:
        raise ValueError(
            f"RobustSchedule has no parameter {', '.join(map(repr, unknown))}; it has {_OURS}, and DeepSpeed's "
            + ", ".join(NAMES)
        )
    given = {name: whole(value) if name in COUNTS else value for name, value in deepspeed.items()}
    total = _either("total_steps", total_steps, None, "total_num_steps", given)
    warmup_name = "warmup_num_steps" if "warmup_num_steps" in given else "warmup_steps"
    warmup = _either("warmup_steps", warmup_steps, 0, "warmup_num_steps", given)
    ratio = _either("min_lr_ratio", min_lr_ratio, 0.0, "cos_min_ratio", given)
    last = _either("last_epoch", last_epoch, -1, "last_batch_iteration", given)
    if total is None:
        raise ValueError(NO_TOTAL)
    total = whole_number("total_steps", total, 1)
    warmup = whole_number(warmup_name, warmup, 0, total)
    ratio = real_number("min_lr_ratio", ratio, 0.0, 1.0)
    peak = given.pop("warmup_max_lr", None)
    one_of("decay", decay, DECAYS)
    if decay != "cosine" and ratio:
        raise ValueError(f"min_lr_ratio={ratio} is where the cosine ends; with decay={decay!r} it must be 0")
    curve = _deepspeed_curve(total, warmup, ratio, given) if deepspeed else None
    curve = curve or Curve(total_steps=total, warmup_steps=warmup, min_lr_ratio=ratio)
    return Settings(
        replace(curve, decay=decay),
        _peak_lr(peak),
        whole_number("last_epoch", last, -1),
    )


def whole(value: Any) -> Any:
    """A float without a fraction as the int that it is; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _either(ours: str, value: Any, default: Any, theirs: str, given: dict[str, Any]) -> Any:
    if theirs not in given:
        return value
    if value != default:
        raise ValueError(f"{ours}={value!r} and {theirs}={given[theirs]!r} are the same setting; give one of them")
    return given.pop(theirs)


def _deepspeed_curve(total: int, warmup: int, min_lr_ratio: float, given: dict[str, Any]) -> Curve:
    kind = one_of("warmup_type", given.get("warmup_type", "log"), tuple(_KINDS))
    start_lr, start_ratio = given.get("warmup_min_lr", 0.0), given.get("warmup_min_ratio", 0.0)
    if start_lr and start_ratio:
        raise ValueError(
            f"warmup_min_lr={start_lr!r} and warmup_min_ratio={start_ratio!r} both say where warm-up starts"
        )
    return Curve(
        total_steps=total,
        # DeepSpeed's least number, for its logarithm.
        warmup_steps=max(2, warmup) if warmup else 0,
        min_lr_ratio=min_lr_ratio,
        warmup=_KINDS[kind],
        start_ratio=real_number("warmup_min_ratio", start_ratio, 0.0, 1.0),
        start_lr=real_number("warmup_min_lr", start_lr, 0.0),
    )


def _peak_lr(value: Any) -> float | list[float] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [real_number("warmup_max_lr", one, 0.0) for one in value]
    return real_number("warmup_max_lr", value, 0.0)
