"""A check, before any rank loads it, that an engine can continue from a DeepSpeed checkpoint."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import option
from robust_dist.ranks.talk import raise_problems, rank
from robust_dist.schedule.hooks import base_optimizer

LATEST = ("latest", "latest_universal")
_UNIVERSAL_STATE = ("fp32", "exp_avg", "exp_avg_sq")
# Settings that no other optimizer has.
_OURS = ("rectify_threshold", "eps_placement", "accumulate_eps")
# A save with elastic_checkpoint omits the groups, and its load does not need them.
_UNSAVED = object()
# Entries that torch loads with any shape, or does not need.
_FREE = ("_extra_state", "num_batches_tracked")


class CheckpointMismatchError(RuntimeError):
    """The checkpoint is incomplete, or of a different run; the message gives the findings by rank."""


def check_checkpoint(engine: Any, folder: str | Path, tag: str | None = None) -> None:
    """Check, on every rank, that `engine.load_checkpoint(folder, tag)` will find what it needs.

    After `register()` every `load_checkpoint` of an engine with RAdaBeliefW starts with this, unless it loads only a
    part, or there is no checkpoint, in which case DeepSpeed warns and starts from scratch. DeepSpeed alone silently
    accepts another optimizer's state, and if one rank's file is damaged, ranks diverge or hang. Every rank reads the
    files that it will load, with tensors left on disk, and all raise if one would fail; this is one collective. Extra
    state, and models with their own load hooks, are left to the load.

    Args:
        engine: The engine from `deepspeed.initialize`, with RAdaBeliefW; no pipeline, expert or tensor parallelism.
        folder: As for `load_checkpoint`.
        tag: As for `load_checkpoint`; None reads it from `latest` (for a universal checkpoint, `latest_universal`).

    Raises:
        CheckpointMismatchError: On every rank, if any finds no checkpoint, an incomplete one, or one with another
            model, optimizer, param groups, kind of ZeRO or, unless it is universal, number of ranks.
    """
    raise_problems(CheckpointMismatchError, _first(_findings(engine, Path(folder), tag)))


def can_check(engine: Any) -> bool:
    """Whether `check_checkpoint` supports this engine: RAdaBeliefW, only data parallelism, torch's file format."""
    if getattr(engine, "mp_world_size", 1) != 1 or getattr(engine, "has_moe_layers", False):
        return False
    if type(engine).__name__ == "PipelineEngine" or engine.zero_nvme_offload_optimizer():
        return False
    writer = getattr(engine, "checkpoint_engine", None)
    if writer is not None and type(writer).__name__ != "TorchCheckpointEngine":
        return False
    try:
        return isinstance(base_optimizer(engine.optimizer), RAdaBeliefW)
    except TypeError:
        return False


def _first(findings: Iterator[str]) -> str | None:
    try:
        return next(findings, None)
    except _UnreadableError as error:
        return str(error)


class _UnreadableError(Exception):
    pass


def _read(path: Path) -> Any:
    if not path.is_file():
        raise _UnreadableError(f"{path} is missing: the checkpoint is torn, or of fewer ranks; take the one before")
    try:
        # The file contains DeepSpeed's own objects; DeepSpeed will load it in the same way.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise _UnreadableError(f"{path} is torn ({type(error).__name__}: {reason}); take the one before") from error


def _findings(engine: Any, folder: Path, tag: str | None) -> Iterator[str]:
    universal, stage = bool(engine.load_universal_checkpoint()), int(engine.zero_optimization_stage())
    path = _folder_of(folder, tag, universal)
    number = rank() if stage == 3 and not universal else 0
    name = "mp_rank_00_model_states.pt"
    model = _read(path / (f"zero_pp_rank_{number}_{name}" if stage == 3 else name))
    yield from _of_another_world(engine, model, path, universal, stage)
    if universal and stage > 0:
        yield from _lacking(engine, path / "zero")
    elif not universal:
        yield from _of_another_model(engine, model, stage, path)
    groups = _groups(engine, model, path, universal, stage)
    yield from _of_another_optimizer(engine, groups, path)
    if universal and any(option(group, "averaging") is not None for group in groups):
        yield (
            f"{path} is universal, and DeepSpeed's universal form has no place for averaging's fast weights z: "
            f"robust-dist convert SRC DST --to zero{stage} --world-size N, with SRC the checkpoint that it was made "
            'from, writes one that loads on N ranks without "load_universal"'
        )


