"""What a DeepSpeed JSON says of optimizer and schedule, checked before an engine is built from it."""

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from robust_dist.documents import read_json
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import DEFAULTS, check_group
from robust_dist.schedule import deepspeed_params
from robust_dist.schedule.validate import real_number

AUTO = "auto"
_OURS = {"optimizer": "RAdaBeliefW", "scheduler": "RobustSchedule"}
_SIMILAR = ("radabeliefw", "robustschedule", "weightdecayswitch")
_OPTIMIZER = tuple(inspect.signature(RAdaBeliefW).parameters)[1:]
_SCHEDULE = ("total_steps", "warmup_steps", "weight_decay_off_at", "min_lr_ratio", "last_epoch")
# Stands for an open total in checks of what must not exceed it.
_ANY_TOTAL = 2**62


def check_config(config: Mapping[str, Any] | str | Path, *, auto: bool = False) -> None:
    """Check a DeepSpeed JSON before `deepspeed.initialize`: names, parameters and values of ours, and what loses them.

    A JSON that names another optimizer and another scheduler is left to DeepSpeed.

    Args:
        config: The JSON as a dict, or the path of its file.
        auto: Whether somebody (Accelerate, Trainer) will fill in each "auto". DeepSpeed alone does not.

    Raises:
        ValueError: A misspelt or unknown type or parameter, a value of the wrong type or out of its range, an
            "auto" that nobody fills in, `register()` forgotten, or an offload that steps with another optimizer. The
            message names rank, setting, value and what to change.
        FileNotFoundError: There is no such file.
    """
    loaded = config if isinstance(config, Mapping) else _read(Path(config))
    check_sections(loaded, auto=auto)
    _check_offload(loaded)
    if not auto:
        _check_filled(loaded)


def check_sections(config: Mapping[str, Any], *, auto: bool = False) -> None:
    """The part of `check_config` that is right for every JSON that DeepSpeed is given.

    Raises:
        ValueError: As `check_config`, but for an "auto" in other sections and a client's optimizer.
    """
    _check_section_names(config)
    for section, check in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        named = config.get(section)
        if named is None:
            continue
        if not isinstance(named, Mapping):
            raise _error(section, named, 'write {"type": NAME, "params": {...}}')
        if _is_ours(section, named.get("type")):
            params = named.get("params") or {}
            if not isinstance(params, Mapping):
                raise _error(f"{section}.params", params, "write an object of names and values")
            check(_without_auto(section, params, auto), params)
    if _type_of(config, "optimizer") == _OURS["optimizer"]:
        _check_steps_with_ours(config)


def _error(setting: str, value: Any, advice: str) -> ValueError:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return ValueError(f"rank {rank}: the DeepSpeed JSON has {setting}={value!r}; {advice}")


