"""Checks of optimizer and schedule in a DeepSpeed JSON, before an engine is built from it."""

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from robust_dist.documents import read_json
from robust_dist.engines.deepspeed import schedule
from robust_dist.optim import RAdaBeliefW, fused_cpu
from robust_dist.optim.rate import all_ignore_rate, ignores_rate
from robust_dist.optim.settings import DEFAULTS, check_constant, check_group
from robust_dist.ranks.talk import rank
from robust_dist.schedule.curve import Curve
from robust_dist.surroundings import usable_cores
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
# The values that Accelerate or Trainer fill in.
_FILLED = {
    "optimizer": ("lr", "betas", "eps", "weight_decay"),
    "scheduler": ("total_num_steps", "warmup_num_steps", "warmup_min_lr", "warmup_max_lr"),
}
# Stands for an unknown total when checking values that must not exceed it.
_ANY_TOTAL = 2**62

_DECOUPLED = "RAdaBeliefW's weight decay is always decoupled, as AdamW's: set it to true or leave it out"
# Parameters of DeepSpeed's and torch's Adam: the values that have no effect here, and the message for others.
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
# Options of RAdaBeliefW that run under data parallelism in memory alone.
_IN_MEMORY = ("averaging", "rate_guard")
_LOG = logging.getLogger(__name__)
_SIMILAR = ("radabeliefw", "robustschedule", "weightdecayswitch")


def findings(section: str, params: Mapping[str, Any], *, auto: bool) -> Iterator[Finding]:
    """All problems in the "params" of a section that names our class; `auto` as in `check_config`."""
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
    """The params for our classes: those without effect removed, step counts as integers."""
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
            yield setting, f"{setting}={value!r}; {_advice_on_auto(section, name)}"
    rest = {name: value for name, value in given.items() if name not in wrong}
    if section == "scheduler" and not {"total_steps", "total_num_steps"} & known.keys():
        yield f"{section}.params.total_num_steps", f"{section}.params={rest}; {schedule.NO_TOTAL}"
    if section == "optimizer" and "rate_guard" not in wrong and (reason := _reason(_check_constant, rest)):
        yield f"{section}.params.rate_constant", f"{section}.params.{reason}"
    if reason := _reason(check, rest):
        yield section, f"{section}.params={rest}; {OURS[section]} says: {reason}"


def _advice_on_auto(section: str, name: str) -> str:
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


def _check_constant(given: Mapping[str, Any]) -> None:
    check_constant([given])


def _check_schedule(given: Mapping[str, Any]) -> None:
    off_at = given.get("weight_decay_off_at")
    if off_at is not None:
        real_number("weight_decay_off_at", off_at, 0.0, 1.0)
    _curve(given)


def _curve(given: Mapping[str, Any]) -> Curve:
    """The curve of a section's settings; an open number of steps is a large one."""
    theirs = {name: value for name, value in given.items() if name in schedule.NAMES}
    total = given.get("total_steps", None if "total_num_steps" in theirs else _ANY_TOTAL)
    ours = (given.get("warmup_steps", 0), given.get("min_lr_ratio", 0.0), given.get("last_epoch", -1))
    return schedule.settings(total, *ours, theirs, given.get("decay", "cosine"))[0]


def check_config(config: Mapping[str, Any] | str | Path, *, auto: bool = False) -> None:
    """Check a DeepSpeed JSON before `deepspeed.initialize`: our names, parameters and values, and what overrides them.

    A JSON that names another optimizer and another scheduler, or none, is left to DeepSpeed. Parameters of DeepSpeed's
    optimizers that request what RAdaBeliefW does anyway are accepted (`"torch_adam"`, `"adam_w_mode": true`,
    `"bias_correction": true`, `"amsgrad": false`), as are step counts such as 1000.0. With `offload_optimizer` the
    number of threads of a rank's step is logged, as a warning if it is one on a host with many cores. Settings that
    `averaging` and `rate_guard` do not support are an error here if they are in the JSON, else when the engine starts.

    Args:
        config: The JSON as a dict, or the path of its file.
        auto: Whether Accelerate or Trainer will fill in each "auto". DeepSpeed alone does not.

    Raises:
        ValueError: A misspelt or unknown type or parameter, a value of the wrong type or out of its range, an
            "auto" that nobody fills in, `register()` forgotten, an offload that steps with another optimizer, or an
            engine or a schedule that `averaging` or `rate_guard` does not go with. The message names the rank and
            everything that is wrong: setting, value and what to change.
        FileNotFoundError: There is no such file.
    """
    loaded = config if isinstance(config, Mapping) else _read(Path(config))
    found = [*_of_sections(loaded, OURS, auto), *_of_offload(loaded), *([] if auto else _of_open(loaded))]
    _refuse(found)
    if _offload(loaded) and rank() == 0:
        _say_threads()


