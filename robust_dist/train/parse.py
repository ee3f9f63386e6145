"""From YAML files and a command line to a recipe, which is data: reading it imports and calls nothing."""

import argparse
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from robust_dist.documents import (
    Document,
    DocumentError,
    Place,
    config_names,
    dump_yaml,
    find_config,
    parse_yaml,
    read_yaml,
    scalar,
    typed,
)
from robust_dist.own_code import allow
from robust_dist.private import HIDDEN, hidden, without_hidden
from robust_dist.train.keys import default_of, keys_of, recipe_dict

_CODE = ("class_path", "init_args")
_NULLS = ("", "~", "null", "Null", "NULL")
_NAMES_A_RECIPE = ("--config", "--model.name", "--data.name")
_USAGE = (
    "robust-dist train [--accelerate FILE] --config RECIPE [--run_dir DIR] [--optimizer.lr 0.05 ...]   "
    "(--help lists every key)"
)


class Settings:
    """The settings of a recipe of class `kind`, from files, words and studies; later ones replace earlier ones."""

    def __init__(self, kind: type) -> None:
        self.kind, self.keys = kind, keys_of(kind)
        self._given: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self.problems: list[str] = []

    def read(self, path: str | Path) -> None:
        """Read a YAML file, or one of the package's recipes by name.

        Raises:
            DocumentError: It is missing, not YAML, or has a duplicate key.
        """
        try:
            document = read_yaml(find_config("recipes", path), doubts=True)
        except FileNotFoundError:
            known = ", ".join(config_names("recipes"))
            raise DocumentError(f"--config {path}: there is no such file or recipe; known are {known}") from None
        self.take(document, document.data, (), "")

    def take(
        self, document: Document, data: Any, place: Place, prefix: str, seen: dict[str, str] | None = None
    ) -> None:
        """Add a mapping at a place in a document; `prefix` is its section, `seen` has the places of earlier keys."""
        if data is None:
            return
        if not isinstance(data, Mapping):
            self.problems.append(f"{document.where(place)}: {prefix[:-1] or 'a recipe'} must be a mapping of keys")
            return
        seen = {} if seen is None else seen
        for key, value in data.items():
            name, below = f"{prefix}{key}", (*place, key)
            where = document.where(below)
            if name in seen:
                raise DocumentError(
                    f"{where}: the key {name!r} is given twice, the first time in {seen[name]}; keep one"
                )
            seen[name] = where
            if name in self.keys.sections:
                self.take(document, value, below, f"{name}.", seen)
            else:
                self.set(name, document, value, below)

    def set(self, name: str, document: Document, value: Any, place: Place = ()) -> None:
        """Set one key to a document's value, as spelled there if the key takes text."""
        where = document.where(place)
        owner = self.keys.owner(name)
        if name in self.keys.values:
            self._note(name, _fitted(document, place, value, self.keys.values[name]), where)
        elif name in self.keys.mappings:
            _refuse_doubts(document, place)
            self._note(name, {} if value is None else value, where)
        elif owner is not None:
            _refuse_doubts(document, place)
            self._set_below(owner, name, value, where)
        else:
            self.problems.append(f"{where}: a recipe has no key {name!r}{self.keys.did_you_mean(name)}")

    def word(self, name: str, raw: str) -> None:
        """Set one key from a command-line word."""
        option = f"--{name}"
        if not self.keys.is_known(name):
            hint = self.keys.did_you_mean(name, "--")
            self.problems.append(f"unknown setting {option}{hint} (--help lists every setting)")
        elif name in self.keys.sections:
            document = parse_yaml(raw, option)
            self.take(document, document.data, (), f"{name}.")
        elif name in self.keys.values:
            hint = self.keys.values[name]
            text = (
                _takes_text(hint, raw) and not (raw in _NULLS and NoneType in _kinds(hint)) and not _is_list(raw, hint)
            )
            document = Document(raw, option) if text else parse_yaml(raw, option)
            self.set(name, document, document.data)
        else:
            # An option of an option: text, unless written as a number, boolean, list or mapping.
            value = parse_yaml(raw, option).data if raw[:1] in ("[", "{", '"', "'") else scalar(raw, option)
            self.set(name, Document(value, option), value)

    def recipe(self) -> Any:
        """Build the recipe.

        Raises:
            SettingsError: Unknown or empty keys, or wrong types, with out-of-range values if there are any.
            ValueError: Only out-of-range values; or options that name code.
        """
        found: dict[str, Any] = {}
        for name, value in self._given.items():
            where = self._where[name]
            try:
                if name in self.keys.mappings:
                    check_plain(value, name, where)
                    found[name] = without_hidden(typed(value, dict[str, Any], name))
                else:
                    found[name] = self._checked(name, value)
                if HIDDEN in str(found[name]):
                    raise DocumentError(
                        f"{name} has {HIDDEN} in place of a password in a URL; give the whole URL again"
                    )
            except _CodeError:
                raise
            except DocumentError as error:
                said = str(error)
                self.problems.append(said if where in (name, f"--{name}") else f"{where}: {said}")
        try:
            built = _build(self.kind, found)
        except ValueError as error:
            if not self.problems:
                raise
            self.problems.append(str(error))
        if self.problems:
            raise SettingsError("\n  ".join(self.problems))
        return built

    def _checked(self, name: str, value: Any) -> Any:
        hint = self.keys.values[name]
        if value is None and NoneType not in _kinds(hint):
            raise DocumentError(f"{name} is empty; give it a value, or leave the key out for its default")
        return typed(value, hint, name)

    def _note(self, name: str, value: Any, where: str) -> None:
        self._given[name], self._where[name] = value, where

    def _set_below(self, owner: str, name: str, value: Any, where: str) -> None:
        before = self._given.get(owner, {})
        self._note(owner, _with(before, name.removeprefix(f"{owner}.").split("."), value), where)


