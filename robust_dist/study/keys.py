"""Which dotted keys a recipe has, and how the values of a grid are written."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_origin, get_type_hints

from robust_dist.train.recipe import FREE, Recipe

# A study sets these itself.
OWN = ("seed", "run_dir")


class StudyError(ValueError):
    """A study's file, folder or command that cannot be used; the message says what would be right."""


def recipe_keys(kind: type = Recipe, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key of a recipe, and whether it is a mapping that takes further names."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        hint = hints[one.name]
        if is_dataclass(hint):
            yield from recipe_keys(hint, f"{prefix}{one.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + one.name, get_origin(hint) is dict


def check_key(key: Any, where: str, *, moves_weights: bool) -> str:
    """`key` as a recipe key.

    Args:
        key: What the file has.
        where: The place in the file, for the message.
        moves_weights: Whether settings that change no result are refused.

    Raises:
        StudyError: It is none, or one that a study sets itself.
    """
    known = dict(recipe_keys())
    if not isinstance(key, str) or not _is_known(key, known):
        near = get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StudyError(f"{where}: {key!r} is no key of a recipe{hint}")
    if key in OWN or (moves_weights and key.startswith(FREE)):
        raise StudyError(f"{where}: {key!r} cannot be set here ({_why_not(key)})")
    return key


def _is_known(key: str, known: dict[str, bool]) -> bool:
    return key in known or any(takes_more and key.startswith(f"{name}.") for name, takes_more in known.items())


def _why_not(key: str) -> str:
    if key == "seed":
        return "give the study's seeds"
    return "every run has a folder of its own" if key == "run_dir" else "it changes no result"


def label_of(value: Any) -> str:
    """How a value is called in tables and file names: numbers as %g has them, whatever the file's spelling."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value)
