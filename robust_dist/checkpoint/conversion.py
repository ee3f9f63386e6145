"""Converting a checkpoint between engines and world sizes."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint import layout as layouts
from robust_dist.checkpoint import plain, zero_read
from robust_dist.checkpoint.layout import Layout, find_layout
from robust_dist.checkpoint.plain import SCHEDULE_FILE, check_keys, load_file, read_file, read_folder
from robust_dist.checkpoint.store import MANIFEST, CheckpointError, CheckpointStore, verify
from robust_dist.checkpoint.training_state import WRAPPED, ParameterNames, TrainingState, read_names, write_names
from robust_dist.engines.engine import Engine, engine_named, kinds
from robust_dist.validate import whole_number

FORMS = ("accelerate", "trainer")
_CARRIED = ("custom_checkpoint_*.pkl", "scaler.pt", "sampler*.bin", "dl_state_dict*.bin")
_ACCELERATE = (layouts.DDP, layouts.FSDP_FULL, layouts.FSDP_SHARDED, layouts.ZERO)


def read(src: str | Path, *, number: bool = False, unwrap: bool = False) -> TrainingState:
    """The training state in a checkpoint of any engine, whole and on the CPU.

    Args:
        src: An Accelerate `save_state` folder (DDP, FSDP1, FSDP2, ZeRO) with or without our manifest, a Trainer
            `checkpoint-N` from any of these, ZeRO's own folder, a `torch.distributed.checkpoint` folder, or a
            `torch.save` file with "model" and "optimizer".
        number: Call DDP's parameters "#0", "#1", ... if nothing names them, instead of raising.
        unwrap: Remove the "module." prefix that DDP's wrapper added to every name in a torch.save file or a DCP folder.
            By default it is taken for the model's own, unless names beside it prove otherwise.

    Raises:
        CheckpointError: Not a checkpoint, torn, from another optimizer, or its parameters have no names.
    """
    path = Path(src)
    found = verify(path) if (path / MANIFEST).is_file() else None
    place = find_layout(path)
    if path.is_dir() and layouts.is_trainers(path):
        layouts.check_files(path, place.kind)
    state = _read(place, number, unwrap)
    if place.kind in _ACCELERATE:
        _read_beside(state, place)
    if found is not None:
        state.extra |= {"step": found.step, "metadata": found.metadata}
        state.world_size = found.metadata.get("num_processes", state.world_size)
    _check(state, path)
    return state


def read_weights(src: str | Path, known: Iterable[str] = ()) -> dict[str, Tensor]:
    """The model's entries in a folder that `read` accepts, for any optimizer, whole and on the CPU.

    `known` are the model's names, used to tell wrapper prefixes from the model's own names.

    Raises:
        CheckpointError: Not a checkpoint, or torn.
    """
    path, names = Path(src), list(known)
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; name a checkpoint folder")
    if (path / MANIFEST).is_file():
        verify(path)
    place = find_layout(path)
    if place.kind in (layouts.DDP, layouts.FSDP_FULL):
        return plain.read_weights(place.path, names)
    if place.kind == layouts.ZERO:
        return zero_read.read_weights(place.path)
    from robust_dist.checkpoint import dcp

    return dcp.read_weights(place.path / dcp.MODEL_FOLDER if place.kind == layouts.FSDP_SHARDED else place.path, names)


def _read(place: Layout, number: bool, unwrap: bool) -> TrainingState:
    if place.kind == layouts.FILE:
        return read_file(place.path, number=number, unwrap=unwrap)
    if place.kind in (layouts.DDP, layouts.FSDP_FULL):
        return read_folder(place.path, number=number, unwrap=unwrap)
    if place.kind == layouts.ZERO:
        return zero_read.read_zero(place.path)
    from robust_dist.checkpoint.dcp import MODEL_FOLDER, OPTIMIZER_FOLDER, read_dcp

    if place.kind == layouts.FSDP_SHARDED:
        return read_dcp(place.path / MODEL_FOLDER, place.path / OPTIMIZER_FOLDER)
    return read_dcp(place.path, unwrap=unwrap)


def _read_beside(state: TrainingState, place: Layout) -> None:
    """Add the schedule, the ranks and the note of names that lie beside an Accelerate folder's model and optimizer."""
    folder = place.path
    if (folder / SCHEDULE_FILE).is_file():
        state.schedule = load_file(folder / SCHEDULE_FILE)
    random_states = (*folder.glob("random_states_*.pkl"), *folder.glob(layouts.RANDOM_STATES))
    noted, ranks = read_names(folder), len(random_states)
    if noted is not None:
        state.extra = noted.extra() | state.extra
    if place.kind != layouts.ZERO:
        state.world_size = (noted.world_size if noted else None) or ranks or state.world_size
    if layouts.is_trainers(folder):
        layouts.read_beside(state, folder)


