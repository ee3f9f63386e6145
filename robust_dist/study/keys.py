"""The dotted keys of a recipe, and the spelling of a grid's values."""

import json
from typing import Any

from robust_dist.train.keys import keys_of
from robust_dist.train.recipe import Recipe

# A study sets these itself.
OWN = ("seed", "run_dir")
_STOPS = "early_stopping."


class StudyError(ValueError):
    """A study's file, folder or command that cannot be used; the message says what would be right."""


def check_key(key: Any, where: str, *, moves_weights: bool) -> str:
    """`key` as a recipe key.

    Args:
        key: What the file has.
        where: The place in the file, for the message.
        moves_weights: Whether settings that change no result are refused.

    Raises:
        StudyError: It is none, or one that a study sets itself.
    """
    known = keys_of(Recipe)
    if not isinstance(key, str) or key in known.sections or not known.is_known(key):
        raise StudyError(f"{where}: {key!r} is no key of a recipe{known.did_you_mean(str(key))}")
    if key in OWN or key.startswith(_STOPS) or (moves_weights and known.is_free(key)):
        raise StudyError(f"{where}: {key!r} cannot be set here ({_why_not(key)})")
    return key


def _why_not(key: str) -> str:
    if key == "seed":
        return "give the study's seeds"
    if key.startswith(_STOPS):
        return "all runs of a study train equally long"
    return "every run has a folder of its own" if key == "run_dir" else "it changes no result"


def label_of(value: Any) -> str:
    """A value's name in tables and file names: numbers in %g, whatever the file's spelling."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value)
