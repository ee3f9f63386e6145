"""Reading a DeepSpeed checkpoint from disk, for any stage and number of ranks."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import ParameterNames, TrainingState, name_groups, read_names, split_objects
from robust_dist.checkpoint.zero_files import (
    TAG,
    ZeroLayout,
    join_group,
    kind_of,
    load,
    model_file,
    optimizer_file,
    same_memory,
    tag_folder,
    undo_round_robin,
)
from robust_dist.optim.state import EXP_AVG, EXP_AVG_SQ, MOMENTS, STEP, Z

_OURS = ("rectify_threshold", "eps_placement", "accumulate_eps")
_COUNTS = ("global_steps", "global_samples", "skipped_steps")
# What DeepSpeed itself writes into a model file; everything else is the caller's client_state.
_ENGINE_KEYS = {
    *("module", "buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "universal_checkpoint_info"),
    *("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "ds_config", "ds_version"),
    *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", *_COUNTS),
}


@dataclass(frozen=True)
class _Shard:
    """The contents of one rank's optimizer file.

    Attributes:
        path: The file.
        fp32: The flat masters, one per flat group (a param group, or a sub-group of stage 3).
        states: The state of each flat group, by number.
        groups: The param groups, with numbers of flat groups in "params".
        gaps: Padding after each parameter of each flat group; empty if there is none.
        stage: 1, 2 or 3.
    """

    path: Path
    fp32: list[Tensor]
    states: dict[int, dict[str, Any]]
    groups: list[dict[str, Any]]
    gaps: list[list[int]]
    stage: int


def read_zero(path: Path) -> TrainingState:
    """A DeepSpeed checkpoint of ZeRO stage 0, 1, 2 or 3 as an engine-independent state.

    DeepSpeed need not be installed. Parameters are the float32 masters. `extra` holds what a DeepSpeed writer needs:
    "zero" (the JSON settings that determine the layout, and the step counts), "buffers", "frozen", "shared" (for each
    name without state of its own, the parameter it is) and "client_state".

    Args:
        path: A folder with `latest`, a tag's folder, or an Accelerate `save_state` folder.

    Raises:
        CheckpointError: A rank's file is missing, torn, or from another save; the optimizer is not RAdaBeliefW; the
            model was split other than over data-parallel ranks; or stage 0's parameters cannot be named.
    """
    folder, file, partitioned, content = _opened(path)
    content["module"], objects = split_objects(content["module"])
    if content["param_shapes"] is None:
        state = _read_stage0(path, folder, file, content)
    else:
        state = _read_partitioned(folder, file, content, partitioned)
    beside = folder.parent / "scheduler.bin"
    state.schedule = content["lr_scheduler"] or (load(beside) if folder.name == TAG and beside.is_file() else None)
    state.extra = _extra(content, state) | state.extra | ({"objects": objects} if objects else {})
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's entries used by the forward pass, in a folder that `read_zero` accepts, for any optimizer.

    For stages 0 to 2 they have the training dtype; for stage 3, parameters are the float32 masters.
    """
    folder, _, partitioned, content = _opened(path)
    model, _ = split_objects(content["module"])
    if not partitioned:
        return model
    world_size, shapes = content["dp_world_size"], content["param_shapes"]
    shards = _read_shards(folder, world_size, any_optimizer=True)
    whole = _frozen(folder, world_size, content)
    for number, group in enumerate(shapes):
        whole |= _join([shard.fp32[number] for shard in shards], shards, number, group)
    return model | _with_shared(whole, content)


def _opened(path: Path) -> tuple[Path, Path, bool, dict[str, Any]]:
    """A checkpoint's folder, its first model file, whether that holds a partition, and its contents."""
    folder = tag_folder(path)
    if folder is None:
        raise CheckpointError(
            f"{path}: not a DeepSpeed checkpoint: no *_model_states.pt in it, in {TAG}/ or by `latest`"
        )
    file, partitioned = _first_model_file(folder)
    content = load(file)
    _check_model_file(file, content)
    return folder, file, partitioned, content


