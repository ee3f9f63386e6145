"""FSDP1, FSDP2, HSDP (and DDP, and one process): a check before the first step, and atomic checkpoints with DCP."""

import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_dist.checkpoint import store
from robust_dist.checkpoint.dcp import load_into, read_metadata, save_into
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.engines.accelerate import EngineError
from robust_dist.engines.fsdp.state import names_with_state, only_saved, only_stepped, set_state, state_of
from robust_dist.engines.rate import tell_copies
from robust_dist.optim.groups import clean_name, reshard
from robust_dist.optim.state import STEP
from robust_dist.ranks.talk import agree, gather, on_rank_0, raise_problems, rank, taking_part, world_size
from robust_dist.schedule import RankDisagreementError, base_optimizer

__all__ = ["check", "load", "save"]

_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()
_NAMES_SHOWN = 6


def check(model: nn.Module, optimizer: Any) -> None:
    """Check, after wrapping and before the first step, that the optimizer trains this model's parameters.

    Every trainable parameter must be in a param group, as the object in the model now: `fully_shard` and FSDP1's flat
    parameters replace the ones with which an optimizer was created, and such an optimizer steps without an error and
    trains nothing. Call it on every rank: if one fails, all raise. FSDP2's parameters are resharded, as is necessary
    after an evaluation. Under FSDP1 an optimizer with `rate_guard` gets the number of copies of each shard.

    Args:
        model: The model in the form in which it is trained.
        optimizer: The optimizer, or an engine's wrapper of it.

    Raises:
        EngineError: The optimizer has stale parameters, a parameter is in no group, several groups share flat
            parameters, or FSDP1 shards parts of the model differently and there is a `rate_guard`.
    """
    raise_problems(EngineError, _problem(model, base_optimizer(optimizer)))
    tell_copies(model, base_optimizer(optimizer))


def _problem(model: nn.Module, optimizer: Optimizer) -> str | None:
    reshard(model)
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    known_to_optimizer = set(held)
    trained = [(clean_name(name, model), param) for name, param in model.named_parameters() if param.requires_grad]
    lost = [name for name, param in trained if id(param) not in known_to_optimizer]
    known = {id(param) for param in model.parameters()}
    stale = sum(number not in known for number in held)
    if stale:
        return (
            f"the optimizer has {stale} parameters that are not the model's, and lacks {listed(lost) or 'none'}: "
            "fully_shard and FSDP replace the parameters, so create the optimizer (and its param_groups) after "
            "wrapping, from the wrapped model; accelerator.prepare(model, optimizer) does so itself"
        )
    if lost:
        return (
            f"parameters in no param group, which would never be trained: {listed(lost)}; add them to the optimizer, "
            "or set requires_grad=False on them"
        )
    flat = [name for name, _ in trained if name.rpartition(".")[2].startswith("_flat_param")]
    if flat and len(optimizer.param_groups) > 1:
        return (
            f"{len(optimizer.param_groups)} param groups over flat parameters ({listed(flat)}), which mix weights and "
            "biases; wrap with FSDP(use_orig_params=True) to have groups"
        )
    return None


def save(
    folder: str | Path, model: nn.Module, optimizer: Any, schedule: Any = None, *, async_: bool = False
) -> "Future[None] | None":
    """Write model, optimizer and schedule with torch's distributed checkpoint (DCP), atomically.

    The files are written to `.NAME.partial`, which rank 0 then renames to `folder`, replacing an older one. Any number
    of ranks under any of these engines can load them. Call it on every rank.

    Args:
        folder: Path of the checkpoint, on a file system shared by all ranks.
        model: The model in the form in which it is trained.
        optimizer: The optimizer, or an engine's wrapper of it. Parameters that were never stepped are saved without
            state. Gradients are not saved, and are kept.
        schedule: RobustSchedule, WeightDecaySwitch, or anything with a `state_dict()` of plain values; or None.
        async_: Copy the state, return at once, and write in a thread, with a separate process group, so that its
            collectives do not interfere with those of the training.

    Returns:
        With `async_`, a future whose `result()` waits and raises any error. Wait for it before the next save.

    Raises:
        EngineError: As in `check`.
        RankDisagreementError: The ranks are at different steps, or have different groups.
    """
    path, inner = Path(folder), base_optimizer(optimizer)
    check(model, inner)
    step = _agreed_step(inner, schedule)
    with only_stepped(inner):
        state = _state(model, inner, schedule)
    metadata = {**describe(state, inner), "world_size": world_size()}
    if not async_:
        _write(path, state, step, metadata, None)
        return None
    group, staged = _own_group(), _copied(state)
    executor = ThreadPoolExecutor(1, thread_name_prefix="robust_dist.save")
    writing = executor.submit(_write, path, staged, step, metadata, group)
    executor.shutdown(wait=False)
    return writing


