"""Evaluation of a trained model: accuracy, loss, calibration and confusion, on the run's own images or others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.data.batches import even_cuts
from robust_dist.data.classes import check_same_classes
from robust_dist.data.decode import CentralCrop
from robust_dist.data.errors import BadImage, DataError
from robust_dist.data.folder import open_image_folder
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import composed
from robust_dist.data.stream_set import StreamSet
from robust_dist.documents import Document
from robust_dist.inference.trained import Preprocess, Trained, is_own, pixels_of, settings_of
from robust_dist.own_code import is_name
from robust_dist.train.data_record import part_differences, part_record
from robust_dist.train.evaluate import count_batch, no_totals, score_of
from robust_dist.train.sources import open_eval_set

BINS = 15
SHOWN, NAMED = 20, 5


@dataclass(frozen=True)
class Images:
    """Images to evaluate a model on.

    Attributes:
        images: The set.
        preprocess: Turns its images into the model's input.
        logged: The accuracy that the run logged on the same images; None for others.
    """

    images: LabelledSet
    preprocess: Preprocess
    logged: float | None


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation.

    Attributes:
        data: The set's name.
        images: Number of images that counted.
        accuracy: Share of images whose class has the largest logit.
        top5: Share of images whose class is among the five largest logits; None below six classes.
        loss: Mean cross-entropy.
        calibration_error: See `calibration_error`.
        confusion: Images by class (row) and predicted class (column).
        unreadable: Images that could not be read and do not count.
        logged: See `Images`.
    """

    data: str
    images: int
    accuracy: float
    top5: float | None
    loss: float
    calibration_error: float
    confusion: list[list[int]]
    unreadable: tuple[BadImage, ...]
    logged: float | None

    @property
    def counted(self) -> str:
        """The number of images, in words."""
        return f"{self.images:,} image{'' if self.images == 1 else 's'}"


def own_images(trained: Trained, words: Sequence[str], device: torch.device) -> Images:
    """The images on which the run was evaluated, or those that changed data keys select.

    Args:
        trained: The model.
        words: `--data.KEY VALUE` words that change the recipe.
        device: Where the images are delivered.

    Raises:
        ValueError: The files are missing, torn, of other classes or channels; or, without `words`, other images than
            those of the run.
    """
    record = trained.record
    settings = settings_of(Document(record.recipe, str(trained.path)), type(trained.settings), words)
    if is_own(settings.data) and not is_name(settings.data.name):
        raise DataError(f"{trained.path}: the run's images were given in Python; name a folder of images (PATH)")
    found = open_eval_set(settings.data, device, trained.classes, download=settings.data.download)
    _check_fits(trained, found)
    differing = part_differences("eval", part_record(found), record.data.get("eval", {}))
    if differing and not words:
        raise DataError(f"{trained.path} was evaluated on other images: {'; '.join(differing)}")
    pixels = pixels_of(settings.data, settings.model.channels_last)
    are_same = not differing and pixels == record.preprocessing
    return Images(found, Preprocess(trained.classes, pixels), record.checkpoint.eval_accuracy if are_same else None)


def folder_images(trained: Trained, folder: str | Path, device: torch.device) -> Images:
    """The images of a folder that has a sub-folder for each class.

    Raises:
        DataError: There is no such folder, or it has other classes than the model.
    """
    pixels = trained.preprocess.pixels
    exif = "on" if pixels.upright else "off"
    source = open_image_folder(folder, classes=trained.classes, exif=exif)
    crop = CentralCrop(pixels.size, pixels.resize or pixels.size)
    return Images(StreamSet(source, crop, device, workers=trained.settings.data.workers), trained.preprocess, None)


def _check_fits(trained: Trained, found: LabelledSet) -> None:
    """Refuse images of other classes, or of another number of channels."""
    check_same_classes(found.classes, trained.classes, found.name)
    moved = [
        f"class {number} is {theirs!r}, and {ours!r} in {trained.path}"
        for number, (theirs, ours) in enumerate(zip(found.classes, trained.classes, strict=False))
        if composed(theirs) != composed(ours)
    ]
    if moved or len(found.classes) != len(trained.classes):
        raise DataError(f"{found.name} has the classes in another order: {'; '.join(moved[:NAMED])}")
    channels = len(trained.preprocess.pixels.mean)
    if found.channels != channels:
        raise DataError(f"{found.name} has images of {found.channels} channels, and {trained.path} takes {channels}")


