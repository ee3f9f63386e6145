"""`robust-dist preview`: a PNG showing what the augmentation does to the user's data."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, tables
from robust_dist.data.decode import RandomCrop, crop_box, decode_rgb, to_tensor
from robust_dist.data.errors import BadImage, DataError
from robust_dist.data.sets import FirstSamples, LabelledSet
from robust_dist.data.source import printable
from robust_dist.data.stream_set import StreamSet
from robust_dist.extras import require

Stage = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CELL_INCHES = 1.55
DPI = 150
SHOWN = 5
THUMBNAIL = 256
_NO_BOX: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
STAND_IN = "not readable:\na stand-in"
ENHANCERS = {"Brightness", "Color", "Contrast", "Sharpness"}


@dataclass(frozen=True)
class Column:
    """One stage's result for every sample.

    Attributes:
        title: The stage's name.
        images: One per row, uint8 [C, H, W].
        captions: What happened to each sample.
        boxes: For each row (x1, y1, x2, y2) in pixels of the region cut out or pasted, or None.
        stand_ins: Rows whose image could not be read, so that another one is shown.
    """

    title: str
    images: Tensor | Sequence[Tensor]
    captions: Sequence[str]
    boxes: Sequence[tuple[float, ...]] | None = None
    stand_ins: frozenset[int] = frozenset()


def columns(
    image_set: LabelledSet,
    augment: RobustAugment,
    *,
    rows: int = 8,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 128,
    before: Mapping[str, Stage] | None = None,
) -> list[Column]:
    """The stages of `augment` on `rows` samples: stored, crop and flip, TrivialAugment, CutMix.

    The samples are the first ones of the epoch's first global batch, with the same keys as in training, so the columns
    show what training sees before normalisation. For a set that is read during training, the whole image comes first,
    with its random crop outlined. A sample that cannot be read is crossed out and reported; the image shown in its
    place has no weight in training.

    Args:
        image_set: The user's data.
        augment: The recipe's pipeline; stages that it leaves out have no column.
        rows: Number of samples.
        seed: Seed of the order and of the keys.
        epoch: The epoch shown.
        batch_size: Samples per batch, among which CutMix finds partners.
        before: The user's own stages before the crop, by name; one column each.

    Raises:
        ValueError: rows is below 1, or exceeds the batch or the set.
        DataError: None of the samples can be read.
    """
    size = min(batch_size, len(image_set))
    if not 1 <= rows <= size:
        raise ValueError(f"--rows {rows} must be from 1 to {size}, the samples of the first batch")
    first = image_set.first_samples(seed, epoch, size, _needed(augment.cutmix, rows, size))
    images, labels, keys, bad = first.images, first.labels, first.keys, first.bad
    _tell_bad(bad, len(images), image_set.name)
    names = [image_set.classes[label] for label in labels.tolist()]
    found = [Column(image_set.stage, images[:rows], names[:rows])]
    if isinstance(image_set, StreamSet) and isinstance(image_set.crop, RandomCrop):
        found.insert(0, _whole_images(image_set, image_set.crop, first, rows))
    for title, stage in (before or {}).items():
        images, labels = stage(images, labels, keys)
        found.append(Column(title, images[:rows], names[:rows]))
    if augment.crop is not None or augment.flip is not None:
        images, captions = _crop_and_flip(augment, images, keys)
        title = " and ".join(name for name in ("crop", "flip") if getattr(augment, name) is not None)
        found.append(Column(title, images[:rows], captions[:rows]))
    if augment.trivial is not None:
        plan = augment.trivial.plan(keys)
        images = augment.trivial.apply(images, plan)
        captions = [operation(augment.trivial, plan, row) for row in range(rows)]
        found.append(Column("TrivialAugment", images[:rows], captions))
    if augment.cutmix is not None:
        found.append(_cutmix_column(augment.cutmix, images, labels, keys, names, rows))
    stand_ins = frozenset(row for row in bad if row < rows)
    return [replace(column, stand_ins=stand_ins) for column in found]


def _whole_images(image_set: StreamSet, crop: RandomCrop, first: FirstSamples, rows: int) -> Column:
    """The images before the random crop, shrunk to `THUMBNAIL` pixels, with the crop outlined."""
    images, captions = [], []
    boxes: list[tuple[float, ...]] = []
    for row in range(rows):
        if row in first.bad:
            images.append(first.images[row])
            captions.append("")
            boxes.append(_NO_BOX)
            continue
        image = decode_rgb(image_set.source.read(int(first.indices[row]))[0])
        captions.append(f"{image.width} x {image.height} px")
        box = crop_box(image.width, image.height, int(first.keys[row]), scale=crop.scale, ratio=crop.ratio)
        shrink = max(1.0, max(image.size) / THUMBNAIL)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        images.append(to_tensor(image))
        boxes.append(tuple(side / shrink for side in box))
    return Column("original", images, captions, boxes)


def _tell_bad(bad: Mapping[int, BadImage], count: int, name: str) -> None:
    if not bad:
        return
    shown = "; ".join(printable(f"{image.where} ({image.reason})") for image in list(bad.values())[:SHOWN])
    said = f"{name}: {len(bad)} of the first {count} images cannot be read: {shown}"
    if len(bad) == count:
        raise DataError(said)
    warnings.warn(said, stacklevel=3)


def _needed(cutmix: CutMix | None, rows: int, size: int) -> int:
    """How many samples of a batch of `size` determine the first `rows`: whole blocks of partners."""
    if cutmix is None:
        return rows
    return size if cutmix.mode == "batch" else min(size, -(-rows // cutmix.block) * cutmix.block)


def _crop_and_flip(augment: RobustAugment, images: Tensor, keys: Tensor) -> tuple[Tensor, list[str]]:
    """The images after both stages, with each image's shift (right, down) and whether it was mirrored."""
    moved = mirrored = [""] * len(images)
    if augment.crop is not None:
        crop = augment.crop.plan(keys)
        images = augment.crop.apply(images, crop)
        right, down = ((augment.crop.padding - start).tolist() for start in (crop.left, crop.top))
        moved = [f"moved {x:+d}, {y:+d} px" for x, y in zip(right, down, strict=True)]
    if augment.flip is not None:
        flip = augment.flip.plan(keys)
        images = augment.flip.apply(images, flip)
        mirrored = ["mirrored" if mirror else "" for mirror in flip.flip.tolist()]
    return images, [", ".join(filter(None, pair)) for pair in zip(moved, mirrored, strict=True)]


