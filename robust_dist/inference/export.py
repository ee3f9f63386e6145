"""`robust-dist export`: a trained model as files that need no run: weights, torch.export, ONNX."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file, save_model

from robust_dist.checkpoint.conversion import read_weights
from robust_dist.extras import require
from robust_dist.inference.trained import Trained
from robust_dist.train.weights import RECORD, WEIGHTS

PROGRAM, ONNX = "model.pt2", "model.onnx"


def check_new(path: Path, remedy: str = "choose another path") -> None:
    """Refuse a path that already exists.

    Raises:
        FileExistsError: It does.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} already exists; {remedy}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once everything is written.

    Raises:
        FileExistsError: The path already exists.
    """
    check_new(path)
    building = path.absolute().parent / f".{path.name}.{os.getpid()}.partial"
    building.mkdir(parents=True)
    try:
        yield building
        check_new(path)
        os.rename(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def export(trained: Trained, out: Path, formats: Sequence[str] = ("safetensors",)) -> list[str]:
    """Write a model into a new folder: `model.safetensors`, `model.json`, and the other `formats` (from `FORMATS`).

    Returns:
        Names of the files.

    Raises:
        ValueError: An unknown format.
        FileExistsError: `out` already exists.
        ImportError: A format needs a package that is not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"--format {unknown[0]!r} is none of {', '.join(FORMATS)}")
    check_new(out)
    if "onnx" in formats:
        for module in ("onnx", "onnxscript"):
            require(module, extra="export", purpose="--format onnx")
    with new_folder(out) as folder:
        for name in dict.fromkeys(("safetensors", *formats)):
            FORMATS[name](trained, folder)
        (folder / RECORD).write_text(json.dumps(asdict(trained.record), indent=1) + "\n", encoding="utf-8")
    return sorted(path.name for path in out.iterdir())


def export_weights(checkpoint: Path, out: Path) -> list[str]:
    """Write the weights of a checkpoint of any engine and training loop into a new folder, as `model.safetensors`.

    Names are the model's own, dtypes the checkpoint's; a parameter with several names is written under each.
    `safetensors.torch.load_model(model, FILE)` loads it.

    Returns:
        Names of the files.

    Raises:
        CheckpointError: It is not a checkpoint, or it is torn.
        FileExistsError: `out` already exists.
    """
    check_new(out)
    weights = read_weights(checkpoint)
    with new_folder(out) as folder:
        save_file({name: value.clone() for name, value in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return [WEIGHTS]


def _weights(trained: Trained, folder: Path) -> None:
    save_model(trained.model, str(folder / WEIGHTS), metadata={"format": "pt"})


def _program(trained: Trained, folder: Path) -> None:
    torch.export.save(_exported(trained), folder / PROGRAM)


def _onnx(trained: Trained, folder: Path) -> None:
    torch.onnx.export(_exported(trained), (), str(folder / ONNX), dynamo=True, external_data=False, verbose=False)


def _exported(trained: Trained) -> torch.export.ExportedProgram:
    """The forward pass for any number of images, at least 1."""
    pixels = trained.preprocess.pixels
    # A batch of one would be taken for a constant.
    example = torch.zeros(2, len(pixels.mean), pixels.size, pixels.size)
    # torch 2.6 refuses a dimension without a bound.
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    return torch.export.export(trained.model, (example,), dynamic_shapes=({0: batch},))


FORMATS: dict[str, Callable[[Trained, Path], None]] = {
    "safetensors": _weights,
    "torch.export": _program,
    "onnx": _onnx,
}