def evaluate(trained: Trained, on: Images, device: torch.device) -> Evaluation:
    """Evaluate in the run's precision and in its batches, so that its own figures are reproduced."""
    forward, preprocess = trained.evaluating(device), on.preprocess.to(device)
    classes = len(trained.classes)
    totals = no_totals(classes, device)
    seen: list[Tensor] = []
    size = trained.settings.data.eval_batch_size
    # Each rank of the run had a share; the bits of a sample's logits may depend on its batch.
    for start, stop in even_cuts(len(on.images), trained.record.checkpoint.num_processes):
        for batch in on.images.eval_batches(start, stop, size):
            logits = forward(preprocess.normalize(batch.images))
            totals += count_batch(logits, batch, classes)
            good = slice(None) if batch.good is None else batch.good
            seen.append(_judged(logits[good], batch.labels[good]))
    score, found = score_of(totals), torch.cat(seen)
    if not score.samples:
        raise DataError(f"{on.images.name}: none of the {len(on.images):,} images could be read")
    labels, predicted, confidence = found.unbind(1)
    places = labels.long() * classes + predicted.long()
    return Evaluation(
        data=on.images.name,
        images=score.samples,
        accuracy=score.accuracy,
        top5=score.top5,
        loss=score.loss,
        calibration_error=calibration_error(confidence, labels == predicted),
        confusion=torch.bincount(places, minlength=classes**2).view(classes, classes).tolist(),
        unreadable=(*on.images.take_bad(), *getattr(on.images, "unreadable", ())),
        logged=on.logged,
    )


def _judged(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 [B, 3] on the CPU: label, predicted class, its probability."""
    confidence = logits.double().softmax(1).amax(1)
    columns = (labels, logits.argmax(1), confidence)
    return torch.stack([column.double().cpu() for column in columns], 1)


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3).

    Images fall into 15 bins of equal width by the probability of their predicted class, bin m being
    ((m-1)/15, m/15]; the error is the mean over images of |accuracy - mean probability| of their bin.

    Args:
        confidence: The predicted class's probability, float64 [N].
        correct: Whether it is right, bool [N].
    """
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))


def class_rows(trained: Trained, found: Evaluation) -> list[dict[str, Any]]:
    """For each class the number of images, how many were right, and the accuracy (None without images)."""
    counts = [(sum(row), row[number]) for number, row in enumerate(found.confusion)]
    return [
        {"class": name, "images": images, "correct": correct, "accuracy": correct / images if images else None}
        for name, (images, correct) in zip(trained.classes, counts, strict=True)
    ]


def as_json(trained: Trained, found: Evaluation) -> dict[str, Any]:
    """The content of `evaluation.json`."""
    return {
        "model": str(trained.path),
        "step": trained.record.checkpoint.step,
        "data": found.data,
        "images": found.images,
        "accuracy": found.accuracy,
        "top5_accuracy": found.top5,
        "loss": found.loss,
        "calibration_error": found.calibration_error,
        "calibration_bins": BINS,
        "logged_accuracy": found.logged,
        "classes": class_rows(trained, found),
        "confusion": found.confusion,
        "unreadable": [bad._asdict() for bad in found.unreadable],
    }


def as_text(trained: Trained, found: Evaluation, most: int | None = None) -> str:
    """The evaluation as text; with `most`, only that many classes, those with the lowest accuracy."""
    logged = "" if found.logged is None else f"   (logged: {found.logged:.2%}{_said(found)})"
    lines = [
        f"{trained.path}, step {trained.record.checkpoint.step}, on {found.counted} of {found.data}",
        f"accuracy           {found.accuracy:8.2%}{logged}",
        *([] if found.top5 is None else [f"top-5 accuracy     {found.top5:8.2%}"]),
        f"loss               {found.loss:8.4f}",
        f"calibration error  {found.calibration_error:8.2%}   (expected, {BINS} equal-width bins)",
    ]
    rows = class_rows(trained, found)
    if most is not None and len(rows) > most:
        rows = sorted(rows, key=lambda row: 2.0 if row["accuracy"] is None else row["accuracy"])[:most]
        lines.append(f"the {most} of {len(trained.classes):,} classes with the lowest accuracy:")
    width = max(len(row["class"]) for row in rows)
    for row in rows:
        share = "       -" if row["accuracy"] is None else f"{row['accuracy']:8.2%}"
        lines.append(f"  {row['class']:<{width}}  {share}  {row['correct']:,} of {row['images']:,}")
    lines += [f"could not be read: {bad.where}: {bad.reason}" for bad in found.unreadable]
    return "\n".join(lines)


def _said(found: Evaluation) -> str:
    return ", the same" if found.logged == found.accuracy else ", not the same: another device or version may round so"


def write(trained: Trained, found: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, `evaluation.txt` and `confusion.png` into an existing folder."""
    (folder / "evaluation.json").write_text(json.dumps(as_json(trained, found), indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(as_text(trained, found) + "\n", encoding="utf-8")
    plot_confusion(trained.classes, found, folder / "confusion.png")


def plot_confusion(classes: Sequence[str], found: Evaluation, path: Path) -> None:
    """Draw the share of each class's images (row) that was predicted as each class (column) into a PNG."""
    from matplotlib.figure import Figure

    counts = torch.tensor(found.confusion, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    few = len(classes) <= SHOWN
    side = 2.5 + 0.45 * len(classes) if few else 9.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the row's images")
    axes.set(xlabel="predicted", ylabel="class", title=f"{found.accuracy:.2%} of {found.counted}")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)
