"""Checkpoints of whole tensors: Accelerate's DDP folder, FSDP's full state dict, a `torch.save` file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import (
    ParameterNames,
    TrainingState,
    UnnamedError,
    bare,
    bare_names,
    name_groups,
    read_names,
    split_objects,
)
from robust_dist.engines.engine import UNNOTED, UNNOTED_SHARDS
from robust_dist.optim.state import MASTER, MOMENTS, STEP, Z

OPTIMIZER_FILE = "optimizer.bin"
# Names used by Accelerate and Trainer.
OPTIMIZER_FILES = (OPTIMIZER_FILE, "optimizer.pt")
SCHEDULE_FILE = "scheduler.bin"
FULL_MODEL_FILE = "pytorch_model_fsdp.bin"
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MODEL_KEYS = ("model", "model_state_dict", "state_dict")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")
_SCHEDULE_KEYS = ("schedule", "scheduler", "lr_scheduler", "scheduler_state_dict", "lr_scheduler_state_dict")
STATE_KEYS = (STEP, *MOMENTS)


def load_file(path: Path) -> Any:
    """The contents of a `torch.save` file, on the CPU; runs no code from it.

    Raises:
        CheckpointError: It is torn, not a `torch.save` file, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: torn, or not a file of tensors and plain values ({reason})") from None


def read_weights(folder: Path, known: Iterable[str]) -> dict[str, Tensor]:
    """The model's entries in a folder that `read_folder` accepts; the optimizer file is not read."""
    full = folder / FULL_MODEL_FILE
    weights, _ = split_objects(_load_model(full if full.is_file() else _model_file(folder)))
    model, noted = bare(weights, known), read_names(folder)
    return _with_shared(model, noted)


def _with_shared(model: dict[str, Tensor], noted: ParameterNames | None) -> dict[str, Tensor]:
    """The model with the other names of shared parameters, which safetensors files omit."""
    shared = {} if noted is None else noted.shared
    return model | {alias: model[name] for alias, name in shared.items() if name in model and alias not in model}


def read_folder(folder: Path, *, number: bool = False, unwrap: bool = False) -> TrainingState:
    """The training state in an Accelerate or Trainer folder from DDP, or from FSDP with a full state dict.

    With `number`, parameters are called "#0", "#1", ... if nothing names them; `unwrap` as for `bare_names`.

    Raises:
        CheckpointError: A file is missing or torn; the optimizer's parameters have no names, or it is another
            optimizer.
    """
    full = (folder / FULL_MODEL_FILE).is_file()
    file = folder / FULL_MODEL_FILE if full else _model_file(folder)
    there = (folder / name for name in OPTIMIZER_FILES)
    path, noted = next((file for file in there if file.is_file()), folder / OPTIMIZER_FILE), read_names(folder)
    saved = load_file(path)
    weights, objects = split_objects(_load_model(file))
    model = _with_shared(bare(weights, _own_names(saved, noted), unwrap=unwrap), noted)
    ordered = "safetensors" not in file.name
    optimizer, groups = named_optimizer(saved, model, noted, ordered=ordered, where=path, number=number)
    extra = {"objects": objects} if objects else {}
    return TrainingState(model, optimizer, groups, engine=UNNOTED_SHARDS if full else UNNOTED, extra=extra)


def read_file(path: Path, *, number: bool = False, unwrap: bool = False) -> TrainingState:
    """The state in a `torch.save` file of {"model": ..., "optimizer": ..., "schedule": ...}; see `read_folder`."""
    content = load_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict with 'model' and 'optimizer'")
    model, optimizer = _first(content, _MODEL_KEYS), _first(content, _OPTIMIZER_KEYS)
    if not isinstance(model, Mapping) or not isinstance(optimizer, Mapping):
        raise CheckpointError(
            f"{path}: has the keys {sorted(map(str, content))}, and no state_dict under one of {list(_MODEL_KEYS)} and "
            f"one of {list(_OPTIMIZER_KEYS)}"
        )
    tensors, objects = split_objects(model)
    noted = read_names(path.parent)
    weights = bare(tensors, _own_names(optimizer, noted), unwrap=unwrap)
    state, groups = named_optimizer(optimizer, weights, noted, ordered=True, where=path, number=number)
    schedule = _first(content, _SCHEDULE_KEYS)
    found = TrainingState(weights, state, groups, schedule=dict(schedule) if isinstance(schedule, Mapping) else None)
    found.extra |= {"objects": objects} if objects else {}
    return found