def _folder_of(folder: Path, tag: str | None, universal: bool) -> Path:
    if tag is None:
        latest = folder / LATEST[universal]
        if not latest.is_file():
            raise _UnreadableError(f"there is no {latest}: give the tag of a checkpoint, or another folder")
        tag = latest.read_text(encoding="utf-8").strip()
    if not (folder / tag).is_dir():
        raise _UnreadableError(f"there is no checkpoint {folder / tag}")
    return folder / tag


def _of_another_world(engine: Any, model: Any, path: Path, universal: bool, stage: int) -> Iterator[str]:
    written, runs = model.get("dp_world_size"), getattr(engine, "seq_dp_world_size", engine.dp_world_size)
    if stage > 0 and not universal and written != runs:
        yield (
            f"{path} was written by {written} ranks, {runs} run; convert it with `python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {path} --output_folder {path}_universal` "
            '(stages 1 and 2: --inject_missing_state) and set "checkpoint": {"load_universal": true}'
        )


def _of_another_model(engine: Any, model: Any, stage: int, path: Path) -> Iterator[str]:
    """Differences that the load would reject or, at stage 3 with its flat partitions, would load wrongly."""
    own_way = loads_in_own_way(engine.module)
    if stage == 3:
        saved = _shapes(model.get("param_shapes") or [])
        mine = _owned_shapes(engine)
        if own_way:
            saved, mine = dict(enumerate(saved.values())), dict(enumerate(mine.values()))
    elif own_way or not isinstance(model.get("module"), Mapping):
        return
    else:
        mine = {name: _like(value) for name, value in engine.module.state_dict().items() if not _is_free(name)}
        saved = {name: _like(value, mine.get(name)) for name, value in model["module"].items() if not _is_free(name)}
        # A save may have omitted frozen parameters.
        frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
        mine = {name: shape for name, shape in mine.items() if name in saved or name not in frozen}
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            yield _other_model(path, name, saved, mine)


def _other_model(path: Path, name: Any, saved: Mapping[Any, Any], mine: Mapping[Any, Any]) -> str:
    label = f"parameter number {name}" if isinstance(name, int) else name
    has, lacks = f"has {label} {saved.get(name)}", f"has no {label}"
    wanted = f"has it as {mine.get(name)}" if name in mine else "has none"
    return f"{path} is of another model: it {has if name in saved else lacks}, this model {wanted}"


def loads_in_own_way(module: nn.Module) -> bool:
    """Whether a hook or an override changes what `load_state_dict` accepts, so that only the load can tell."""
    return any(_has_own_load(part) for part in module.modules())


def _has_own_load(module: nn.Module) -> bool:
    if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return True
    for name in ("load_state_dict", "_load_from_state_dict"):
        method = getattr(module, name)
        # Batch normalisation's own method accepts the same entries, except for `_FREE`.
        if not getattr(method, "__module__", "").startswith(("torch.nn.modules.module", "torch.nn.modules.batchnorm")):
            return True
    return False


def _is_free(name: str) -> bool:
    return name.rpartition(".")[2] in _FREE


def _shapes(groups: Iterable[Mapping[str, Any]]) -> dict[Any, Any]:
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _owned_shapes(engine: Any) -> dict[Any, Any]:
    """The shapes of the parameters in ZeRO's optimizer, by name and in its order."""
    return _shapes(engine._get_zero_param_shapes())


