"""What a recipe names as `module:Name`: all of it checked before the first step, and noted in the run's folder."""

from collections.abc import Iterator
from typing import Any, cast

from robust_dist import own_code
from robust_dist.documents import DocumentError
from robust_dist.models.registry import own_model
from robust_dist.train.augment_config import own_stage
from robust_dist.train.build import TRIED, own_decay
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import flatten, keys_of, recipe_dict
from robust_dist.train.optimizers import own_choice
from robust_dist.train.recipe import Recipe


def own_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys and values of a recipe that are written as `module:Name`."""
    values, kind = flatten(recipe_dict(recipe)), cast(type, type(recipe))
    for key in sorted(keys_of(kind).names_code):
        found = values[key] if isinstance(values[key], list) else [values[key]]
        yield from ((key, value) for value in found if own_code.is_name(value))


def check_own(recipe: Recipe) -> None:
    """Import what a recipe names of the user's own, and check that it is what its key wants.

    Raises:
        OwnCodeError: Names the key, the value and what would be right.
    """
    for key, value in own_names(recipe):
        if key == "model.name":
            own_model(value)
        elif key == "optimizer.name":
            own_choice(value)
        elif key == "schedule.name":
            own_decay(value, TRIED)
        elif key == "data.name":
            recipe.data.check_own()
        else:
            own_stage(key, value)


def own_sources(recipe: Recipe) -> dict[str, dict[str, str]]:
    """File and SHA-256 of the source of each name of the user's own, by key and name."""
    found = {}
    for key, value in own_names(recipe):
        file, digest = own_code.source_of(value)
        found[f"{key}={value}"] = {"file": file, "sha256": digest}
    return found


def changed_sources(folder: RunFolder, here: dict[str, dict[str, str]]) -> list[str]:
    """Warnings where code of the user's own is no longer what the run's last start had."""
    try:
        starts: list[dict[str, Any]] = folder.starts()
    except DocumentError:
        return []
    there = (starts[-1].get("own_code") or {}) if starts else {}
    return [
        f"{name}: {now['file']} has changed since this run was last started; it goes on with the file as it is now"
        for name, now in here.items()
        if there.get(name, now)["sha256"] != now["sha256"]
    ]