def _own_names(optimizer: Any, noted: ParameterNames | None) -> list[str]:
    """The names of all parameters from the note, or from the optimizer itself; empty if neither has them."""
    if noted is not None:
        return [name for group in noted.groups for name in group]
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    names = [group.get("param_names") or group.get("params", ()) for group in groups or ()]
    found = [name for group in names for name in group]
    return bare_names(found) if all(isinstance(name, str) for name in found) else []


def _first(content: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((content[key] for key in keys if key in content), None)


def _model_file(folder: Path) -> Path:
    found = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    if [path.name for path in found] == [MODEL_FILES[0], MODEL_FILES[2]]:
        # `write_ddp` leaves both; Accelerate also takes the first.
        return found[0]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: holds {[path.name for path in found] or 'no model file'}; expected one of {list(MODEL_FILES)}"
        )
    return found[0]


def _load_model(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        content = _load_safetensors(path) if path.suffix == ".safetensors" else load_file(path)
        if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path}: is not a model's state_dict (names and tensors)")
        return dict(content)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: torn, or not a weight index ({error!r})") from None
    model: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        model.update(_load_model(path.parent / name))
    return model


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        return load_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: missing or torn ({error})") from None


def named_optimizer(
    saved: Any,
    model: Mapping[str, Tensor],
    noted: ParameterNames | None,
    *,
    ordered: bool,
    where: Path,
    number: bool = False,
) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """An optimizer's `state_dict`, keyed by numbers or (FSDP) names, as (state by name, groups with names in "params").

    The arguments are those of `name_groups` and `read_folder`.

    Raises:
        CheckpointError: It is not an optimizer state_dict with step, exp_avg and exp_avg_sq, or nothing names its
            parameters.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("param_groups"), list) or "state" not in saved:
        raise CheckpointError(f"{where}: has no optimizer state_dict ('state' and 'param_groups')")
    state, groups = saved["state"], saved["param_groups"]
    check_keys(state, where)
    names = _names_by_key(state, groups, model, noted, ordered=ordered, where=where, number=number)
    unknown = [key for key in state if key not in names]
    if unknown:
        raise CheckpointError(f"{where}: has state for {unknown[:5]}, which are in no param group")
    named = [{**group, "params": [names[key] for key in group["params"]]} for group in groups]
    return {names[key]: _tensors(entry) for key, entry in state.items()}, named


def _names_by_key(
    state: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    model: Mapping[str, Tensor],
    noted: ParameterNames | None,
    *,
    ordered: bool,
    where: Path,
    number: bool,
) -> dict[Any, str]:
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        return dict(zip(keys, bare_names(keys, model), strict=True))
    shapes = {key: tuple(entry["exp_avg"].shape) for key, entry in state.items()}
    try:
        found = name_groups(groups, shapes, model, noted, ordered=ordered, where=where)
    except UnnamedError:
        if not number:
            raise
        return {key: f"#{key}" for key in keys}
    return dict(zip(keys, (name for group in found for name in group), strict=True))


def _tensors(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float32) for k, v in entry.items()}


def check_keys(state: Mapping[Any, Mapping[str, Any]], where: Path) -> None:
    """Reject state from optimizers other than RAdaBeliefW (with or without averaging) and AdamW, naming its keys."""
    for name, entry in state.items():
        if set(entry) - {Z} != set(STATE_KEYS):
            raise CheckpointError(
                f"{where}: the state of parameter {name!r} has {sorted(entry)}, expected {sorted(STATE_KEYS)}: "
                f"{_why_refused(entry)}"
            )


def _why_refused(entry: Mapping[str, Any]) -> str:
    if set(entry) == {*STATE_KEYS, MASTER}:
        return "a run with master_weights=True cannot be converted; its engine loads it at any world size"
    hint = "; robust_dist.optim.convert converts timm's and adabelief-pytorch's" if "exp_avg_var" in entry else ""
    return f"it is from another optimizer{hint}"


def _further_names(state: TrainingState) -> dict[str, str]:
    """The first name of a shared tensor for each of its other names.

    Shared tensors are recognised by memory; or, if a sharded checkpoint stores each copy separately, by a trained
    parameter's bits under a name that the optimizer does not know.
    """
    trained = {name for name, entry in state.optimizer.items() if float(entry[STEP]) > 0}
    known = {name for group in state.groups for name in group["params"]} | {*state.extra.get("frozen", ())}
    known |= {*state.extra.get("buffers", ())}
    found: dict[str, str] = {}
    by_memory: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in state.model.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        same = by_memory.setdefault(place, name) if tensor.numel() else name
        if same == name and name not in known:
            same = next((other for other in trained if _has_bits_of(tensor, state.model[other])), name)
        if same != name:
            found[name] = same
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors requires; slices of one flat tensor do share it."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        copy = memory in seen or not tensor.is_contiguous()
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
        seen.add(memory)
    return found


def _has_bits_of(tensor: Tensor, other: Tensor) -> bool:
    if tensor.dtype != other.dtype or tensor.shape != other.shape or tensor.numel() < 2:
        return False
    # Equal constants, such as zero biases, prove nothing.
    return torch.equal(tensor, other) and not torch.equal(other, other.flatten()[:1].expand_as(other))


def write_ddp(state: TrainingState, folder: Path) -> None:
    """Write `model.safetensors` and `optimizer.bin` as Accelerate does under DDP; and `pytorch_model.bin`.

    Accelerate rejects a `model.safetensors` with both names of a shared parameter, so the other names go into
    `state.extra["shared"]`, which is recorded beside it. With extra state that is not a tensor, only
    `pytorch_model.bin` is written.
    """
    shared = dict(state.extra.get("shared") or {}) | _further_names(state)
    state.extra["shared"] = shared
    entries = state.entries()
    _write_safetensors({name: value for name, value in entries.items() if name not in shared}, folder / MODEL_FILES[0])
    torch.save(entries, folder / MODEL_FILES[2])
    numbers: dict[str, int] = {}
    for group in state.groups:
        for name in group["params"]:
            numbers[name] = len(numbers)
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state.groups]
    saved = {"state": {numbers[name]: entry for name, entry in state.optimizer.items()}, "param_groups": groups}
    torch.save(saved, folder / OPTIMIZER_FILE)


def _write_safetensors(entries: Mapping[str, Any], file: Path) -> None:
    """Write the file unless it cannot hold an entry; Accelerate then uses `pytorch_model.bin`."""
    from safetensors.torch import save_file

    if not all(isinstance(value, Tensor) for value in entries.values()):
        return
    try:
        save_file(_apart(entries), file, metadata={"format": "pt"})
    except KeyError:
        # A dtype that safetensors lacks, such as complex128.
        file.unlink(missing_ok=True)


def write_full(state: TrainingState, folder: Path) -> None:
    """Write `pytorch_model_fsdp.bin` and `optimizer.bin` as Accelerate does under FSDP with FULL_STATE_DICT."""
    torch.save(state.entries(), folder / FULL_MODEL_FILE)
    torch.save({"state": state.optimizer, "param_groups": state.groups}, folder / OPTIMIZER_FILE)
