"""Whether a DeepSpeed checkpoint is one that an engine can go on from, asked before any rank loads it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import DEFAULTS
from robust_dist.schedule.unwrap import base_optimizer

LATEST = ("latest", "latest_universal")
_UNIVERSAL_STATE = ("fp32", "exp_avg", "exp_avg_sq")


class CheckpointMismatchError(RuntimeError):
    """The checkpoint is torn, or of another run than this; the message lists what each rank found."""


def check_checkpoint(engine: Any, folder: str | Path, tag: str | None = None) -> None:
    """Check, on every rank, that `engine.load_checkpoint(folder, tag)` will find what it needs.

    After `register()` every `load_checkpoint` of a RAdaBeliefW's engine begins with this, unless it loads a part, or
    there is no checkpoint at all, where DeepSpeed warns and starts anew. DeepSpeed alone takes another optimizer's
    state without a word, and ranks part or hang where the file of one is torn. Every rank reads the files that it will
    load, tensors left on the disk, and all raise if one of them would; this is one collective.

    Args:
        engine: What `deepspeed.initialize` returned, with RAdaBeliefW; no pipeline, expert or tensor parallelism.
        folder: What will be given to `load_checkpoint`.
        tag: The same; None: what `latest` (for a universal checkpoint, `latest_universal`) names.

    Raises:
        CheckpointMismatchError: On every rank, if any finds no checkpoint, a torn one, or one of another model, another
            optimizer, other param groups, another kind of ZeRO, or, unless it is universal, another number of ranks.
    """
    found = _first(_findings(engine, Path(folder), tag))
    everyone: list[str | None] = [found]
    if dist.is_available() and dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    if any(everyone):
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        raise CheckpointMismatchError("\n".join(lines))


def can_check(engine: Any) -> bool:
    """Whether `check_checkpoint` knows this engine's files: RAdaBeliefW, data parallelism alone, torch's format."""
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
        # DeepSpeed's own objects are in the file; it will load it in the same way.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise _UnreadableError(f"{path} is torn ({type(error).__name__}: {reason}); take the one before") from error


def _findings(engine: Any, folder: Path, tag: str | None) -> Iterator[str]:
    universal, stage = bool(engine.load_universal_checkpoint()), int(engine.zero_optimization_stage())
    path = _folder_of(folder, tag, universal)
    rank = dist.get_rank() if stage == 3 and not universal else 0
    name = "mp_rank_00_model_states.pt"
    model = _read(path / (f"zero_pp_rank_{rank}_{name}" if stage == 3 else name))
    yield from _of_another_world(engine, model, path, universal, stage)
    yield from _of_another_model(engine, model, stage, path)
    if universal:
        yield from _lacking(engine, path / "zero")
    yield from _of_another_optimizer(engine, _groups(engine, model, path, universal, stage), path)


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
    if stage == 3:
        saved = {name: tuple(shape) for group in model.get("param_shapes", []) for name, shape in group.items()}
        mine = {name: tuple(p.ds_shape) for name, p in engine.module.named_parameters() if p.requires_grad}
    else:
        saved = {name: tuple(value.shape) for name, value in model["module"].items()}
        # A save may have left frozen parameters out.
        frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad} - saved.keys()
        mine = {name: tuple(value.shape) for name, value in engine.module.state_dict().items() if name not in frozen}
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            has, lacks = f"has {name} {saved.get(name)}", f"has no {name}"
            wanted = f"has it as {mine.get(name)}" if name in mine else "has none"
            yield f"{path} is of another model: it {has if name in saved else lacks}, this model {wanted}"


def _lacking(engine: Any, zero: Path) -> Iterator[str]:
    for name, param in engine.module.named_parameters():
        for key in _UNIVERSAL_STATE:
            if param.requires_grad and not (zero / name / f"{key}.pt").is_file():
                yield f"{zero / name / key}.pt is missing: the universal checkpoint is torn, or of another model"


def _groups(engine: Any, model: Any, path: Path, universal: bool, stage: int) -> Any:
    if universal:
        return _read(path / "zero" / "optimizer_state.pt").get("param_groups")
    if stage == 0:
        return _param_groups(model.get("optimizer"))
    prefixes = ("bf16_", "") if engine.bfloat16_enabled() else ("", "bf16_")
    names = [path / f"{prefix}zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt" for prefix in prefixes]
    found = next((name for name in names if name.is_file()), names[0])
    return _param_groups(_read(found).get("optimizer_state_dict"))


def _param_groups(state: Any) -> Any:
    """The groups, from under the wrappers' states."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if isinstance(state, dict) and key in state:
            state = state[key]
    return state.get("param_groups") if isinstance(state, dict) else None


def _of_another_optimizer(engine: Any, saved: Any, path: Path) -> Iterator[str]:
    groups = base_optimizer(engine.optimizer).param_groups
    if not isinstance(saved, list):
        yield f"{path} holds no optimizer's param groups, or those of another stage of ZeRO; load it at its own stage"
        return
    if len(saved) != len(groups):
        yield f"{path} has {len(saved)} param groups, the optimizer has {len(groups)}; build it with the same groups"
    for index, group in enumerate(saved):
        missing = [key for key in DEFAULTS if key not in group]
        if missing:
            yield (
                f"{path} is of another optimizer than RAdaBeliefW: its group {index} has {sorted(group)}, but no "
                f"{', '.join(missing)}; load the weights alone (load_module_only=True)"
            )


@contextlib.contextmanager
def writing_to_the_end(engine: Any) -> Iterator[None]:
    """Within it, `engine.save_checkpoint` comes to its end on a rank that cannot write; the error is raised on leaving.

    DeepSpeed's ranks meet in barriers around their writes, where the others would wait for the one that has raised.
    What is no DeepSpeed engine is left as it is.

    Args:
        engine: What `deepspeed.initialize` returned.

    Raises:
        Exception: The first one of a write that failed on this rank.
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
