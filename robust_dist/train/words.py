"""The command line before it is parsed: which recipe is meant, and which words are no settings."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from robust_dist.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
_HELP = ("-h", "--help", "--print_config")


def check_words(words: Sequence[str]) -> None:
    """Refuse a command line that names no recipe, or settings that there are not.

    `--config` names a recipe; `--model.name` or `--data.name` write one on the command line.

    Raises:
        ValueError: Lists the recipes, or says for each unknown setting which ones are near.
    """
    keys = [word.partition("=")[0] for word in words if word.startswith("-")]
    if any(key in _HELP or key.endswith(".help") for key in keys):
        return
    known = dict(_settings(Recipe(), "--")) | {"--config": False}
    unknown = [key for key in keys if key.startswith("--") and not _is_known(key, known)]
    if unknown:
        raise ValueError("; ".join(_unknown(key, known) for key in unknown) + " (--help lists every setting)")
    if not {"--config", "--model.name", "--data.name"} & set(keys):
        raise ValueError(f"no recipe is given: name one with --config FILE.yaml{_listed()}")


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    """Each setting, and whether it has keys of its own that are free to choose."""
    for one in fields(section):
        value = getattr(section, one.name)
        yield prefix + one.name, isinstance(value, dict)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}{one.name}.")


def _is_known(key: str, known: dict[str, bool]) -> bool:
    key = key.removesuffix("+")
    return key in known or any(free and key.startswith(f"{name}.") for name, free in known.items())


def _unknown(key: str, known: dict[str, bool]) -> str:
    last = key.rpartition(".")[2].removeprefix("--")
    near = get_close_matches(key, known, n=3)
    # Right but for its section, as --lr.
    near += [name for name in known if name.rpartition(".")[2] == last and name not in near]
    return f"unknown setting {key}" + (f": did you mean {' or '.join(near[:3])}?" if near else "")


def _listed() -> str:
    found = sorted(RECIPES.glob("*.yaml"))
    if not found:
        return ""
    folder = RECIPES.relative_to(Path.cwd()) if RECIPES.is_relative_to(Path.cwd()) else RECIPES
    return f"; in {folder} there are: {', '.join(path.name for path in found)}"
