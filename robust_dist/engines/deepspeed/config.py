"""Checks of optimizer and schedule in a DeepSpeed JSON, before an engine is built from it."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from robust_dist.documents import read_json
from robust_dist.engines.deepspeed.sections import AUTO, OURS, Finding, findings, normalized
from robust_dist.optim import RAdaBeliefW, fused_cpu
from robust_dist.ranks.talk import rank
from robust_dist.surroundings import usable_cores

_LOG = logging.getLogger(__name__)
_SIMILAR = ("radabeliefw", "robustschedule", "weightdecayswitch")


def check_config(config: Mapping[str, Any] | str | Path, *, auto: bool = False) -> None:
    """Check a DeepSpeed JSON before `deepspeed.initialize`: our names, parameters and values, and what overrides them.

    A JSON that names another optimizer and another scheduler, or none, is left to DeepSpeed. Parameters of DeepSpeed's
    own optimizers that ask for what RAdaBeliefW does anyway pass (`"torch_adam"`, `"adam_w_mode": true`,
    `"bias_correction": true`, `"amsgrad": false`), and so do step counts such as 1000.0. With `offload_optimizer` the
    log says how many threads a rank steps with, as a warning where it is one of many cores.

    Args:
        config: The JSON as a dict, or the path of its file.
        auto: Whether somebody (Accelerate, Trainer) will fill in each "auto". DeepSpeed alone does not.

    Raises:
        ValueError: A misspelt or unknown type or parameter, a value of the wrong type or out of its range, an
            "auto" that nobody fills in, `register()` forgotten, or an offload that steps with another optimizer. The
            message names the rank and everything that is wrong: setting, value and what to change.
        FileNotFoundError: There is no such file.
    """
    loaded = config if isinstance(config, Mapping) else _read(Path(config))
    found = [*_of_sections(loaded, OURS, auto), *_of_offload(loaded), *([] if auto else _of_open(loaded))]
    _refuse(found)
    if _offload(loaded) and rank() == 0:
        _say_threads()


def check_options(settings: Mapping[str, Any]) -> None:
    """Refuse RAdaBeliefW's options that need what DeepSpeed hides: the gradients of all groups, and the weights.

    Args:
        settings: Of a param group, or the parameters in a JSON.

    Raises:
        ValueError: Names the option and what would be right.
    """
    for name in ("averaging", "rate_guard"):
        if settings.get(name) is not None:
            raise ValueError(
                f"rank {rank()}: RAdaBeliefW's {name}={settings[name]!r} does not run under DeepSpeed: leave it out "
                "(in a recipe, give optimizer.lr as a number), or use DDP, FSDP or one process"
            )


def check_engine_config(engine: Any) -> None:
    """Check what a starting engine takes by name from its JSON, and normalize the parameters.

    What DeepSpeed does not use is not looked at: a section beside a client's object, a scheduler without an optimizer.

    Raises:
        ValueError: As `check_config`, except for an "auto" in other sections and a client's optimizer.
    """
    config = getattr(engine, "_config", None)
    written = getattr(config, "_param_dict", None)
    if not isinstance(written, dict):
        return
    used = _used_sections(engine, config)
    for group in getattr(engine.client_optimizer, "param_groups", ()):
        if isinstance(engine.client_optimizer, RAdaBeliefW):
            check_options(group)
    if "optimizer" in used and _type_of(written, "optimizer") == OURS["optimizer"]:
        check_options(getattr(config, "optimizer_params", None) or {})
    found = list(_of_sections(written, used, auto=False))
    if isinstance(engine.client_optimizer, RAdaBeliefW):
        found += _of_other_steps(written)
    _refuse(found)
    for section in used:
        params = getattr(config, f"{section}_params", None)
        if _type_of(written, section) == OURS[section] and params:
            setattr(config, f"{section}_params", normalized(section, params))


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
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a DeepSpeed JSON is an object")
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
    """Settings by which another optimizer would step some of the parameters."""
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


def _of_open(config: Mapping[str, Any]) -> Iterator[Finding]:
    for setting in _open(config, ""):
        yield _wrong(setting, AUTO, "DeepSpeed alone does not fill it in (Accelerate and Trainer do): give the value")


def _open(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _open(inner, f"{where}.{name}" if where else str(name))
    elif value == AUTO:
        yield where
