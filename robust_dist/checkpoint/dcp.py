"""`torch.distributed.checkpoint` (DCP) folders, as FSDP writes them, read without running any code in them."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from robust_dist.checkpoint.plain import check_keys
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import TrainingState, bare, bare_names
from robust_dist.engines.engine import UNNOTED_SHARDS
from robust_dist.ranks.talk import by_rank, has_group

METADATA = ".metadata"
# What torch writes into `.metadata` in any version: record classes, sizes, formats.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"
_OPTIMIZER = re.compile(r"^(?P<before>(?:[^.]+\.)?)(?P<name>optimizer|optim)\.(?:state|param_groups)\.")
_GROUP_KEY = re.compile(r"(\d+)\.([^.]+)")
_EXTRA_STATE = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)")
_SCHEDULES = ("lr_scheduler", "scheduler", "schedule")


class _Unpickler(pickle.Unpickler):
    """Accepts only torch's own checkpoint records."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib" or module.startswith("pathlib."):
            # The path it was written to; a plain path serves as well and runs nothing.
            if name in ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"):
                return PurePosixPath
        elif name in _KNOWN.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in a checkpoint and was not run")


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a DCP folder, after checking that every file it names is present in full; runs no code from it.

    Raises:
        CheckpointError: `.metadata` is missing or torn, or names anything but torch's own records or a file outside
            the folder; or a file is missing or short.
    """
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: the folder was not completely written")
    metadata = _unpickled(path)
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < end:
            raise CheckpointError(f"{file}: missing or short (wanted {end} bytes)")
    return metadata


def _unpickled(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            return _load(file)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: torn, or not from torch.distributed.checkpoint ({reason})") from None


def _load(file: BinaryIO) -> Metadata:
    metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"it contains a {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"it describes {name!r} with a {type(entry).__name__}")
    for info in (metadata.storage_data or {}).values():
        inside, numbers = PurePosixPath(info.relative_path), (info.offset, info.length)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"it names {info.relative_path}, which is outside the folder")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"it has a part of {info.relative_path} at {numbers}")
    return metadata


class _PlainReader(FileSystemReader):
    """torch's reader, minus its unpickling of `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _unpickled(Path(self.path) / METADATA)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainPlanner(DefaultLoadPlanner):
    """torch's planner, minus its unpickling of values that are not tensors."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        found = torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            value.seek(0)
            super().load_bytes(read_item, value)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def load_into(folder: Path, state: dict[str, Any], *, alone: bool = False, flatten: bool = True) -> None:
    """Fill a state dict from a DCP folder in place; runs no code from the files.

    `state` holds tensors of the right shapes, sharded or not, and values to be replaced; its keys are those in the file
    if `flatten` is false. `alone`: this process reads independently of other ranks.

    Raises:
        CheckpointError: A value is missing, damaged, or holds more than tensors and plain values.
    """
    # Flattening drops FSDP1's tensors that have no shard on this rank; DCP then mistakes the file for an old one.
    planner = _PlainPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=False)
    with torch.no_grad(), plain_failures(folder):
        _call(load, state, alone=alone, storage_reader=_PlainReader(folder), planner=planner)


def save_into(
    folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None, *, alone: bool = False
) -> None:
    """Write a state dict of tensors, sharded or not, and plain values into an empty folder, the same on every rank.

    `alone`: this process writes everything, independently of other ranks.

    Raises:
        CheckpointError: A file could not be written; an OSError if the system gave the reason.
    """
    with plain_failures(folder):
        where = {} if group is None else {"process_group": group}
        _call(save, state, alone=alone, storage_writer=FileSystemWriter(folder), **where)


def _call(function: Callable[..., Any], state: dict[str, Any], *, alone: bool, **how: Any) -> None:
    """Call DCP's `load` or `save`, if necessary without other ranks, for which torch 2.6 has no keyword."""
    if alone or not has_group():
        if "no_dist" in inspect.signature(function).parameters:
            how["no_dist"] = True
        elif alone:
            # torch 2.6 can leave out the other ranks only in its deprecated functions.
            old: dict[Any, Any] = {load: state_dict_loader.load_state_dict, save: state_dict_saver.save_state_dict}
            function, how["no_dist"] = old[function], True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*_state_dict` is deprecated")
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)|TypedStorage")
        warnings.filterwarnings("ignore", message=".*single process.*")
        function(state, **how)


@contextmanager
def plain_failures(folder: str | Path) -> Iterator[None]:
    """Turn what DCP's `save` or `load` raises, which `except Exception` does not catch, into an Exception."""
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        first = next((cause for cause in causes.values() if isinstance(cause, OSError)), None)
        if first is not None:
            raise first from None
        said = by_rank({rank: (str(cause) or type(cause).__name__).splitlines()[0] for rank, cause in causes.items()})
        raise CheckpointError(f"{folder}: " + "; ".join(said)) from None


def load_flat(folder: Path) -> dict[str, Any]:
    """Every value of a DCP folder by its flat key, whole and on the CPU."""
    flat: dict[str, Any] = {}
    entries = read_metadata(folder).state_dict_metadata
    try:
        for key, entry in entries.items():
            flat[key] = None
            if isinstance(entry, TensorStorageMetadata):
                flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        load_into(folder, flat, alone=True, flatten=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: could not be read: torn, or not plain values ({error})") from None
    return flat


def ranks_of(folder: Path) -> int:
    """The number of ranks that wrote a DCP folder, from its file names."""
    return len({path.name.split("_")[2] for path in folder.glob("__*_*.distcp")})


def read_dcp(*folders: Path, unwrap: bool = False) -> TrainingState:
    """The training state in one DCP folder, or in a model's and an optimizer's; `unwrap` as for `bare_names`.

    Raises:
        CheckpointError: A folder is torn, lacks a model or an optimizer, or has another optimizer's state.
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
            f"them; its keys include {list(flat)[:3]}"
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
        raise CheckpointError(f"{where}: has an optimizer but no model under {before + 'model.'!r}")
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
    """The model's entries in a DCP folder, whatever else it contains; `known` are the model's names."""
    flat = load_flat(folder)
    found = _below(flat, "model.") or flat
    return bare({name: value for name, value in found.items() if isinstance(value, Tensor)}, known)


def _below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _model(flat: Mapping[str, Any], before: str, optimizer: str) -> dict[str, Any]:
    """The model's entries: under "model.", or (newer torchtitan files) beside the optimizer without a prefix."""
    nested = _below(flat, before + "model.")
    if nested:
        return nested
    others = (optimizer, *(f"{before}{name}." for name in (*_SCHEDULES, "dataloader", "train_state")))
    return {key.removeprefix(before): value for key, value in flat.items() if not key.startswith(others)}


def _extra_states(entries: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """Modules' extra state by name, reassembled if DCP has split it up by `paths`."""
    found: dict[str, Any] = {}
    inner: dict[str, tuple[str | int, ...]] = {}
    for path in paths.values():
        at = next((i for i, part in enumerate(path) if _EXTRA_STATE.fullmatch(str(part))), len(path))
        inner[".".join(map(str, path[at:]))] = path[at:]
    for name, value in entries.items():
        if match := _EXTRA_STATE.match(name):
            rest = name[match.end() + 1 :]
            _put(found, inner.get(name) or (match[0], *(rest.split(".") if rest else ())), value)
    return found


def _state(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        name, _, entry = key.rpartition(".")
        state.setdefault(name, {})[entry] = value
    return state


def _groups(flat: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Groups by number; if keys carry names instead (flattened), entries with equal settings form one group."""
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
        _put(nested, key.split("."), value)
    return nested


def _put(root: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    """Put a value at a path of keys and list positions, creating what is missing on the way."""
    at: Any = root
    for key, following in zip(path, [*path[1:], None], strict=True):
        new = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(at, list):
            at.extend([None] * (int(key) + 1 - len(at)))
        there = at.get(key) if isinstance(at, dict) else at[key]
        if following is None or there is None:
            at[key] = new
        at = at[key]


def write_dcp(state: TrainingState, folder: Path) -> None:
    """Write the folders `pytorch_model_fsdp_0` and `optimizer_0`, which FSDP1 and FSDP2 load at any world size."""
    optimizer = {"state": state.optimizer, "param_groups": state.groups}
    for name, content in ((MODEL_FOLDER, {"model": state.entries()}), (OPTIMIZER_FOLDER, {"optimizer": optimizer})):
        (folder / name).mkdir()
        save_into(folder / name, content, alone=True)