def check_engine_config(engine: Any) -> None:
    """Check the sections of its JSON that a starting engine uses, and normalize the parameters.

    Sections that DeepSpeed does not use are not checked: those replaced by a client's object, a scheduler without an
    optimizer.

    Raises:
        ValueError: As `check_config`, except for an "auto" in other sections and a client's optimizer.
    """
    config = getattr(engine, "_config", None)
    written = getattr(config, "_param_dict", None)
    if not isinstance(written, dict):
        return
    used = _used_sections(engine, config)
    found = list(_of_sections(written, used, auto=False))
    if isinstance(client := engine.client_optimizer, RAdaBeliefW):
        found += [*_of_other_steps(written), *_of_client(written, client, used)]
    _refuse(found)
    for section in used:
        params = getattr(config, f"{section}_params", None)
        if _type_of(written, section) == OURS[section] and params:
            setattr(config, f"{section}_params", normalized(section, params))


def check_options_json(engine: Any, optimizer: RAdaBeliefW) -> None:
    """Check that an engine's JSON supports `averaging` and `rate_guard` of its optimizer, also after a load.

    Raises:
        ValueError: As `check_config`.
    """
    written = getattr(getattr(engine, "_config", None), "_param_dict", None)
    if isinstance(written, dict):
        _refuse(_of_client(written, optimizer, ()))


def _used_sections(engine: Any, config: Any) -> list[str]:
    by_name = engine.client_optimizer is None
    trains = not by_name or bool(config.optimizer_name)
    return ["optimizer"] * by_name + ["scheduler"] * (trains and not engine.client_lr_scheduler)


def _refuse(found: Iterable[Finding]) -> None:
    lines: dict[str, str] = {}
    for setting, line in found:
        lines.setdefault(setting, line)
    if lines:
        raise ValueError(f"rank {rank()}: the DeepSpeed JSON has " + "\nand ".join(lines.values()))


def _wrong(setting: str, value: Any, advice: str) -> Finding:
    return setting, f"{setting}={value!r}; {advice}"


def _read(path: Path) -> Mapping[str, Any]:
    loaded = read_json(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} contains a {type(loaded).__name__}; a DeepSpeed JSON must be an object")
    return loaded


def _type_of(config: Mapping[str, Any], section: str) -> Any:
    named = config.get(section)
    return named.get("type") if isinstance(named, Mapping) else None


def _of_sections(config: Mapping[str, Any], used: Collection[str], auto: bool) -> Iterator[Finding]:
    yield from _of_misspelt_sections(config, used)
    for section in used:
        named = config.get(section)
        if named is not None and not isinstance(named, Mapping):
            yield _wrong(section, named, 'write {"type": NAME, "params": {...}}')
        elif _type_of(config, section) == OURS[section]:
            yield from _of_ours(section, named or {}, auto)
        else:
            yield from _of_another_name(section, _type_of(config, section))
    if "optimizer" in used and _type_of(config, "optimizer") == OURS["optimizer"]:
        yield from _of_other_steps(config)
        params = (config["optimizer"] or {}).get("params")
        params = params if isinstance(params, Mapping) else {}
        yield from _of_options(config, {name: params[name] for name in _IN_MEMORY if params.get(name) is not None})
        if "scheduler" in used and ignores_rate(params):
            yield from _of_idle_schedule(config)


def _of_client(config: Mapping[str, Any], optimizer: RAdaBeliefW, used: Collection[str]) -> Iterator[Finding]:
    """What the options of a client's optimizer do not go with."""
    groups = optimizer.param_groups
    given = {name: group[name] for group in groups for name in _IN_MEMORY if group.get(name) is not None}
    yield from _of_options(config, given)
    if "scheduler" in used and all_ignore_rate(groups):
        yield from _of_idle_schedule(config)


