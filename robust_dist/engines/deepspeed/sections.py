"""The sections "optimizer" and "scheduler" of a DeepSpeed JSON: what they may hold where they name ours."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from robust_dist.engines.deepspeed import schedule
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import DEFAULTS, check_group
from robust_dist.validate import real_number

AUTO = "auto"
OURS = {"optimizer": "RAdaBeliefW", "scheduler": "RobustSchedule"}
# A setting's name and a line for the error's message: setting=value; what to change.
Finding = tuple[str, str]

_SCHEDULE = ("total_steps", "warmup_steps", "weight_decay_off_at", "min_lr_ratio", "decay", "last_epoch")
_NAMES = {
    "optimizer": tuple(inspect.signature(RAdaBeliefW).parameters)[1:],
    "scheduler": _SCHEDULE + schedule.NAMES,
}
# What Accelerate or Trainer fill in.
_FILLED = {
    "optimizer": ("lr", "betas", "eps", "weight_decay"),
    "scheduler": ("total_num_steps", "warmup_num_steps", "warmup_min_lr", "warmup_max_lr"),
}
# Stands for an open total in checks of what must not exceed it.
_ANY_TOTAL = 2**62

_DECOUPLED = "RAdaBeliefW's weight decay is always decoupled, as AdamW's: set it to true or leave it out"
# Parameters of DeepSpeed's and torch's Adams: the values that change nothing here, and what to say of others.
_NO_MEANING: dict[str, tuple[tuple[Any, ...], str]] = {
    "torch_adam": ((True, False), "set it to true or false, or leave it out"),
    "set_grad_none": ((True, False), "set it to true or false, or leave it out"),
    "adam_w_mode": ((True,), _DECOUPLED),
    "adamw_mode": ((True,), _DECOUPLED),
    "decoupled_weight_decay": ((True,), _DECOUPLED),
    "bias_correction": ((True,), "RAdaBeliefW always corrects the bias: set it to true or leave it out"),
    "amsgrad": ((False,), "RAdaBeliefW keeps no maximum of the second moment: set it to false or leave it out"),
    "fp32_optimizer_states": (
        (True,),
        'RAdaBeliefW keeps float32 state; "exp_avg_dtype": "bfloat16" makes the first moment smaller: set it to true '
        "or leave it out",
    ),
}
_ELSEWHERE = {
    "max_grad_norm": 'DeepSpeed clips by "gradient_clipping" at the top level of the JSON: move the value there',
}


def findings(section: str, params: Mapping[str, Any], *, auto: bool) -> Iterator[Finding]:
    """Everything that is wrong with the "params" of a section that names ours.

    Args:
        section: "optimizer" or "scheduler".
        params: Its "params".
        auto: Whether Accelerate or Trainer will fill in each "auto" that they know.
    """
    known: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in params.items():
        setting = f"{section}.params.{name}"
        if name in _NAMES[section]:
            known[name] = value
        elif section == "optimizer" and name in _NO_MEANING:
            allowed, reason = _NO_MEANING[name]
            if value is not None and value not in allowed:
                yield setting, f"{setting}={value!r}; {reason}"
        elif section == "optimizer" and name in _ELSEWHERE:
            yield setting, f"{setting}={value!r}; {_ELSEWHERE[name]}"
        elif near := get_close_matches(name, _NAMES[section], 1, 0.7):
            text = f"{OURS[section]} has no parameter {name!r}: did you mean {near[0]!r}?"
            yield setting, f"{setting}={value!r}; {text}"
        else:
            unknown[name] = value
    if unknown:
        yield _unknown(section, unknown)
    yield from _wrong_values(section, normalized(section, known), auto)


def normalized(section: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The params as our classes take them: meaningless ones left out, step counts as whole numbers."""
    kept = params if section == "scheduler" else {n: v for n, v in params.items() if n not in _NO_MEANING}
    counts = (*schedule.COUNTS, "total_steps", "warmup_steps", "last_epoch")
    whole = schedule.whole
    return {name: whole(value) if section == "scheduler" and name in counts else value for name, value in kept.items()}


def _unknown(section: str, unknown: Mapping[str, Any]) -> Finding:
    settings = ", ".join(f"{section}.params.{name}={value!r}" for name, value in unknown.items())
    names, them = ", ".join(map(repr, unknown)), "it" if len(unknown) == 1 else "them"
    advice = f"drop {them}; there are {', '.join(_NAMES[section])}"
    return f"{section}.params", f"{settings}; {OURS[section]} has no parameter {names}: {advice}"


def _wrong_values(section: str, known: Mapping[str, Any], auto: bool) -> Iterator[Finding]:
    check = _check_optimizer if section == "optimizer" else _check_schedule
    given = {name: value for name, value in known.items() if value != AUTO}
    wrong = {name: reason for name, value in given.items() if (reason := _reason(check, {name: value}))}
    for name, value in known.items():
        setting = f"{section}.params.{name}"
        if name in wrong:
            yield setting, f"{setting}={value!r}; {OURS[section]} says: {wrong[name]}"
        elif value == AUTO and not (auto and name in _FILLED[section]):
            yield setting, f"{setting}={value!r}; {_open(section, name)}"
    rest = {name: value for name, value in given.items() if name not in wrong}
    if section == "scheduler" and not {"total_steps", "total_num_steps"} & known.keys():
        yield f"{section}.params.total_num_steps", f"{section}.params={rest}; {schedule.NO_TOTAL}"
    if reason := _reason(check, rest):
        yield section, f"{section}.params={rest}; {OURS[section]} says: {reason}"


def _open(section: str, name: str) -> str:
    filled = _FILLED[section]
    if name in filled:
        return 'DeepSpeed alone fills in no "auto" here (Accelerate and Trainer do): give the value'
    hint = ' or write "total_num_steps": "auto"' if name == "total_steps" else ""
    return f'nobody fills in this "auto" (Accelerate and Trainer know {", ".join(filled)}): give the value{hint}'


def _reason(check: Callable[[Mapping[str, Any]], None], given: Mapping[str, Any]) -> str | None:
    try:
        check(given)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _check_optimizer(given: Mapping[str, Any]) -> None:
    check_group({**DEFAULTS, **given})


def _check_schedule(given: Mapping[str, Any]) -> None:
    off_at = given.get("weight_decay_off_at")
    if off_at is not None:
        real_number("weight_decay_off_at", off_at, 0.0, 1.0)
    theirs = {name: value for name, value in given.items() if name in schedule.NAMES}
    total = given.get("total_steps", None if "total_num_steps" in theirs else _ANY_TOTAL)
    ours = (given.get("warmup_steps", 0), given.get("min_lr_ratio", 0.0), given.get("last_epoch", -1))
    schedule.settings(total, *ours, theirs, given.get("decay", "cosine"))
