"""Telling the known layouts of checkpoints apart."""

from dataclasses import dataclass
from pathlib import Path

from robust_dist.checkpoint.plain import FULL_MODEL_FILE, MODEL_FILES, OPTIMIZER_FILE, OPTIMIZER_FILES
from robust_dist.checkpoint.store import MANIFEST, CheckpointError

DDP = "Accelerate folder (DDP)"
FSDP_SHARDED = "Accelerate folder (FSDP, sharded state dict)"
FSDP_FULL = "Accelerate folder (FSDP, full state dict)"
ZERO = "DeepSpeed folder"
DCP = "torch.distributed.checkpoint folder"
FILE = "file of torch.save"
# Marks a folder of Trainer's, which is of any of the first four kinds.
TRAINER_STATE = "trainer_state.json"
KNOWN = (
    f"a folder of Accelerate's save_state ({MODEL_FILES[0]} or {MODEL_FILES[2]} with {OPTIMIZER_FILE}; "
    f"pytorch_model_fsdp_0 with optimizer_0; {FULL_MODEL_FILE}; or pytorch_model with DeepSpeed's files), Trainer's "
    "checkpoint-N, a DeepSpeed folder (latest), a DCP folder (.metadata), or a torch.save file"
)


@dataclass(frozen=True)
class Layout:
    """A checkpoint's kind and place.

    Attributes:
        kind: One of this module's constants.
        path: The folder or file.
        manifest: Whether a `manifest.json` of ours vouches for it.
    """

    kind: str
    path: Path
    manifest: bool = False


def find_layout(path: str | Path) -> Layout:
    """The layout at `path`; nothing is loaded.

    Raises:
        CheckpointError: Nothing is there, it is no checkpoint, several, or one of several models.
    """
    path = Path(path)
    if path.is_file():
        return Layout(FILE, path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.name.startswith(".") and path.name.endswith(".partial"):
        raise CheckpointError(f"{path}: was not written to its end; name an earlier one")
    _refuse_several(path)
    kinds = kinds_in(path)
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: holds {' and '.join(kinds)}; move one of them to a folder of its own")
    if not kinds:
        raise CheckpointError(f"{path}: is no checkpoint{_advice(path)}; looked for {KNOWN}")
    return Layout(kinds[0], path, (path / MANIFEST).is_file())


def kinds_in(path: Path) -> list[str]:
    """The kinds whose files are in a folder."""
    from robust_dist.checkpoint.zero_files import is_zero

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
    """Whether a model's file is only an export of the weights, beside an engine's own files."""
    alone = not any((path / name).is_file() for name in OPTIMIZER_FILES)
    return alone or (path / TRAINER_STATE).is_file()


def _refuse_several(path: Path) -> None:
    for pattern in ("model_1.*", "pytorch_model_1*", "pytorch_model_fsdp_1*", "optimizer_1*"):
        more = next(path.glob(pattern), None)
        if more is not None:
            raise CheckpointError(f"{more}: a second model or optimizer; conversion takes folders with one of each")


def _advice(path: Path) -> str:
    """A hint where a run's folder was named in place of one of its checkpoints."""
    steps = sorted(path.glob("step-*")) or sorted(path.glob("checkpoints/step-*"))
    steps = steps or sorted(path.glob("checkpoint-*"), key=lambda one: (len(one.name), one.name))
    return f", but has some: name one, such as {steps[-1]}" if steps else ""
