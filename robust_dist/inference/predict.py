"""`robust-dist predict`: classes of image files."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.data.decode import CentralCrop
from robust_dist.data.errors import BadImage, BadImageError, DataError
from robust_dist.data.folder import EXTENSIONS
from robust_dist.data.source import Upright, printable
from robust_dist.data.stream_set import StreamSet
from robust_dist.inference.trained import Trained
from robust_dist.validate import whole_number

FORMATS = ("table", "jsonl", "csv")
# Fewer images are decoded before a worker has started.
_WORTH_A_WORKER = 256
_ON_A_SHEET, _COLUMNS = 60, 6


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image.

    Attributes:
        path: The file.
        top: Names and probabilities, most likely first.
        levels: The image as the model saw it before normalisation, uint8 [3, H, W] on the CPU.
    """

    path: Path
    top: list[tuple[str, float]]
    levels: Tensor


class Files:
    """Image files as an `ImageSource` without labels."""

    def __init__(self, paths: Sequence[Path], *, upright: bool) -> None:
        self.paths, self.kind, self.name = list(paths), Upright if upright else bytes, "the images"
        self.classes: tuple[str, ...] = ("",)
        self.group_sizes: tuple[int, ...] = (len(self.paths),)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        try:
            return self.kind(self.paths[index].read_bytes()), 0
        except OSError as error:
            raise BadImageError(error.strerror or str(error)) from error

    def where(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """The files given, and the image files of folders at any depth, sorted; hidden ones are left out.

    Raises:
        DataError: A path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder")
        below = _below(path) if path.is_dir() else [path]
        if not below:
            raise DataError(f"{path}: holds no images; they end in {', '.join(EXTENSIONS)}")
        found += below
    return found


def _below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in sorted(files) if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        found += [Path(above, name) for name in images]
    return found


def predict(
    trained: Trained, files: Sequence[Path], *, device: torch.device, top_k: int = 1, batch_size: int = 64
) -> Iterator[Prediction | BadImage]:
    """The `top_k` most likely classes of each file, in order; or what is wrong with a file that is not an image.

    Raises:
        ValueError: top_k or batch_size is below 1.
    """
    whole_number("--top-k", top_k, 1)
    whole_number("--batch-size", batch_size, 1)
    pixels, preprocess = trained.preprocess.pixels, trained.preprocess.to(device)
    forward, count = trained.evaluating(device), min(top_k, len(trained.classes))
    crop = CentralCrop(pixels.size, pixels.resize or pixels.size)
    workers = 0 if len(files) < _WORTH_A_WORKER else len(os.sched_getaffinity(0))
    images = StreamSet(Files(files, upright=pixels.upright), crop, device, workers=workers)
    start = 0
    bad: dict[str, BadImage] = {}
    for batch in images.eval_batches(0, len(files), batch_size):
        chances = forward(preprocess.normalize(batch.images)).softmax(1)
        best, classes = (values.tolist() for values in chances.topk(count, 1))
        good = [True] * len(best) if batch.good is None else batch.good.tolist()
        # Also those of batches that were read ahead.
        bad |= {image.where: image for image in images.take_bad()}
        levels = batch.images.cpu()
        for row, path in enumerate(files[start : start + len(best)]):
            if good[row]:
                names = [trained.classes[number] for number in classes[row]]
                yield Prediction(path, list(zip(names, best[row], strict=True)), levels[row])
            else:
                yield bad[str(path)]
        start += len(best)


def lines(found: Iterator[Prediction], style: str, top_k: int) -> Iterator[str]:
    """Predictions as text in one of `FORMATS`, a line at a time; `top_k` is for the heading of a CSV."""
    if style == "csv":
        yield _csv(["path", *(f"{what}_{place}" for place in range(1, top_k + 1) for what in ("class", "probability"))])
    for prediction in found:
        if style == "jsonl":
            top: list[dict[str, Any]] = [{"class": name, "probability": chance} for name, chance in prediction.top]
            yield json.dumps({"path": str(prediction.path), **top[0], "top": top})
        elif style == "csv":
            yield _csv([str(prediction.path), *(value for pair in prediction.top for value in pair)])
        else:
            yield printable(
                f"{prediction.path}  " + ", ".join(f"{name} {chance:.4f}" for name, chance in prediction.top)
            )


def _csv(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def draw_sheet(found: Sequence[Prediction], path: Path) -> None:
    """Draw the first images with their classes into a PNG."""
    from matplotlib.figure import Figure

    shown = found[:_ON_A_SHEET]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows + 0.3), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, prediction in zip(figure.axes, shown, strict=False):
        axes.imshow(prediction.levels.permute(1, 2, 0).numpy())
        name, chance = prediction.top[0]
        axes.set_title(f"{name}  {chance:.0%}\n{prediction.path.name}", fontsize=7, parse_math=False)
    if len(found) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(found):,} images", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