def _check(state: TrainingState, where: Path) -> None:
    check_keys(state.optimizer, where)
    listed = [name for group in state.groups for name in group["params"]]
    twice = sorted({name for name in listed if listed.count(name) > 1}) if len(set(listed)) < len(listed) else []
    if twice:
        raise CheckpointError(f"{where}: {twice[:5]} are in several param groups")
    unknown = [name for name in listed if name not in state.model and not name.startswith("#")]
    if unknown:
        raise CheckpointError(
            f"{where}: the optimizer has {unknown[:5]}, which are not in the model; it has {list(state.model)[:5]}"
        )
    for name, entry in state.optimizer.items():
        shape = state.model[name].shape if name in state.model else entry["exp_avg"].shape
        if not entry["exp_avg"].shape == entry["exp_avg_sq"].shape == shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(shape)}, but its state {tuple(entry['exp_avg'].shape)}: the model's "
                "and the optimizer's files are from different runs, or a note of names is wrong"
            )


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    world_size: int,
    *,
    full_state_dict: bool = False,
    unwrap: bool = False,
    form: str | None = None,
) -> list[str]:
    """Write a checkpoint as the Accelerate or Trainer folder of another engine, completely or not at all.

    A Trainer folder becomes a Trainer folder: `trainer.train(resume_from_checkpoint=dst)` resumes from it. Otherwise
    `accelerator.load_state(dst)`, `engine.load_checkpoint(dst, tag="pytorch_model")` or `torch.distributed.checkpoint`
    loads it. (Under FSDP use `robust_dist.checkpoint.load_state`, which fixes bugs of Accelerate's load.) Parameters,
    optimizer state, groups and schedule are preserved bit for bit.

    Args:
        src: As for `read`.
        dst: The folder to write; must not exist.
        to: "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", or the kind of an engine that was added.
        world_size: Number of ranks that will load it: shards for ZeRO; the random states kept for all.
        full_state_dict: For FSDP, write FULL_STATE_DICT instead of SHARDED_STATE_DICT.
        unwrap: As for `read`.
        form: "accelerate", "trainer", or None: same as `src`. If `src` is not a Trainer folder, "trainer" adds a
            `trainer_state.json` with only the step.

    Returns:
        Notes for the user: what could not be carried over unchanged.

    Raises:
        CheckpointError: As for `read`; or `dst` exists, `to` is not an engine, or `world_size` is below 1.
    """
    src, dst = Path(src), Path(dst)
    if to not in kinds():
        raise CheckpointError(f"to={to!r} is not one of {', '.join(kinds())}")
    engine = engine_named(to)
    try:
        whole_number("world_size", world_size, 1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    if full_state_dict and not engine.has_full_state_dict:
        raise CheckpointError(f"full_state_dict applies to FSDP only, not to={to!r}")
    if form not in (None, *FORMS):
        raise CheckpointError(f"form={form!r} is not one of {', '.join(FORMS)}")
    if dst.exists():
        raise CheckpointError(f"{dst}: already exists; name a new folder")
    state = read(src, unwrap=unwrap)
    notes = _note_on_names(src, state)
    building = dst.absolute().parent / f".{dst.name}.partial"
    shutil.rmtree(building, ignore_errors=True)
    try:
        for_trainer = form == "trainer" or (form is None and layouts.is_trainers(src))
        notes += _write(state, src, dst, building, engine, world_size, full_state_dict, for_trainer)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return notes + _notes_on_ranks(src, state, world_size)


def _write(
    state: TrainingState,
    src: Path,
    dst: Path,
    building: Path,
    engine: Engine,
    world_size: int,
    full_state_dict: bool,
    for_trainer: bool,
) -> list[str]:
    """Write everything into `building`, then rename once; the store flushes the files to disk."""
    store, step = CheckpointStore(building, keep=1), int(state.extra.get("step", 0))
    folder = store.begin(step)
    notes = engine.write(state, folder, world_size, whole=full_state_dict)
    _write_common(state, src, folder, world_size)
    if for_trainer:
        layouts.turn_into_trainers(state, src, folder, world_size)
    metadata = _metadata(state, engine.kind, world_size)
    done = store.commit(step, metadata or {}).path
    if metadata is None:
        (done / MANIFEST).unlink()
    os.rename(done, dst)
    return notes


def _write_common(state: TrainingState, src: Path, folder: Path, world_size: int) -> None:
    if state.schedule is not None:
        torch.save(state.schedule, folder / SCHEDULE_FILE)
    known = {key: state.extra[key] for key in ("shared", "buffers", "frozen") if key in state.extra}
    write_names(folder, ParameterNames([group["params"] for group in state.groups], **known, world_size=world_size))
    if src.is_dir():
        ranks = (f"random_states_{rank}.pkl" for rank in range(world_size))
        for pattern in (*ranks, *_CARRIED):
            for path in src.glob(pattern):
                shutil.copyfile(path, folder / path.name)


def _metadata(state: TrainingState, to: str, world_size: int) -> dict[str, Any] | None:
    """The run's metadata for the new ranks; None if the source had none."""
    before: dict[str, Any] | None = state.extra.get("metadata")
    if before is None:
        return None
    after = json.loads(json.dumps(before)) | {"engine": to, "num_processes": world_size}
    losses = before.get("loss_sums")
    if losses is not None and len(losses) != world_size:
        # Only the sum over ranks matters; the first rank carries it.
        after["loss_sums"] = [sum(losses)] + [0.0] * (world_size - 1)
    return after


def _note_on_names(src: Path, state: TrainingState) -> list[str]:
    """A note if the writer is unknown and all names begin with "module.", possibly added by DDP."""
    unknown = find_layout(src).kind in (layouts.FILE, layouts.DCP)
    if not (unknown and all(name.startswith(WRAPPED) for name in state.model)):
        return []
    return [f"every name begins with {WRAPPED!r}, which is kept; if DDP's wrapper added it, convert with --unwrap"]


def _notes_on_ranks(src: Path, state: TrainingState, world_size: int) -> list[str]:
    before = state.world_size
    if before is None or before == world_size:
        return []
    return [f"{src} is from {before} ranks, not {world_size}: the run continues, but its random states differ"]
