"""`data.json` in a run's folder: what the run is trained on, and whether a later start uses the same data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_dist.data.identity import are_copies, shared_images
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import composed
from robust_dist.train.data_config import DataConfig
from robust_dist.train.recipe import Recipe
from robust_dist.train.sources import Preprocessing

Record = dict[str, Any]
NAMED = 5
PARTS = ("train", "eval")


def data_record(recipe: Recipe, sets: Sequence[LabelledSet], image: Preprocessing) -> Record:
    """The content of `data.json`, as plain JSON values.

    Returns:
        The data's name; the classes, in label order; for both parts the name, the number of images, the revision (of a
        Hub set), the fingerprint, and what was left out; the preprocessing; and the decoder of images that are read
        during training.
    """
    record = {
        "name": recipe.data.name,
        "classes": list(sets[0].classes),
        **{part: part_record(dataset) for part, dataset in zip(PARTS, sets, strict=True)},
        "preprocessing": {"mean": list(image.mean), "std": list(image.std), **_sizes(recipe, image)},
    }
    decoder = getattr(sets[0], "decoder", None)
    if decoder is not None:
        record["decode"] = decoder
    plain: Record = json.loads(json.dumps(record))
    return plain


def left_out(dataset: LabelledSet) -> dict[str, int]:
    """The number of a set's files that are left out, by reason."""
    found = dict(getattr(getattr(dataset, "source", None), "left_out", ()))
    unreadable = len(getattr(dataset, "unreadable", ()))
    return found | ({"that cannot be read": unreadable} if unreadable else {})


def differences(here: Record, there: Record) -> list[str]:
    """Differences between this start's data and the folder's record, one per line."""
    lines = _classes(here["classes"], there.get("classes", []))
    for part in PARTS:
        lines += part_differences(part, here[part], there.get(part, {}))
    ours, theirs = here["preprocessing"], there.get("preprocessing", {})
    return lines + [
        f"{key}: {ours[key]} here, {theirs[key]} in the folder"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]


def check_parts(data: DataConfig, sets: Sequence[LabelledSet]) -> list[str]:
    """Reject training and evaluation images that overlap.

    Returns:
        Warnings: the parts are the same because the recipe says so, or one looks like a copy of the other.

    Raises:
        ValueError: Images are in both parts; names both settings, what they share and what would be right.
    """
    train, test = (getattr(dataset, "source", None) for dataset in sets)
    shared = None if train is None or test is None else shared_images(train, test)
    if shared:
        names = [_named(data, part) for part in PARTS]
        if names[0] == names[1]:
            return [f"evaluation is on the training images: data.train and data.eval are both {names[0]!r}"]
        raise ValueError(
            f"data.train={names[0]!r} and data.eval={names[1]!r} share images ({shared}), so evaluation "
            f"would use training images; give parts without common images{_advice(data)}, or the same name twice "
            "if that is what you want"
        )
    if are_copies(*sets):
        return [f"evaluation may be on the training images: {sets[1].name} looks like a copy of {sets[0].name}"]
    return []


def _named(data: DataConfig, part: str) -> Any:
    value = data.part(part)
    if data.name == "imagefolder":
        return str(Path(value))
    assert data.source is not None
    return [value] if data.source.takes_lists and isinstance(value, str) else value


def _advice(data: DataConfig) -> str:
    return ", such as 'train[:80%]' and 'train[80%:]'" if data.name == "hub" and not data.streaming else ""


def part_record(dataset: LabelledSet) -> Record:
    """The entry of one part in `data.json`."""
    source = getattr(dataset, "source", None)
    made: Record = {"name": dataset.name, "images": len(dataset), "fingerprint": dataset.fingerprint()}
    revision, split = getattr(source, "revision", None), getattr(source, "split", None)
    more = {
        "revision": revision,
        "split": None if split is None else vars(split),
        "left_out": left_out(dataset),
    }
    return made | {key: value for key, value in more.items() if value}


def _sizes(recipe: Recipe, image: Preprocessing) -> Record:
    """Sides in pixels, crops and flip; the padding of the random crop on the device, if any."""
    data, augment = recipe.data, recipe.augment
    common = {
        "crop_padding": image.crop if augment.crop is None else augment.crop,
        "flip": image.flip if augment.flip is None else augment.flip,
    }
    if not data.streamed:
        size = data.eval_sides[0] if data.in_memory else image.size
        return {"train_size": image.size, "eval_size": size, "eval_resize": None, **common}
    size, resize = data.eval_sides
    crops = {"crop_scale": data.crop_scale, "crop_ratio": data.crop_ratio}
    return {"train_size": data.size, "eval_size": size, "eval_resize": resize, **crops, **common}


def _classes(here: list[str], there: list[str]) -> list[str]:
    if len(here) != len(there):
        gone, new = ([repr(name) for name in a if name not in set(b)] for a, b in ((there, here), (here, there)))
        more = "".join(
            f"; {word}: {', '.join(names[:NAMED])}" for word, names in (("new", new), ("gone", gone)) if names
        )
        return [f"classes: {len(here)} here, {len(there)} in the folder{more}"]
    lines = [
        f"class {number} is {ours!r} here, {theirs!r} in the folder"
        for number, (ours, theirs) in enumerate(zip(here, there, strict=True))
        if composed(ours) != composed(theirs)
    ]
    return lines[:NAMED] + ([f"and {len(lines) - NAMED:,} more classes"] if len(lines) > NAMED else [])


def part_differences(part: str, here: Record, there: Record) -> list[str]:
    """Differences between one part here and its record in the folder, one per line."""
    if there.get("images", here["images"]) != here["images"]:
        doing = {"train": "training", "eval": "evaluating"}[part]
        return [f"{part}: the run was {doing} on {there['images']} images, but {here['name']} has {here['images']}"]
    if there.get("fingerprint", here["fingerprint"]) != here["fingerprint"]:
        ours, theirs = here.get("revision"), there.get("revision")
        # Another commit with the same images (changing a set's description, say) is not a difference.
        moved = f" (the Hub's revision is {ours} and was {theirs}: set data.revision)" if ours != theirs else ""
        return [f"{part}: {here['name']} has as many images as before, but other names or labels{moved}"]
    return []