def _with_shared(whole: dict[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
    shared = content["shared_params"] or {}
    return whole | {alias: whole[name] for alias, name in shared.items() if name in whole}


def _first_model_file(folder: Path) -> tuple[Path, bool]:
    whole, partitioned = folder / model_file(0, 0), folder / model_file(0, 3)
    if whole.exists() and partitioned.exists():
        raise CheckpointError(f"{folder}: has {whole.name} (stage 0 to 2) and {partitioned.name} (stage 3); keep one")
    if (folder / "zero").is_dir() and not any(folder.glob("*_optim_states.pt")):
        raise CheckpointError(f"{folder}: a universal checkpoint; use the checkpoint it was made from")
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        return partitioned, True
    return whole, False


def _check_model_file(file: Path, content: Any) -> None:
    if not isinstance(content, dict) or "dp_world_size" not in content or "param_shapes" not in content:
        raise CheckpointError(f"{file}: not a DeepSpeed model file (no dp_world_size, no param_shapes)")
    if content["mp_world_size"] != 1:
        raise CheckpointError(f"{file}: mp_world_size {content['mp_world_size']}; only data-parallel runs are read")
    if content["module"] is None or "num_experts" in content:
        raise CheckpointError(f"{file}: from a pipeline or with experts; only data-parallel runs are read")
    if content["param_shapes"] is None and content["optimizer"] is None:
        raise CheckpointError(f"{file}: has no optimizer state")


def _extra(content: Mapping[str, Any], state: TrainingState) -> dict[str, Any]:
    owned = {name for group in state.groups for name in group["params"]}
    shared = same_memory(content["module"], owned) if content["shared_params"] is None else content["shared_params"]
    buffers = [name for name in content["buffer_names"] if name in state.model]
    others = owned.union(shared, buffers)
    return {
        "zero": asdict(ZeroLayout.of(content["ds_config"])) | {k: content[k] for k in _COUNTS if k in content},
        "buffers": buffers,
        "shared": dict(shared),
        "frozen": [name for name in state.model if name not in others],
        "client_state": _plain({key: value for key, value in content.items() if key not in _ENGINE_KEYS}),
    }


def _plain(client_state: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in client_state.items():
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            warnings.warn(f"client_state {key!r} is not a JSON value and is not carried over", stacklevel=3)
    return kept


def check_optimizer(file: Path, groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]]) -> None:
    """Reject another optimizer's state; AdamW's has the same keys, but its groups have other settings."""
    wanted = (STEP, EXP_AVG, EXP_AVG_SQ)
    keys = next(({k for k in wanted if k not in state} and sorted(state) for state in states.values() if state), None)
    lacking = next(([k for k in _OURS if k not in group] for group in groups), [])
    if keys or lacking:
        has = f"state has {keys}, not {list(wanted)}" if keys else f"groups have no {', '.join(lacking)}"
        settings = ", ".join(key for key in groups[0] if key != "params") if groups else "none"
        raise CheckpointError(f"{file}: not from RAdaBeliefW: its {has}; its settings are {settings}")


def _read_shard(file: Path, world_size: int, any_optimizer: bool) -> _Shard:
    held = load(file)
    try:
        held = held["optimizer_state_dict"]
        third = "fp32_flat_groups" in held
        base = held["optimizer_state_dict" if third else "base_optimizer_state"]
        fp32 = held["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
        counts = held["partition_count"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a ZeRO 1, 2 or 3 optimizer file ({error} is missing)") from None
    if isinstance(base, list):
        raise CheckpointError(f"{file}: saved with elastic_checkpoint, which omits the groups' settings")
    if any(count != world_size for count in (counts if isinstance(counts, list) else [counts])):
        raise CheckpointError(f"{file}: partition_count {counts} is not the number of ranks, {world_size}")
    if not any_optimizer:
        check_optimizer(file, base["param_groups"], base["state"])
    gaps = held.get("param_alignment_paddings") or [[] for _ in fp32]
    return _Shard(file, fp32, base["state"], base["param_groups"], gaps, int(held.get("zero_stage", 1)))


def _read_shards(folder: Path, world_size: int, *, any_optimizer: bool = False) -> list[_Shard]:
    bf16 = any(folder.glob(optimizer_file(0, True).replace("_0_", "_*_", 1)))
    shards = [_read_shard(folder / optimizer_file(rank, bf16), world_size, any_optimizer) for rank in range(world_size)]
    first = shards[0]
    for shard in shards[1:]:
        if (shard.groups, len(shard.fp32), shard.stage) != (first.groups, len(first.fp32), first.stage):
            raise CheckpointError(f"{shard.path}: its groups or stage differ from {first.path.name}: another save")
    return shards


def _read_partitioned(folder: Path, file: Path, content: Mapping[str, Any], partitioned: bool) -> TrainingState:
    world_size = content["dp_world_size"]
    shards = _read_shards(folder, world_size)
    shapes: list[dict[str, torch.Size]] = content["param_shapes"]
    if len(shapes) != len(shards[0].fp32) or (shards[0].stage == 3) != partitioned:
        raise CheckpointError(f"{shards[0].path}: its stage or groups differ from {file.name}: another save")
    masters, optimizer = _assemble(shards, shapes)
    whole = masters | (_frozen(folder, world_size, content) if partitioned else {})
    whole = _with_shared(whole, content)
    model = {name: whole.get(name, tensor) for name, tensor in content["module"].items()}
    groups = _groups(shards[0], shapes, world_size, ZeroLayout.of(content["ds_config"]))
    return TrainingState(model, optimizer, groups, engine=kind_of(shards[0].stage), world_size=world_size)


def _assemble(
    shards: list[_Shard], shapes: list[dict[str, torch.Size]]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    masters: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for number, group in enumerate(shapes):
        masters |= _join([shard.fp32[number] for shard in shards], shards, number, group)
        states = [shard.states.get(number) or {} for shard in shards]
        for shard, state in zip(shards, states, strict=True):
            if bool(state) != bool(states[0]) or state.get(STEP) != states[0].get(STEP):
                raise CheckpointError(f"{shard.path}: not at the step of {shards[0].path.name}: another save")
        if states[0]:
            keys = [*MOMENTS, Z] if any(Z in state for state in states) else MOMENTS
            moments = {key: _join([state[key] for state in states], shards, number, group) for key in keys}
            step = torch.as_tensor(states[0][STEP], dtype=torch.float32).reshape(())
            optimizer |= {name: {STEP: step.clone()} | {k: moments[k][name] for k in keys} for name in group}
    return masters, optimizer


def _join(
    parts: list[Tensor], shards: list[_Shard], number: int, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    flat = [part.detach().reshape(-1) for part in parts]
    try:
        whole = join_group(flat, list(shapes.values()), shards[0].stage, shards[0].gaps[number])
    except ValueError as error:
        raise CheckpointError(
            f"{shards[0].path.parent}: {error} for group {number}; offloaded to NVMe, or MiCS?"
        ) from None
    return dict(zip(shapes, whole, strict=True))


def _frozen(folder: Path, world_size: int, content: Mapping[str, Any]) -> dict[str, Tensor]:
    shapes = content["frozen_param_shapes"] or {}
    if not shapes:
        return {}
    ranks = [load(folder / model_file(rank, 3))["frozen_param_fragments"] for rank in range(world_size)]
    return {name: join_group([rank[name] for rank in ranks], [shape], 3)[0] for name, shape in shapes.items()}


def _groups(
    shard: _Shard, shapes: list[dict[str, torch.Size]], world_size: int, layout: ZeroLayout
) -> list[dict[str, Any]]:
    groups = []
    for group in shard.groups:
        names = [name for number in group["params"] for name in shapes[number]]
        if shard.stage < 3 and layout.round_robin_gradients:
            names = undo_round_robin(names, world_size)
        groups.append({**group, "params": names})
    return groups


def _read_stage0(path: Path, folder: Path, file: Path, content: Mapping[str, Any]) -> TrainingState:
    held = content["optimizer"]
    mixed = "fp32_groups" in held
    base = held["optimizer_state_dict"] if mixed else held
    if not isinstance(base, dict) or "param_groups" not in base:
        raise CheckpointError(f"{file}: its optimizer is wrapped in an unsupported way ({', '.join(held)})")
    check_optimizer(file, base["param_groups"], base["state"])
    noted = next(filter(None, map(read_names, dict.fromkeys((path, folder, folder.parent)))), None)
    names = _stage0_names(file, base, content, noted)
    module = dict(content["module"])
    if mixed:
        masters = [master.detach() for group in held["fp32_groups"] for master in group]
        module |= dict(zip((name for group in names for name in group), masters, strict=True))
        shared = same_memory(content["module"], {name for group in names for name in group})
        module |= {alias: module[name] for alias, name in shared.items()}
    groups = [{**group, "params": list(given)} for group, given in zip(base["param_groups"], names, strict=True)]
    numbered = zip(base["param_groups"], names, strict=True)
    pairs = [pair for group, given in numbered for pair in zip(group["params"], given, strict=True)]
    optimizer = {name: dict(base["state"][number]) for number, name in pairs if base["state"].get(number)}
    extra = noted.extra() if noted else {}
    return TrainingState(module, optimizer, groups, engine=kind_of(0), world_size=content["dp_world_size"], extra=extra)


def _stage0_names(
    file: Path, base: Mapping[str, Any], content: Mapping[str, Any], noted: ParameterNames | None
) -> list[list[str]]:
    """Stage 0 numbers the parameters as torch does."""
    buffers = set(content["buffer_names"])
    parameters = {name: tensor for name, tensor in content["module"].items() if name not in buffers}
    shapes = {number: tuple(state[EXP_AVG].shape) for number, state in base["state"].items() if state}
    names = name_groups(base["param_groups"], shapes, parameters, noted, ordered=True, where=file)
    numbers = (number for group in base["param_groups"] for number in group["params"])
    for name, number in zip((name for group in names for name in group), numbers, strict=True):
        if name not in parameters or tuple(parameters[name].shape) != shapes.get(number, parameters[name].shape):
            raise CheckpointError(f"{file}: {name!r} is not a model parameter with the shape of its state")
    return names