def _read(path: Path) -> Mapping[str, Any]:
    loaded = read_json(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a DeepSpeed JSON is an object")
    return loaded


def _type_of(config: Mapping[str, Any], section: str) -> Any:
    named = config.get(section)
    return named.get("type") if isinstance(named, Mapping) else None


def _check_section_names(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _OURS or not (isinstance(value, Mapping) and "type" in value):
            continue
        near = get_close_matches(name.lower(), _OURS, 1, 0.7)
        if near and near[0] not in config:
            raise _error(name, dict(value), f"DeepSpeed ignores a section of this name; it is called {near[0]!r}")


def _is_ours(section: str, name: Any) -> bool:
    ours = _OURS[section]
    if not isinstance(name, str):
        raise _error(f"{section}.type", name, f"give a name, e.g. {ours!r}")
    namespace = torch.optim if section == "optimizer" else torch.optim.lr_scheduler
    if name == ours:
        if not hasattr(namespace, ours):
            raise _error(f"{section}.type", name, "call robust_dist.register() on every rank before this")
        return True
    if not hasattr(namespace, name) and get_close_matches(name.lower(), _SIMILAR, 1, 0.6):
        raise _error(f"{section}.type", name, f"there is no such {section}: did you mean {ours!r}?")
    return False


def _without_auto(section: str, params: Mapping[str, Any], auto: bool) -> dict[str, Any]:
    for name, value in params.items():
        if value == AUTO and not auto:
            raise _error(
                f"{section}.params.{name}",
                value,
                'DeepSpeed alone fills in no "auto" here (Accelerate and Trainer do): give the value',
            )
    return {name: value for name, value in params.items() if value != AUTO}


def _check_optimizer(params: dict[str, Any], given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in _OPTIMIZER:
            raise _unknown("optimizer", name, given[name], _OPTIMIZER)
    try:
        check_group({**DEFAULTS, **params})
    except (TypeError, ValueError) as error:
        raise _wrong("optimizer", params, error) from error


def _check_scheduler(params: dict[str, Any], given: Mapping[str, Any]) -> None:
    names = _SCHEDULE + deepspeed_params.NAMES
    for name in given:
        if name not in names:
            raise _unknown("scheduler", name, given[name], names)
    rest = {name: value for name, value in params.items() if name in deepspeed_params.NAMES}
    total = params.get("total_steps")
    if total is None and AUTO in (given.get("total_steps"), given.get("total_num_steps")):
        total = _ANY_TOTAL
    try:
        off_at = params.get("weight_decay_off_at")
        if off_at is not None:
            real_number("weight_decay_off_at", off_at, 0.0, 1.0)
        ratio, last = params.get("min_lr_ratio", 0.0), params.get("last_epoch", -1)
        deepspeed_params.settings(total, params.get("warmup_steps", 0), ratio, last, rest)
    except (TypeError, ValueError) as error:
        raise _wrong("scheduler", params, error) from error


def _unknown(section: str, name: str, value: Any, names: tuple[str, ...]) -> ValueError:
    near = get_close_matches(name, names, 1, 0.7)
    advice = f"did you mean {near[0]!r}?" if near else f"drop it; there are {', '.join(names)}"
    return _error(f"{section}.params.{name}", value, f"{_OURS[section]} has no parameter {name!r}: {advice}")


def _wrong(section: str, params: dict[str, Any], error: Exception) -> ValueError:
    return _error(f"{section}.params", params, f"{_OURS[section]} says: {error}")


def _offload(config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    return offload if isinstance(offload, Mapping) and offload.get("device", "none") != "none" else {}


def _check_steps_with_ours(config: Mapping[str, Any]) -> None:
    offload, where = _offload(config), "zero_optimization.offload_optimizer"
    ratio = offload.get("ratio", 1.0)
    if ratio != 1.0:
        raise _error(f"{where}.ratio", ratio, "torch's AdamW would step the rest of the parameters: set it to 1.0")
    if offload.get("super_offload"):
        raise _error(f"{where}.super_offload", True, "DeepSpeed's own CPU Adam would step: set it to false")
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("zenflow"):
        raise _error("zero_optimization.zenflow", zero["zenflow"], "it steps with DeepSpeed's own Adam: leave it out")


def _check_offload(config: Mapping[str, Any]) -> None:
    if not _offload(config) or _type_of(config, "optimizer") is not None:
        return
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    if forced:
        raise _error(
            "zero_force_ds_cpu_optimizer",
            forced,
            "with offload_optimizer DeepSpeed refuses a client's optimizer, and Accelerate puts DeepSpeedCPUAdam in "
            'its place: set it to false, or name "type": "RAdaBeliefW" under "optimizer"',
        )
    _check_steps_with_ours(config)


def _check_filled(config: Mapping[str, Any]) -> None:
    for setting in _open(config, ""):
        raise _error(setting, AUTO, "DeepSpeed alone does not fill it in (Accelerate and Trainer do): give the value")


def _open(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _open(inner, f"{where}.{name}" if where else str(name))
    elif value == AUTO:
        yield where
