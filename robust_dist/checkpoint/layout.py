"""Recognising checkpoint layouts, and what `transformers.Trainer` adds to its folders.

A Trainer folder holds an engine's own files, some under other names, and `trainer_state.json`. Under ZeRO, Trainer
looks for a `global_step*` folder and then loads what `latest` names. Without ZeRO and FSDP it loads the optimizer
state from `optimizer.pt`, but only if `scheduler.pt` is present; otherwise it silently starts from scratch.
"""

import json
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from robust_dist.checkpoint.plain import (
    FULL_MODEL_FILE,
    MODEL_FILES,
    OPTIMIZER_FILE,
    OPTIMIZER_FILES,
    SCHEDULE_FILE,
    load_file,
)
from robust_dist.checkpoint.store import MANIFEST, CheckpointError
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.checkpoint.zero_files import LATEST, TAG, is_zero
from robust_dist.checkpoint.zero_files import ZERO as ZERO

DDP = "Accelerate folder (DDP)"
FSDP_SHARDED = "Accelerate folder (FSDP, sharded state dict)"
FSDP_FULL = "Accelerate folder (FSDP, full state dict)"
DCP = "torch.distributed.checkpoint folder"
FILE = "file of torch.save"
# Marks a Trainer folder, which is also one of the first four kinds.
TRAINER_STATE = "trainer_state.json"
KNOWN = (
    f"a folder of Accelerate's save_state ({MODEL_FILES[0]} or {MODEL_FILES[2]} with {OPTIMIZER_FILE}; "
    f"pytorch_model_fsdp_0 with optimizer_0; {FULL_MODEL_FILE}; or a {ZERO} called {TAG}), Trainer's checkpoint-N, a "
    f"{ZERO} ({LATEST}), a DCP folder (.metadata), or a torch.save file"
)
TRAINERS_OPTIMIZER = OPTIMIZER_FILES[1]
TRAINERS_SCHEDULE = "scheduler.pt"
RANDOM_STATES = "rng_state*.pth"
_SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
_WEIGHTS = (*MODEL_FILES, *_SHARDS)
# Written by an engine, this package, or Trainer (random states); everything else is the user's and is copied.
_OWN = (
    *_WEIGHTS,
    *OPTIMIZER_FILES,
    *("pytorch_model*", "optimizer_*", SCHEDULE_FILE, TRAINERS_SCHEDULE, RANDOM_STATES, "random_states_*.pkl"),
    *("global_step*", "latest*", "zero_to_fp32.py", "parameters.json", "manifest.json"),
)


@dataclass(frozen=True)
class Layout:
    """A checkpoint's kind (a constant of this module) and path, and whether a `manifest.json` vouches for it."""

    kind: str
    path: Path
    manifest: bool = False


