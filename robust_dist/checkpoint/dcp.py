"""Checkpoints of shards: folders of `torch.distributed.checkpoint`, as FSDP1 and FSDP2 write them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from robust_dist.checkpoint.dcp_files import load_into, read_metadata, save_into
from robust_dist.checkpoint.names import bare, bare_names
from robust_dist.checkpoint.plain import check_keys
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.engines.engine import UNNOTED_SHARDS

MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"
_OPTIMIZER = re.compile(r"^(?P<before>(?:[^.]+\.)?)(?P<name>optimizer|optim)\.(?:state|param_groups)\.")
_GROUP_KEY = re.compile(r"(\d+)\.([^.]+)")
_EXTRA_STATE = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)")
_SCHEDULES = ("lr_scheduler", "scheduler", "schedule")


def load_flat(folder: Path) -> dict[str, Any]:
    """Every value of a DCP folder by its flat key, whole and on the CPU.

    Raises:
        CheckpointError: As `read_metadata`, or a file whose content is damaged.
    """
    flat: dict[str, Any] = {}
    entries = read_metadata(folder).state_dict_metadata
    try:
        for key, entry in entries.items():
            flat[key] = None
            if isinstance(entry, TensorStorageMetadata):
                flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        load_into(folder, flat, alone=True, flatten=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: could not be read: torn, or not of plain values ({error})") from None
    return flat


def ranks_of(folder: Path) -> int:
    """The number of ranks that wrote a DCP folder, from the names of its files."""
    return len({path.name.split("_")[2] for path in folder.glob("__*_*.distcp")})


def read_dcp(*folders: Path, unwrap: bool = False) -> TrainingState:
    """The training state in one DCP folder, or in a model's and an optimizer's.

    Args:
        *folders: The folder or the two.
        unwrap: As `bare_names`.

    Raises:
        CheckpointError: A folder is torn, holds no model or no optimizer, or another optimizer's state.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for folder in folders:
        flat.update(load_flat(folder))
        paths.update(read_metadata(folder).planner_data or {})
    where = folders[-1]
    found = next((match for match in map(_OPTIMIZER.match, flat) if match), None)
    if found is None:
        raise CheckpointError(
            f"{where}: no key begins with optimizer.state or optimizer.param_groups, as torch's get_state_dict makes "
            f"them; there are {list(flat)[:3]}"
        )
    before, root = found["before"], f"{found['before']}{found['name']}."
    found_model = _model(flat, before, root)
    objects = _extra_states(found_model, paths)
    weights = {name: value for name, value in found_model.items() if not _EXTRA_STATE.match(name)}
    entries = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    state = _state(_below(flat, root + "state."))
    model = bare(entries, bare_names(state), unwrap=unwrap)
    if objects:
        every = bare_names([*entries, *objects], bare_names(state), unwrap=unwrap)
        objects = dict(zip(every[len(entries) :], objects.values(), strict=True))
    if not model:
        raise CheckpointError(f"{where}: holds an optimizer, but no model under {before + 'model.'!r}")
    check_keys(state, where)
    groups = _groups(_below(flat, root + "param_groups."), list(state))
    called = list(dict.fromkeys(name for group in groups for name in group["params"]))
    renamed = dict(zip(called, bare_names(called, model), strict=True))
    optimizer = {renamed.get(name, name): entry for name, entry in state.items()}
    groups = [{**group, "params": [renamed[name] for name in group["params"]]} for group in groups]
    ranks, extra = ranks_of(folders[0]) or None, {"objects": objects} if objects else {}
    return TrainingState(
        model, optimizer, groups, _schedule(flat, before), engine=UNNOTED_SHARDS, world_size=ranks, extra=extra
    )


def read_weights(folder: Path, known: Iterable[str]) -> dict[str, Tensor]:
    """The model's entries in a DCP folder, whatever else it holds.

    Args:
        folder: The folder.
        known: The model's names.

    Raises:
        CheckpointError: The folder is torn.
    """
    flat = load_flat(folder)
    found = _below(flat, "model.") or flat
    return bare({name: value for name, value in found.items() if isinstance(value, Tensor)}, known)


def _below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _model(flat: Mapping[str, Any], before: str, optimizer: str) -> dict[str, Any]:
    """The model's entries: under "model.", or (torchtitan's newer files) beside the optimizer without a prefix."""
    nested = _below(flat, before + "model.")
    if nested:
        return nested
    others = (optimizer, *(f"{before}{name}." for name in (*_SCHEDULES, "dataloader", "train_state")))
    return {key.removeprefix(before): value for key, value in flat.items() if not key.startswith(others)}


def _extra_states(entries: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """Modules' extra state by name, put together again where DCP has taken it apart by `paths`."""
    found: dict[str, Any] = {}
    inner: dict[str, tuple[str | int, ...]] = {}
    for path in paths.values():
        at = next((i for i, part in enumerate(path) if _EXTRA_STATE.fullmatch(str(part))), len(path))
        inner[".".join(map(str, path[at:]))] = path[at:]
    for name, value in entries.items():
        if match := _EXTRA_STATE.match(name):
            rest = name[match.end() + 1 :]
            set_element(found, inner.get(name) or (match[0], *(rest.split(".") if rest else ())), value)
    return found


def _state(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        name, _, entry = key.rpartition(".")
        state.setdefault(name, {})[entry] = value
    return state


def _groups(flat: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Groups by number; where keys carry names instead (flattened), those with equal settings are one group."""
    if "0.params" in flat:
        numbered: dict[int, dict[str, Any]] = {}
        for key, value in flat.items():
            match = _GROUP_KEY.fullmatch(key)
            if match is not None:
                numbered.setdefault(int(match[1]), {})[match[2]] = value
        return [numbered[number] for number in sorted(numbered)]
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in flat.items():
        name, _, setting = key.rpartition(".")
        settings.setdefault(name, {})[setting] = value
    groups: list[dict[str, Any]] = []
    for name, mine in settings.items():
        same = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == mine), None)
        if same is None:
            groups.append({**mine, "params": [name]})
        else:
            same["params"].append(name)
    return groups


def _schedule(flat: Mapping[str, Any], before: str) -> dict[str, Any] | None:
    for name in _SCHEDULES:
        found = _below(flat, f"{before}{name}.")
        if found:
            return _nested(found)
    return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        at = nested
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return nested


def write_dcp(state: TrainingState, folder: Path) -> None:
    """Write the folders `pytorch_model_fsdp_0` and `optimizer_0`, which FSDP1 and FSDP2 load at any world size."""
    optimizer = {"state": state.optimizer, "param_groups": state.groups}
    for name, content in ((MODEL_FOLDER, {"model": state.entries()}), (OPTIMIZER_FOLDER, {"optimizer": optimizer})):
        (folder / name).mkdir()
        save_into(folder / name, content, alone=True)