def _of_options(config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings of an engine that does more than data parallelism in memory, where options need that."""
    for setting, value in _beyond_memory(config) if given else ():
        yield _wrong(setting, value, _against(given))
    autocast = config.get("torch_autocast")
    if "rate_guard" in given and isinstance(autocast, Mapping) and autocast.get("enabled"):
        dtype = str(autocast.get("dtype")).removeprefix("torch.")
        if dtype in ("float16", "fp16", "half"):
            yield _wrong("torch_autocast.dtype", autocast["dtype"], _against({"rate_guard": given["rate_guard"]}))


def _against(given: Mapping[str, Any]) -> str:
    named = " and ".join(f"{name}={value!r}" for name, value in given.items())
    return (
        f"RAdaBeliefW's {named} cannot run with it: leave that out, or leave {' and '.join(given)} out (in a recipe, "
        "give optimizer.lr as a number)"
    )


def _beyond_memory(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    zero, where = _mapping(config, "zero_optimization"), "zero_optimization"
    for name in ("offload_optimizer", "offload_param"):
        if (device := _mapping(zero, name).get("device")) == "nvme":
            yield f"{where}.{name}.device", device
    if zero.get("elastic_checkpoint") is True:
        yield f"{where}.elastic_checkpoint", True
    if zero.get("stage") == 3 and _number(zero, "mics_shard_size") > 0:  # another wrapper, whatever its size
        yield f"{where}.mics_shard_size", zero["mics_shard_size"]
    if _number(zero, "zero_hpz_partition_size") > 1:
        yield f"{where}.zero_hpz_partition_size", zero["zero_hpz_partition_size"]
    if (size := _number(_mapping(config, "tensor_parallel"), "autotp_size")) > 1:
        yield "tensor_parallel.autotp_size", size
    # DeepSpeed takes the one beside the other alone.
    if (size := _number(config, "sequence_parallel_size")) > 1 and "data_parallel_size" in config:
        yield "sequence_parallel_size", size
    if _mapping(config, "expert_parallel").get("enabled") is True:
        yield "expert_parallel.enabled", True


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(config: Mapping[str, Any], name: str) -> int:
    found = config.get(name)
    return found if isinstance(found, int) else 0


def _of_idle_schedule(config: Mapping[str, Any]) -> Iterator[Finding]:
    """A schedule that sets a rate which `rate_guard=1` does not take."""
    name, reason = _type_of(config, "scheduler"), "RAdaBeliefW's rate_guard=1 takes no learning rate"
    right = f'"type": "{OURS["scheduler"]}" with "decay": "constant" and no warm-up still switches the weight decay off'
    if not isinstance(name, str):
        return
    if name != OURS["scheduler"]:
        yield _wrong("scheduler.type", name, f"{reason}: leave the scheduler out ({right})")
        return
    params = _mapping(config["scheduler"], "params")
    given = {name: value for name, value in params.items() if value != AUTO and name in _NAMES["scheduler"]}
    try:
        changes = _curve(normalized("scheduler", given)).changes
    except (TypeError, ValueError):  # said elsewhere
        return
    if changes:
        yield _wrong("scheduler.params", dict(params), f"{reason}, and this schedule changes it: {right}")


def _of_misspelt_sections(config: Mapping[str, Any], used: Collection[str]) -> Iterator[Finding]:
    for name, value in config.items():
        near = get_close_matches(name.lower(), used, 1, 0.7)
        if name in OURS or not near or near[0] in config or not _is_like_ours(_type_of(config, name)):
            continue
        yield _wrong(name, dict(value), f"DeepSpeed ignores a section of this name; it is called {near[0]!r}")


def _is_like_ours(name: Any) -> bool:
    return isinstance(name, str) and bool(get_close_matches(name.lower(), _SIMILAR, 1, 0.6))


def _namespace(section: str) -> Any:
    return torch.optim if section == "optimizer" else torch.optim.lr_scheduler


def _of_ours(section: str, named: Mapping[str, Any], auto: bool) -> Iterator[Finding]:
    if not hasattr(_namespace(section), OURS[section]):
        yield _wrong(f"{section}.type", OURS[section], "call robust_dist.register() on every rank before this")
    params = named.get("params") or {}
    if isinstance(params, Mapping):
        yield from findings(section, params, auto=auto)
    else:
        yield _wrong(f"{section}.params", params, "write an object of names and values")


def _of_another_name(section: str, name: Any) -> Iterator[Finding]:
    if name is not None and not isinstance(name, str):
        yield _wrong(f"{section}.type", name, f"give a name, e.g. {OURS[section]!r}")
    elif isinstance(name, str) and _is_like_ours(name) and not hasattr(_namespace(section), name):
        yield _wrong(f"{section}.type", name, f"there is no such {section}: did you mean {OURS[section]!r}?")


def _offload(config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    return offload if isinstance(offload, Mapping) and offload.get("device", "none") != "none" else {}


def _of_other_steps(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings with which another optimizer would step some parameters."""
    offload, where = _offload(config), "zero_optimization.offload_optimizer"
    ratio = offload.get("ratio", 1.0)
    if ratio != 1.0:
        yield _wrong(f"{where}.ratio", ratio, "torch's AdamW would step the rest of the parameters: set it to 1.0")
    if offload.get("super_offload"):
        yield _wrong(f"{where}.super_offload", True, "DeepSpeed's own CPU Adam would step: set it to false")
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("zenflow"):
        yield _wrong("zero_optimization.zenflow", zero["zenflow"], "it steps with DeepSpeed's own Adam: leave it out")


def _of_offload(config: Mapping[str, Any]) -> Iterator[Finding]:
    if not _offload(config) or _type_of(config, "optimizer") is not None:
        return
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    if forced:
        yield _wrong(
            "zero_force_ds_cpu_optimizer",
            forced,
            "with offload_optimizer DeepSpeed refuses a client's optimizer, and Accelerate puts DeepSpeedCPUAdam in "
            'its place: set it to false, or name "type": "RAdaBeliefW" under "optimizer"',
        )
    else:
        yield from _of_other_steps(config)


def _say_threads() -> None:
    threads, cores = fused_cpu.threads(), int(usable_cores())
    what = f"offload_optimizer: each rank steps on the CPU with {threads} threads, this host has {cores} cores"
    if threads == 1 < cores:
        _LOG.warning("%s; export OMP_NUM_THREADS=CORES, a rank's share of them", what)
    else:
        _LOG.info(what)


def _of_open(value: Any, where: str = "") -> Iterator[Finding]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _of_open(inner, f"{where}.{name}" if where else str(name))
    elif value == AUTO:
        yield _wrong(where, AUTO, "DeepSpeed alone does not fill it in (Accelerate and Trainer do): give the value")