def load(folder: str | Path, model: nn.Module, optimizer: Any, schedule: Any = None) -> None:
    """Load what `save` wrote, on any number of ranks; afterwards rate and decay are those of the saved step.

    The folder's metadata is compared first, and nothing is changed if it does not match. Call it on every rank: if one
    fails, all raise. State is restored for exactly the parameters that had state, including frozen ones; gradients are
    kept.

    Args:
        folder: The checkpoint.
        model: The model, wrapped for training.
        optimizer: The optimizer, or an engine's wrapper of it, with the groups of the checkpoint.
        schedule: The counterpart of the saved `schedule`, created for this optimizer; or None.

    Raises:
        EngineError: As in `check`.
        CheckpointError: The folder is incomplete, or of another model, optimizer or groups; lists the differences.
    """
    path, inner = Path(folder), base_optimizer(optimizer)
    check(model, inner)
    _on_rank_0(lambda: store.recover(store.partial_of(path), path), None)
    saved = _checked_metadata(path)
    keys = read_metadata(path).state_dict_metadata
    with only_saved(model, inner, names_with_state(keys)):
        state = _state(model, inner, schedule)
        found = misfits(saved, describe(state, inner))
        raise_problems(CheckpointError, f"{path}: " + "\n  ".join(found) if found else None)
        _leave_out_news(state, keys)
        load_into(path, state)
        set_state(model, inner, state)
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])


def _state(model: nn.Module, optimizer: Optimizer, schedule: Any) -> dict[str, Any]:
    state = state_of(model, optimizer)
    return state if schedule is None else {**state, "schedule": schedule.state_dict()}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part) for part in value]
    # FSDP1 creates new ShardedTensors for each state dict, so they are already copies.
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        return value.detach().cpu() if value.device.type != "cpu" else value.detach().clone()
    return value


def _own_group() -> dist.ProcessGroup | None:
    if not taking_part(None):
        return None
    world = dist.group.WORLD
    assert world is not None
    if world not in _groups:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _groups[world] = group
    return _groups[world]


def _agreed_step(optimizer: Optimizer, schedule: Any) -> int:
    """The step of all ranks, from the schedule's count or else the optimizer's state."""
    counted = getattr(schedule, "last_epoch", getattr(schedule, "num_steps", None))
    if counted is None:
        counted = max((int(state[STEP]) for state in optimizer.state.values() if STEP in state), default=0)
    settings = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    agree(
        {"step": int(counted), "weight decay of its groups": settings},
        "the ranks are not at the same step with the same groups, so nothing was saved; call save on every rank "
        "after the same optimizer step",
        kind=RankDisagreementError,
    )
    return int(counted)