class SettingsError(DocumentError):
    """Unknown keys and values of the wrong type; all of them."""


class _CodeError(DocumentError):
    """Data that asks for code to be run."""


def _with(before: Any, path: list[str], value: Any) -> dict[str, Any]:
    """The mapping with one more entry at the end of a path; the argument is not changed."""
    copy = dict(before) if isinstance(before, Mapping) else {}
    copy[path[0]] = value if len(path) == 1 else _with(copy.get(path[0]), path[1:], value)
    return copy


def check_plain(value: Any, key: str, where: str) -> None:
    """Reject options that are not plain values, and `class_path`, which makes libraries import what a file names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in _CODE:
                raise _CodeError(
                    f"{where}: {key}.{name} is not allowed: a recipe is data, and nothing named in it is imported or "
                    "called"
                )
            check_plain(inner, f"{key}.{name}", where)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            check_plain(inner, f"{key}[{index}]", where)
    elif not isinstance(value, (str, int, float, NoneType)):
        raise DocumentError(f"{key} must consist of plain values, not {type(value).__name__}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _takes_text(hint: Any, text: str) -> bool:
    return any(member is str or (get_origin(member) is Literal and text in get_args(member)) for member in _kinds(hint))


def _is_list(raw: str, hint: Any) -> bool:
    """Whether a word for a key that takes text or a list is a list; [0-9]*.tar is not."""
    if not raw.startswith("[") or not any(get_origin(member) is list for member in _kinds(hint)):
        return False
    try:
        return isinstance(parse_yaml(raw, "").data, list)
    except DocumentError:
        return False


def _fitted(document: Document, place: Place, value: Any, hint: Any) -> Any:
    """A value in the form its key takes: `no` and 007 are text for a text key, and "0.1" is a number elsewhere."""
    if isinstance(value, list):
        inner = next((get_args(member) for member in _kinds(hint) if get_origin(member) in (list, tuple)), ())
        hints = [inner[min(index, len(inner) - 1)] if inner else Any for index in range(len(value))]
        return [
            _fitted(document, (*place, i), item, kind) for i, (item, kind) in enumerate(zip(value, hints, strict=True))
        ]
    text = document.texts.get(place)
    if text is not None and value is not None and _takes_text(hint, text):
        return text
    _refuse_doubts(document, place)
    if isinstance(value, str) and hint is not Any and not _takes_text(hint, value):
        again = parse_yaml(value, document.where(place)).data
        return _fitted(Document(again, document.name), (), again, hint) if isinstance(again, list) else again
    return value


def fitted(kind: type, document: Document, place: Place, value: Any, key: str) -> Any:
    """A document's value in the form a key of the recipe's class takes; see `Settings.set`."""
    hint = keys_of(kind).values.get(key)
    return value if hint is None else _fitted(document, place, value, hint)


def _refuse_doubts(document: Document, place: Place) -> None:
    for at, why in document.doubts.items():
        if at[: len(place)] == place:
            raise DocumentError(why)


def _build(kind: type, found: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass from dotted keys; errors of its sections are reported together."""
    refused: list[str] = []
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for of in fields(kind):
        name, hint = prefix + of.name, hints[of.name]
        try:
            if is_dataclass(hint):
                given[of.name] = _build(hint, found, f"{name}.")  # type: ignore[arg-type]
            elif name in found:
                given[of.name] = found[name]
        except ValueError as error:
            refused.append(str(error))
    try:
        built = kind(**given)
    except ValueError as error:
        refused.append(str(error))
    if refused:
        raise ValueError("\n  ".join(refused))
    return built


def parse(kind: type, words: Sequence[str] | None) -> Any:
    """A recipe of class `kind` from a command line (None: `sys.argv`); later words replace earlier ones.

    Raises:
        SystemExit: Unknown keys or wrong types, named on stderr; or `--help`, `--print_config`.
        ValueError: A file that is not a recipe, options that name code, or values out of range.
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
    """Reject a command line without `--config`, `--model.name` or `--data.name`; the ValueError lists the recipes."""
    if any(word.partition("=")[0] in _NAMES_A_RECIPE for word in words):
        return
    known = ", ".join(config_names("recipes"))
    raise ValueError(f"no recipe is given: set --config to a file or one of the package's: {known}")


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
        help="a YAML file, or the name of one of the package's recipes",
        **options,
    )
    parser.add_argument(
        "--import",
        metavar="MODULE",
        help="also allow MODULE:NAME from this installed module; by default only your own files are allowed",
        **options,
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe and exit")
    keys = keys_of(kind)
    _add_options(parser, kind, "", options)
    for name, section in keys.sections.items():
        group = parser.add_argument_group(name, _first_paragraph(section))
        group.add_argument(f"--{name}", metavar="{KEY: VALUE, ...}", help=argparse.SUPPRESS, **options)
        _add_options(group, section, f"{name}.", options)
    known = {"--", "--help", "--config", "--import", "--print_config"}
    known |= {f"--{name}" for part in (keys.sections, keys.mappings, keys.values) for name in part}
    # Names below a mapping, and unknown ones, which `Settings` reports with all other errors.
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
    """The attribute descriptions in the docstrings of a class and its bases."""
    said: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE)
        said |= {name: " ".join(text.split()) for name, text in found}
    return said