def operation(trivial: TrivialAugment, plan: Any, row: int) -> str:
    """The operation drawn for a sample with its signed magnitude and unit, such as "Rotate -40.5°"."""
    name = trivial.OPS[int(plan.op[row])]
    amount = _amount(name, int(plan.magnitude_bin[row]), bool(plan.negative[row]), trivial.num_bins)
    return f"{name} {amount}" if amount else name


def _amount(name: str, magnitude_bin: int, negative: bool, num_bins: int) -> str:
    sign = -1 if negative else 1
    if name.startswith("Shear"):
        return f"{sign * tables.wide_magnitudes(num_bins)[magnitude_bin]:+.2f}"
    if name.startswith("Translate"):
        return f"{sign * tables.translations(num_bins)[magnitude_bin]:+d} px"
    if name == "Rotate":
        return f"{sign * tables.rotations(num_bins)[magnitude_bin]:+.1f}°"
    if name == "Posterize":
        return f"{tables.posterize_bits(num_bins)[magnitude_bin]} bits"
    if name == "Solarize":
        return f"from {tables.solarize_thresholds(num_bins)[magnitude_bin]}"
    if name in ENHANCERS:
        return f"x {1 + sign * tables.wide_magnitudes(num_bins)[magnitude_bin]:.2f}"
    return ""


def _cutmix_column(
    cutmix: CutMix, images: Tensor, labels: Tensor, keys: Tensor, names: Sequence[str], rows: int
) -> Column:
    plan = cutmix.plan(keys, *images.shape[-2:])
    mixed, _ = cutmix.apply(images, labels, plan)
    partners = [names[partner] for partner in plan.partner[:rows].tolist()]
    shares = plan.lam[:rows].tolist()
    captions = [mixture(*triple) for triple in zip(names, partners, shares, strict=False)]
    boxes = [tuple(box) for box in plan.box[:rows].tolist()]
    return Column("CutMix", mixed[:rows], captions, boxes)


def mixture(own: str, partner: str, lam: float) -> str:
    """The soft label in words: "0.62 ship + 0.38 cat"; one name if there is one class, numbers in quotes."""
    first, second = (f"'{name}'" if name[:1].isdigit() else name for name in (own, partner))
    if own == partner or lam == 1:
        return f"1.00 {first}"
    return f"{lam:.2f} {first} + {1 - lam:.2f} {second}"


def draw(shown: Sequence[Column], path: Path) -> None:
    """Write the columns as a PNG, each image with its caption below and the pasted box outlined.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class = require("matplotlib.figure", extra="train", purpose="preview").Figure
    rows = len(shown[0].captions)
    figure = figure_class(figsize=(CELL_INCHES * 1.25 * len(shown), CELL_INCHES * 1.17 * rows + 0.35), dpi=DPI)
    axes = figure.subplots(rows, len(shown), squeeze=False)
    for column, places in zip(shown, axes.T, strict=True):
        for row, place in enumerate(places):
            _draw_cell(place, column, row)
        places[0].set_title(column.title, fontsize=10, fontweight="bold")
    figure.tight_layout(pad=0.6, h_pad=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_cell(place: Any, column: Column, row: int) -> None:
    image = column.images[row].permute(1, 2, 0).cpu()
    place.imshow(image.expand(-1, -1, 3).numpy(), interpolation="nearest", vmin=0, vmax=255)
    if row in column.stand_ins:
        _cross_out(place)
    # A class name must not be parsed as a formula.
    place.set_xlabel(printable(column.captions[row]), fontsize=8, parse_math=False)
    place.set(xticks=[], yticks=[])
    if column.boxes is not None:
        _outline(place, column.boxes[row])


def _cross_out(place: Any) -> None:
    for low, high in ((0, 1), (1, 0)):
        place.plot((0, 1), (low, high), color="tab:red", linewidth=1.2, transform=place.transAxes)
    box = {"facecolor": "white", "edgecolor": "tab:red"}
    place.text(0.5, 0.5, STAND_IN, fontsize=7, ha="center", va="center", transform=place.transAxes, bbox=box)


def _outline(place: Any, box: tuple[float, ...]) -> None:
    """A dashed rectangle around the box; pixel centres lie at whole numbers."""
    x1, y1, x2, y2 = box
    if x2 > x1 and y2 > y1:
        xs, ys = (x1 - 0.5, x2 - 0.5, x2 - 0.5, x1 - 0.5, x1 - 0.5), (y1 - 0.5, y1 - 0.5, y2 - 0.5, y2 - 0.5, y1 - 0.5)
        place.plot(xs, ys, color="white", linewidth=2, clip_on=False)
        place.plot(xs, ys, color="tab:red", linewidth=1.2, linestyle="--", clip_on=False)
