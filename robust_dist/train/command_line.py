"""The command line of a recipe: files and keys in their order, and --help from the docstrings of its classes."""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from robust_dist.documents import config_names, dump_yaml
from robust_dist.own_code import allow
from robust_dist.private import hidden
from robust_dist.train.keys import default_of, keys_of, recipe_dict
from robust_dist.train.parse import Settings, SettingsError

_NAMES_A_RECIPE = ("--config", "--model.name", "--data.name")
_USAGE = (
    "robust-dist train [--accelerate FILE] --config RECIPE [--run_dir DIR] [--optimizer.lr 0.05 ...]   "
    "(--help lists every key)"
)


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
    settings, (found, stray) = Settings(kind), parser.parse_known_args(words)
    settings.problems += [f"the word {word!r} belongs to no setting" for word in stray]
    for name, raw in getattr(found, "given", []):
        if name == "config":
            settings.read(raw)
        elif name == "import":
            allow([raw])
        else:
            settings.word(name, raw)
    try:
        recipe = settings.recipe()
    except SettingsError as error:
        parser.error(str(error))
    if getattr(found, "print_config", False):
        print(dump_yaml(hidden(recipe_dict(recipe))), end="")
        parser.exit()
    return recipe


def check_recipe_is_named(words: Sequence[str]) -> None:
    """Refuse a command line that names no recipe, by `--config` or by `--model.name` or `--data.name`.

    Raises:
        ValueError: Lists the recipes.
    """
    if any(word.partition("=")[0] in _NAMES_A_RECIPE for word in words):
        return
    known = ", ".join(config_names("recipes"))
    raise ValueError(f"no recipe is given: name one with --config, a file or one of the package's: {known}")


class _Collect(argparse.Action):
    """Keeps the order of files and keys."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given = [*getattr(namespace, "given", []), (self.dest, values)]


def _parser(kind: type, words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=_USAGE, description=_first_paragraph(kind), allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    options: dict[str, Any] = {"action": _Collect}
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="a YAML file, or a recipe of the package by name",
        **options,
    )
    parser.add_argument(
        "--import",
        metavar="MODULE",
        help="take names (MODULE:NAME) of this installed module, too; without it only your own files' names are taken",
        **options,
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe, and stop")
    keys = keys_of(kind)
    _add_options(parser, kind, "", options)
    for name, section in keys.sections.items():
        group = parser.add_argument_group(name, _first_paragraph(section))
        group.add_argument(f"--{name}", metavar="{KEY: VALUE, ...}", help=argparse.SUPPRESS, **options)
        _add_options(group, section, f"{name}.", options)
    known = {"--", "--help", "--config", "--import", "--print_config"}
    known |= {f"--{name}" for part in (keys.sections, keys.mappings, keys.values) for name in part}
    # Names below a mapping, and unknown ones, which `Settings` refuses with all else that is wrong.
    for word in sorted({word.partition("=")[0] for word in words if word.startswith("--")} - known):
        nargs = None if keys.is_known(word[2:]) else "?"
        parser.add_argument(word, dest=word[2:], nargs=nargs, help=argparse.SUPPRESS, **options)
    return parser


def _add_options(group: Any, kind: type, prefix: str, options: dict[str, Any]) -> None:
    said, hints = _attributes(kind), get_type_hints(kind)
    for of in fields(kind):
        if not is_dataclass(hints[of.name]):
            text = f"{said.get(of.name, '')} (default: {default_of(of)})".replace("%", "%%")
            group.add_argument(f"--{prefix}{of.name}", metavar="VALUE", help=text, **options)


def _first_paragraph(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("%", "%%")


def _attributes(kind: type) -> dict[str, str]:
    """The attributes' texts in the docstrings of a class and of those that it extends."""
    said: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE)
        said |= {name: " ".join(text.split()) for name, text in found}
    return said