def _on_rank_0(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Call `action` on rank 0 while the others wait; its error is raised on all."""

    def explained() -> None:
        try:
            action()
        except OSError as error:
            raise OSError(f"rank 0 could not write or rename the checkpoint: {error}") from error

    on_rank_0(explained, group)


def _share(names: Iterable[str], group: dist.ProcessGroup | None) -> list[str]:
    """This rank's share of the files, so that no rank reads them all."""
    return sorted(names)[rank(group) :: world_size(group)]


def _write(
    folder: Path, state: dict[str, Any], step: int, metadata: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    partial = store.partial_of(folder)

    def begin() -> None:
        store.recover(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def complete() -> None:
        store.sign(partial, step, files, metadata)
        store.publish(partial, folder)

    _on_rank_0(begin, group)
    save_into(partial, state, group)
    files = _synced_together(partial, group)
    _on_rank_0(complete, group)


def _synced_together(partial: Path, group: dist.ProcessGroup | None) -> dict[str, list[int]]:
    """Size and CRC-32 of all files; each rank syncs its share to disk."""
    # On a shared file system a rank may see another rank's files with a delay.
    seen = gather([str(path.relative_to(partial)) for path in store.files_in(partial)], group)
    mine, problem = {}, None
    try:
        mine = store.synced(partial, _share(set().union(*seen), group))
    except OSError as error:
        problem = f"the checkpoint could not be synced to disk: {error}"
    raise_problems(OSError, problem, group)
    return {name: entry for part in gather(mine, group) for name, entry in part.items()}


def _checked_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a complete checkpoint; each rank checks its share of the files, and all raise if one fails."""
    problem, metadata = None, {}
    try:
        manifest = store.read_manifest(folder)
        metadata = manifest.metadata
        if "groups" not in metadata:
            raise CheckpointError(f"{folder} was not written by robust_dist.engines.fsdp.save")
        store.check_files(folder, manifest, _share(manifest.files, None))
    except CheckpointError as error:
        problem = str(error)
    raise_problems(CheckpointError, problem)
    return metadata


def _leave_out_news(state: dict[str, Any], keys: Iterable[str]) -> None:
    """Drop keys of the schedule's state that an older version did not write, which DCP would report as missing."""
    written = {".".join(key.split(".")[:2]) for key in keys}
    if "schedule" in state:
        state["schedule"] = {key: value for key, value in state["schedule"].items() if f"schedule.{key}" in written}


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of others."""
    found = sorted(names)
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    return ", ".join(found[:_NAMES_SHOWN]) + more


def describe(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Names, shapes, state keys and groups of a state_dict, in JSON types.

    `state` has "model" and "optimizer" from torch's `get_state_dict`, and "schedule" if there is one.
    """
    keys = {key for entry in state["optimizer"]["state"].values() for key in entry}
    groups = state["optimizer"]["param_groups"]
    return {
        "model": {name: list(value.size()) for name, value in state["model"].items() if hasattr(value, "size")},
        "optimizer": type(optimizer).__name__,
        "state": sorted(keys),
        "groups": [sorted(group["params"]) for group in groups],
        # Base values in the groups belong to the scheduler that wrote them.
        "settings": [sorted(k for k in group if k != "params" and not k.startswith("initial_")) for group in groups],
        "schedule": "schedule" in state,
    }


def misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The reasons why a checkpoint described by `saved` does not match `present`; empty if it does."""
    return [*_model_misfits(saved["model"], present["model"]), *_optimizer_misfits(saved, present)]


def _model_misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    if missing := present.keys() - saved.keys():
        lines.append(f"the checkpoint is of another model: it lacks {listed(missing)}")
    if unexpected := saved.keys() - present.keys():
        lines.append(f"the checkpoint is of another model: this one lacks {listed(unexpected)}")
    common = sorted(saved.keys() & present.keys())
    other = [f"{n} {saved[n]} there, {present[n]} here" for n in common if saved[n] != present[n]]
    if other:
        lines.append(f"the checkpoint is of another model, with other shapes: {listed(other)}")
    return lines


def _optimizer_misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    # A checkpoint from before the first step has no state to compare.
    other_state = saved["state"] and saved["state"] != present["state"]
    if saved["optimizer"] != present["optimizer"] or other_state:
        lines.append(
            f"the checkpoint is of another optimizer: {_class_and_state(saved)}, this is {_class_and_state(present)}"
        )
    if len(saved["groups"]) != len(present["groups"]):
        lines.append(
            f"the checkpoint has {len(saved['groups'])} param groups, this optimizer has {len(present['groups'])}; "
            "build the optimizer with the checkpoint's groups"
        )
        return lines
    for index, (there, here) in enumerate(zip(saved["groups"], present["groups"], strict=True)):
        if moved := set(there) ^ set(here):
            lines.append(f"param group {index} has other parameters than in the checkpoint: {listed(moved)}")
    for index, (there, here) in enumerate(zip(saved["settings"], present["settings"], strict=True)):
        if other := set(there) ^ set(here):
            lines.append(f"param group {index} has other settings than in the checkpoint: {listed(other)}")
    if present["schedule"] and not saved["schedule"]:
        lines.append("the checkpoint has no schedule: it was saved with schedule=None")
    return lines


def _class_and_state(described: Mapping[str, Any]) -> str:
    state = described["state"]
    return f"{described['optimizer']} with state {state}" if state else str(described["optimizer"])