def _like(value: Any, wanted: Any = None) -> Any:
    """The shape of a model's entry; a tensor with one element also fits a scalar."""
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    return () if shape == (1,) and wanted == () else shape


def _lacking(engine: Any, zero: Path) -> Iterator[str]:
    """Files missing for a universal load: it reads them by name, at stages 1 and 2 only those that exist."""
    owned, stage = _owned_shapes(engine), int(engine.zero_optimization_stage())
    moments = _UNIVERSAL_STATE[1:]
    stepped = stage == 3 or any((zero / name / f"{key}.pt").is_file() for name in owned for key in moments)
    wanted = _UNIVERSAL_STATE if stepped else _UNIVERSAL_STATE[:1]
    for name, shape in sorted(owned.items()):
        missing = [key for key in wanted if not (zero / name / f"{key}.pt").is_file()]
        if missing:
            yield f"{zero / name / missing[0]}.pt is missing: the universal checkpoint is torn, or of another model"
            continue
        held = _read(zero / name / "fp32.pt")
        tensor = held.get("param") if isinstance(held, Mapping) else held
        is_padded = isinstance(held, Mapping) and held.get("vocab_tensor")
        if isinstance(tensor, torch.Tensor) and not is_padded and tensor.numel() != math.prod(shape):
            yield _other_model(zero.parent, name, {name: tuple(tensor.shape)}, {name: shape})


def _groups(engine: Any, model: Any, path: Path, universal: bool, stage: int) -> Any:
    if universal:
        return _read(path / "zero" / "optimizer_state.pt").get("param_groups")
    if stage == 0:
        return _param_groups(model.get("optimizer"))
    prefixes = ("bf16_", "") if engine.bfloat16_enabled() else ("", "bf16_")
    names = [path / f"{prefix}zero_pp_rank_{rank()}_mp_rank_00_optim_states.pt" for prefix in prefixes]
    found = next((name for name in names if name.is_file()), names[0])
    return _param_groups(_read(found).get("optimizer_state_dict"))


def _param_groups(state: Any) -> Any:
    """The param groups inside the wrappers' nested states."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if isinstance(state, dict) and key in state:
            state = state[key]
    if isinstance(state, list):
        return _UNSAVED
    return state.get("param_groups") if isinstance(state, dict) else None


def _of_another_optimizer(engine: Any, saved: Any, path: Path) -> Iterator[str]:
    groups = base_optimizer(engine.optimizer).param_groups
    if saved is _UNSAVED:
        return
    if not isinstance(saved, list):
        yield f"{path} holds no optimizer's param groups, or those of another stage of ZeRO; load it at its own stage"
        return
    if len(saved) != len(groups):
        yield f"{path} has {len(saved)} param groups, the optimizer has {len(groups)}; build it with the same groups"
    for index, group in enumerate(saved):
        if not any(key in group for key in _OURS):
            yield (
                f"{path} is of another optimizer than RAdaBeliefW: its group {index} has {sorted(group)}, but no "
                f"{', '.join(_OURS)}; load the weights alone (load_module_only=True)"
            )


@contextlib.contextmanager
def writing_to_the_end(engine: Any) -> Iterator[None]:
    """Inside, `engine.save_checkpoint` also finishes on a rank that cannot write; its first error is raised at the end.

    DeepSpeed has barriers around its writes, where the other ranks would wait for the one that has raised. Any other
    object than a DeepSpeed engine is not changed.
    """
    errors: list[Exception] = []

    def held_back(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return action(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                return None

        return call

    writer = getattr(engine, "checkpoint_engine", None)
    wanted = [] if writer is None else [(writer, name) for name in ("makedirs", "create", "save", "commit")]
    changed = [*wanted, *([(engine, "_copy_recovery_script")] if writer is not None else [])]
    for owner, name in changed:
        setattr(owner, name, held_back(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in changed:
            delattr(owner, name)
        if errors:
            raise errors[0]