def find_layout(path: str | Path) -> Layout:
    """The layout at `path`; nothing is loaded.

    Raises:
        CheckpointError: The path does not exist, or is not a checkpoint, several, or one with several models.
    """
    path = Path(path)
    if path.is_file():
        return Layout(FILE, path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.name.startswith(".") and path.name.endswith(".partial"):
        raise CheckpointError(f"{path}: was not completely written; name an earlier one")
    _refuse_several(path)
    kinds = kinds_in(path)
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: holds {' and '.join(kinds)}; move one of them to a folder of its own")
    if not kinds:
        raise CheckpointError(f"{path}: is not a checkpoint{_advice(path)}; looked for {KNOWN}")
    return Layout(kinds[0], path, (path / MANIFEST).is_file())


def kinds_in(path: Path) -> list[str]:
    """The kinds whose files are in a folder."""
    tests = {
        DDP: any((path / name).is_file() for name in MODEL_FILES),
        FSDP_FULL: (path / FULL_MODEL_FILE).is_file(),
        FSDP_SHARDED: (path / "pytorch_model_fsdp_0").is_dir(),
        DCP: (path / ".metadata").is_file() or any(path.glob("*.distcp")),
        ZERO: is_zero(path),
    }
    found = [kind for kind, there in tests.items() if there]
    if len(found) > 1 and tests[DDP] and _is_export(path):
        found.remove(DDP)
    return found


def _is_export(path: Path) -> bool:
    """Whether a model file is only an export of the weights, beside an engine's own files."""
    alone = not any((path / name).is_file() for name in OPTIMIZER_FILES)
    return alone or (path / TRAINER_STATE).is_file()


def _refuse_several(path: Path) -> None:
    for pattern in ("model_1.*", "pytorch_model_1*", "pytorch_model_fsdp_1*", "optimizer_1*"):
        more = next(path.glob(pattern), None)
        if more is not None:
            raise CheckpointError(f"{more}: a second model or optimizer; conversion takes folders with one of each")


def _advice(path: Path) -> str:
    """A hint if a run's folder was named instead of one of its checkpoints."""
    steps = sorted(path.glob("step-*")) or sorted(path.glob("checkpoints/step-*"))
    steps = steps or sorted(path.glob("checkpoint-*"), key=lambda step: (len(step.name), step.name))
    return f", but contains some: name one, such as {steps[-1]}" if steps else ""


def is_trainers(folder: Path) -> bool:
    """Whether Trainer wrote this folder."""
    return (folder / TRAINER_STATE).is_file()


def read_beside(state: TrainingState, folder: Path) -> None:
    """Add Trainer's step, schedule and notes to what an engine's reader found in its folder."""
    noted = _read_state(folder)
    state.extra |= {"step": noted["global_step"], "trainer": noted}
    if (folder / TRAINERS_SCHEDULE).is_file():
        state.schedule = load_file(folder / TRAINERS_SCHEDULE)


def check_files(folder: Path, kind: str) -> None:
    """Reject a folder that Trainer would load only in part; the CheckpointError names the missing file."""
    _read_state(folder)
    if kind == DDP and not any((folder / name).is_file() for name in OPTIMIZER_FILES):
        raise CheckpointError(
            f"{folder / TRAINERS_OPTIMIZER}: missing: torn, or saved with save_only_model=True, which leaves "
            "out what is needed to resume"
        )
    if kind != ZERO and not (folder / TRAINERS_SCHEDULE).is_file():
        raise CheckpointError(f"{folder / TRAINERS_SCHEDULE}: missing: Trainer would silently load only the weights")


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / TRAINER_STATE
    try:
        noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return noted | {"global_step": int(noted["global_step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: torn, or not from Trainer ({error!r})") from None


def rows(state: TrainingState, folder: Path) -> list[tuple[str, str]]:
    """Rows about a Trainer folder for a report: names and texts."""
    noted = state.extra["trainer"]
    epoch = noted.get("epoch")
    text = f"step {noted['global_step']} of {noted.get('max_steps') or 'an unknown number'}"
    text += f", epoch {epoch:.6g}" if isinstance(epoch, int | float) else ""
    kept = sorted(noted.get("stateful_callbacks") or {})
    text += f", state of {', '.join(kept)}" if kept else ""
    return [("Trainer", text), ("files", ", ".join(_files(folder)))]


def switch_state(state: TrainingState) -> dict[str, Any] | None:
    """The weight-decay switch saved by RobustTrainerCallback."""
    callbacks = (state.extra.get("trainer") or {}).get("stateful_callbacks") or {}
    saved = callbacks.get("RobustTrainerCallback")
    found: dict[str, Any] | None = saved["attributes"]["switch_state"] if isinstance(saved, dict) else None
    return found


def _files(folder: Path) -> list[str]:
    """The files and folders in it; weight shards and ranks' random states are only counted."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    shards = [name for name in names if any(fnmatch(name, pattern) for pattern in _SHARDS)]
    states = [name for name in names if fnmatch(name, RANDOM_STATES)]
    counted = [f"{len(shards)} shards of weights"] * bool(shards) + [f"rng_state of {len(states)} ranks"] * bool(states)
    return [name for name in names if name not in {*shards, *states}] + counted


def turn_into_trainers(state: TrainingState, src: Path, folder: Path, world_size: int) -> None:
    """Give a written Accelerate folder the names that Trainer looks for, and everything that lies beside `src`.

    If `src`, the source, is not a Trainer folder, the result gets a `trainer_state.json` with its step.
    """
    done = max((float(held["step"]) for held in state.optimizer.values()), default=0.0)
    step = int(state.extra.get("step") or done)
    kind = kinds_in(folder)[0]
    if kind == DDP:
        os.rename(folder / OPTIMIZER_FILES[0], folder / TRAINERS_OPTIMIZER)
        if (folder / MODEL_FILES[0]).is_file():
            # Trainer reads only one of the two.
            (folder / "pytorch_model.bin").unlink(missing_ok=True)
    if (folder / SCHEDULE_FILE).is_file():
        os.rename(folder / SCHEDULE_FILE, folder / TRAINERS_SCHEDULE)
    if kind == ZERO:
        os.rename(folder / TAG, folder / f"global_step{step}")
        (folder / LATEST).write_text(f"global_step{step}", encoding="utf-8")
    if src.is_dir() and is_trainers(src):
        _copy_beside(src, folder, with_weights=kind != DDP)
        _copy_random_states(src, folder, world_size)
    else:
        noted = {"global_step": step, "train_batch_size": 0, "stateful_callbacks": {}}
        (folder / TRAINER_STATE).write_text(json.dumps(noted), encoding="utf-8")


def _copy_beside(src: Path, folder: Path, *, with_weights: bool) -> None:
    for path in src.iterdir():
        own = any(fnmatch(path.name, pattern) for pattern in _OWN)
        weights = any(fnmatch(path.name, pattern) for pattern in _WEIGHTS)
        if (folder / path.name).exists() or (own and not (weights and with_weights)):
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _copy_random_states(src: Path, folder: Path, world_size: int) -> None:
    """Copy the files for the ranks that will load; for a single process Trainer uses another format and name."""
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    for name in names:
        if (src / name).is_file():
            shutil.copyfile(src / name, folder / name)
