"""`robust-dist recipe`: a recipe for a folder of images, with the reason beside each setting."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robust_dist.data.errors import DataError
from robust_dist.data.survey import Survey, survey
from robust_dist.documents import parse_yaml
from robust_dist.engines.accelerate import cores_here
from robust_dist.train.parse import Settings
from robust_dist.train.recipe import Recipe

EVAL_SHARE = 0.2
# Images up to this side use ResNets without a stem; larger ones torchvision's.
_SMALL_SIDE = 64
_SIDES = (32, 64, 96, 128, 160, 192, 224)
# Below this many steps the full augmentation costs accuracy (configs/studies/results).
_LONG = 7_500
_WANTED_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 1_500, 30, 100
# Largest numbers of images, each with its batch size.
_BATCHES = ((64, 8), (1_000, 16), (5_000, 32), (20_000, 64), (100_000, 128))
_LARGEST_BATCH = 256
_NAMED = 5
# Words that YAML does not read as text.
_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")


def suggest(folder: str | Path) -> str:
    """The YAML text of a recipe for a folder of images as it is: class folders, or train and val with class folders.

    Raises:
        DataError: It is not a folder of images in classes.
    """
    found = survey(Path(folder).expanduser().absolute())
    if found.layout.eval is None and max(found.train) < 2:
        raise DataError(f"{found.layout.root}: each class has one image, so none is left for evaluation")
    text = "\n".join([*_findings(found), *_sections(found)]) + "\n"
    # `train` must accept what is written.
    settings = Settings(Recipe)
    document = parse_yaml(text, "the suggested recipe")
    settings.take(document, document.data, (), "")
    settings.recipe()
    return text


def _findings(found: Survey) -> list[str]:
    """The findings, as comments."""
    total, looked_at = found.images, found.looked_at
    counts = [sum(pair) for pair in zip(found.train, found.eval or (0,) * len(found.train), strict=True)]
    of_all = "" if looked_at == total else f" of {looked_at:,} that were examined"
    widths, heights = zip(*found.sizes, strict=True)
    lines = [
        f"{total:,} images of {len(found.classes):,} classes below {found.layout.root}",
        f"classes: {_some(found.classes)}; {_range(counts)} images each",
        f"sizes: width {_range(widths)}, height {_range(heights)} pixels; {found.grey:,} are grey{of_all}",
        *found.layout.notes,
    ]
    if max(counts) >= 3 * max(1, min(counts)):
        largest = found.classes[counts.index(max(counts))]
        lines.append(
            f"unbalanced: {largest!r} has {max(counts) / total:.0%} of them; check the accuracy of each "
            "class (robust-dist evaluate)"
        )
    if found.left_out:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.left_out.items()))
        lines.append(f"files left out because they are not images: {listed}")
    lines += [f"cannot be read: {bad.where}: {bad.reason}" for bad in found.bad[:_NAMED]]
    lines += [f"... and {len(found.bad) - _NAMED:,} more"] * (len(found.bad) > _NAMED)
    lines += [f"the same file twice: {one} and {other}" for one, other in found.copies[:_NAMED]]
    lines += [f"... and {len(found.copies) - _NAMED:,} more"] * (len(found.copies) > _NAMED)
    return [f"# {_in_a_line(line)}" for line in lines]


def _sections(found: Survey) -> list[str]:
    split = found.layout.eval is None
    images = round(sum(found.train) * (1 - EVAL_SHARE)) if split else sum(found.train)
    batch = next((size for most, size in _BATCHES if images <= most), _LARGEST_BATCH)
    steps_per_epoch = max(1, images // batch)
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, round(_WANTED_STEPS / steps_per_epoch)))
    steps = epochs * steps_per_epoch
    is_long = steps >= _LONG
    side = _side(found)
    warm_up = [f"  # {steps:,} steps are few: with auto the warm-up is a fixed share of them.", "  beta2: auto"]
    return [
        *_data(found, side, split, is_long, images, batch),
        *_model(side, images),
        "optimizer:",
        "  lr: 0.01",
        *([] if is_long else warm_up),
        *_augment(is_long, steps),
        f"# About {steps:,} steps; the accuracy of the last epochs shows whether more would help.",
        f"epochs: {epochs}",
        f"batch_size: {batch}",
        *_precision(),
        f"run_dir: {_value('runs/' + (re.sub(r'[^A-Za-z0-9_-]+', '_', found.layout.root.name) or 'images'))}",
    ]


def _side(found: Survey) -> int:
    """Height and width to train at."""
    if _is_uniform(found):
        return found.sizes[0][0]
    shorter = sorted(min(size) for size in found.sizes)
    median = shorter[len(shorter) // 2]
    return max(side for side in _SIDES if side <= max(median, _SIDES[0]))


def _is_uniform(found: Survey) -> bool:
    """Whether all images are small squares of one size, so that they can stay in memory."""
    width, height = found.sizes[0]
    same = len(set(found.sizes)) == 1 and found.looked_at == found.images
    return same and width == height and width <= _SMALL_SIDE


def _data(found: Survey, side: int, split: bool, is_long: bool, images: int, batch: int) -> list[str]:
    layout = found.layout
    root = layout.root / layout.train if split and layout.train else layout.root
    lines = ["data:", "  name: imagefolder", f"  root: {_value(str(root))}"]
    if split:
        smallest = min(found.train)
        lines += [
            "  # There is no evaluation folder: this fraction of each class is held out, by a hash of the file name"
            + (f" (the smallest class has {smallest:,})." if smallest < 20 else "."),
            f"  eval_share: {EVAL_SHARE}",
        ]
    else:
        lines += [f"  train: {_value(str(layout.train))}", f"  eval: {_value(str(layout.eval))}"]
    if _is_uniform(found):
        lines += [
            f"  # All are {side}x{side}: they are decoded once, stay in memory and are cropped there (augment.crop).",
            f"  size: {side}",
            "  crop_scale: null",
        ]
    else:
        lines += [
            "  # From the median of the shorter sides. The cost grows with the square of the size.",
            f"  size: {side}",
        ]
        if not is_long:
            lines += [
                "  # Light crops: in a short run heavy ones cost accuracy.",
                "  crop_scale: [0.7, 1.0]",
                "  crop_ratio: [0.9, 1.1]",
            ]
    if side <= _SMALL_SIDE or found.grey > len(found.sizes) / 2:
        lines += [
            "  # Measured here. With model.weights use those of the weights (for ImageNet's, leave both out).",
            f"  mean: {list(found.mean)}",
            f"  std: {list(found.std)}",
        ]
    if found.turned:
        lines += [f"  # {found.turned:,} images carry an EXIF orientation: turn them upright.", "  exif: 'on'"]
    if found.bad:
        share = min(0.5, math.ceil(200 * len(found.bad) / found.looked_at) / 100)
        lines += ["  # Named above: repair or remove them. They are skipped and counted.", f"  max_bad_share: {share}"]
    # A split by hashes may leave fewer training images than expected.
    if images >= 2 * batch:
        lines += ["  # A last batch of only a few images would upset batch normalisation.", "  drop_last: true"]
    lines += [f"  # Up to {max(1, batch // 2)} ranks share a batch.", "  block: 2"]
    return [*lines, f"  workers: {min(8, max(1, cores_here() - 1))}"]


def _model(side: int, images: int) -> list[str]:
    if side <= _SMALL_SIDE:
        return ["model:", "  # For small images; use resnet56 with tens of thousands of them.", "  name: resnet20"]
    name = "resnet18" if images < 20_000 else "resnet50"
    return [
        "model:",
        f"  name: {name}",
        "  # Start from ImageNet's weights, which helps most with few images; needs a network once:",
        "  # weights: DEFAULT",
    ]


def _augment(is_long: bool, steps: int) -> list[str]:
    lines = ["augment:", "  # true if a mirrored image keeps its meaning, as with most photographs.", "  flip: false"]
    if is_long:
        return [*lines, f"  # {steps:,} steps are enough for TrivialAugment and CutMix, which are on."]
    return [
        *lines,
        f"  # In {steps:,} steps both cost accuracy (configs/studies/results/small_folder); they are for long runs.",
        "  trivial: false",
        "  cutmix: false",
    ]


def _precision() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return ["precision:", "  # There is a GPU.", "  mixed: bf16"]


def _value(text: str) -> str:
    """Text as YAML: plain if it has no other reading."""
    plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")


def _range(values: Sequence[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _in_a_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
