"""The command line of a recipe: files and keys in their order, and the help that its classes' docstrings are."""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from robust_dist.private import hidden
from robust_dist.train.parse import Settings, SettingsError, keys_of
from robust_dist.yaml_file import dump_yaml

_USAGE = "train.py --config FILE.yaml [--run_dir DIR] [--optimizer.lr 0.05 ...]   (--help lists every key)"


def parse(kind: type, words: Sequence[str] | None) -> Any:
    """A recipe from a command line; later words over earlier ones, whether files or single keys.

    Args:
        kind: The recipe's class.
        words: `sys.argv`'s where None.

    Raises:
        SystemExit: Unknown keys or wrong types, which stderr names; or `--help`, `--print_config`.
        ValueError: A file that is no recipe, options that name code, or values out of range.
    """
    words = sys.argv[1:] if words is None else list(words)
    parser = _parser(kind, words)
    settings, found = Settings(kind), parser.parse_args(words)
    for name, raw in getattr(found, "given", []):
        if name == "config":
            settings.read(raw)
        else:
            settings.word(name, raw)
    try:
        recipe = settings.recipe()
    except SettingsError as error:
        parser.error(str(error))
    if getattr(found, "print_config", False):
        from robust_dist.train.recipe import recipe_dict

        print(dump_yaml(hidden(recipe_dict(recipe))), end="")
        parser.exit()
    return recipe


class _Collect(argparse.Action):
    """Keeps the order of files and keys."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given = [*getattr(namespace, "given", []), (self.dest, values)]


def _parser(kind: type, words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=_USAGE, description=_first_paragraph(kind), allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    options: dict[str, Any] = {"action": _Collect}
    parser.add_argument("--config", metavar="FILE", help="a recipe in YAML; keys after it change it", **options)
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe, and stop")
    keys = keys_of(kind)
    _add_options(parser, kind, "", options)
    for name, section in keys.sections.items():
        group = parser.add_argument_group(name, _first_paragraph(section))
        group.add_argument(f"--{name}", metavar="{KEY: VALUE, ...}", help=argparse.SUPPRESS, **options)
        _add_options(group, section, f"{name}.", options)
    below = {word.partition("=")[0] for word in words if word.startswith(tuple(f"--{name}." for name in keys.mappings))}
    for word in sorted(below):
        parser.add_argument(word, dest=word[2:], help=argparse.SUPPRESS, **options)
    return parser


def _add_options(group: Any, kind: type, prefix: str, options: dict[str, Any]) -> None:
    said, hints = _attributes(kind), get_type_hints(kind)
    for one in fields(kind):
        if not is_dataclass(hints[one.name]):
            default = one.default_factory() if callable(one.default_factory) else one.default
            text = f"{said.get(one.name, '')} (default: {default})".replace("%", "%%")
            group.add_argument(f"--{prefix}{one.name}", metavar="VALUE", help=text, **options)


def _first_paragraph(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("%", "%%")


def _attributes(kind: type) -> dict[str, str]:
    """What a class's docstring says of its attributes."""
    block = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
