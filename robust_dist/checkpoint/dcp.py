"""Checkpoints of shards: folders of `torch.distributed.checkpoint`, as FSDP1 and FSDP2 write them."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from robust_dist.checkpoint import dcp_metadata
from robust_dist.checkpoint.dcp_metadata import METADATA, plain_failures, plain_reading
from robust_dist.checkpoint.names import bare, bare_names
from robust_dist.checkpoint.plain import check_keys
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import TrainingState

MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"
_OPTIMIZER = re.compile(r"^(?P<before>(?:[^.]+\.)?)(?P<name>optimizer|optim)\.(?:state|param_groups)\.")
_GROUP_KEY = re.compile(r"(\d+)\.([^.]+)")
_EXTRA_STATE = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)")
_SCHEDULES = ("lr_scheduler", "scheduler", "schedule")


class _PlainPlanner(DefaultLoadPlanner):
    """Reads values that are no tensors without running code of the file, which torch's own planner would run."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        key = read_item.dest_index.fqn
        self.state_dict[key] = torch.load(value, map_location="cpu", weights_only=True)


def read_metadata(folder: Path) -> Metadata:
    """What a DCP folder says it holds, after every file that it names was found there in full.

    Raises:
        CheckpointError: No `.metadata`, an unreadable one, or a file that is missing or short.
    """
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{folder / METADATA}: is missing: the folder was not written to its end")
    metadata = dcp_metadata.read_metadata(folder)
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < end:
            raise CheckpointError(f"{path}: missing or short (wanted {end} bytes)")
    return metadata


def load_flat(folder: Path) -> dict[str, Any]:
    """Every value of a DCP folder by its flat key, whole and on the CPU.

    Raises:
        CheckpointError: As `read_metadata`, or a file whose content is damaged.
    """
    flat: dict[str, Any] = {}
    entries = read_metadata(folder).state_dict_metadata
    planner = _PlainPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        for key, entry in entries.items():
            flat[key] = None
            if isinstance(entry, TensorStorageMetadata):
                flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with plain_reading(), plain_failures(folder):
            _alone(load, flat, storage_reader=FileSystemReader(folder), planner=planner)
    except Exception as error:
        raise CheckpointError(f"{folder}: could not be read: torn, or not of plain values ({error})") from None
    return flat


def _alone(function: Callable[..., Any], content: dict[str, Any], **how: Any) -> None:
    """Call DCP's `load` or `save` for this process alone, whatever ranks there are."""
    if "no_dist" not in inspect.signature(function).parameters:
        # In torch 2.6 only the deprecated functions leave the other ranks out.
        old: dict[Any, Any] = {load: state_dict_loader.load_state_dict, save: state_dict_saver.save_state_dict}
        function = old[function]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*_state_dict` is deprecated")
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)|TypedStorage")
        function(content, no_dist=True, **how)


def ranks_of(folder: Path) -> int:
    """How many ranks wrote a DCP folder; its files are named after them."""
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
        model, optimizer, groups, _schedule(flat, before), engine="fsdp", world_size=ranks, extra=extra
    )


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
        _alone(save, content, storage_writer=FileSystemWriter(folder / name))
