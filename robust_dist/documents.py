"""The reader of this package's own files: JSON of a known shape, or an error that names file, line and key."""

import dataclasses
import json
import os
import re
import reprlib
import stat
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]')


class DocumentError(ValueError):
    """A file that cannot be read as what it should be; the message names the file, and the line or the key."""


def read_text(path: str | Path, most: int | None = None) -> str:
    """The text of a regular file in UTF-8, with or without a byte-order mark.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        FileNotFoundError: There is none.
        DocumentError: It is a folder or a device, cannot be read, is too long, or is not UTF-8.
    """
    try:
        # Not to wait for ever where a pipe bears the name.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DocumentError(f"{path}: is not a regular file")
            if most is not None and found.st_size > most:
                raise DocumentError(f"{path}: has {found.st_size} bytes, and at most {most} are read")
            content = file.read()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, DocumentError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DocumentError(f"{path}: cannot be read ({reason})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"{path}, line {line}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def read_json(path: str | Path, kind: Any = Any, *, most: int | None = None) -> Any:
    """A JSON file of a known shape.

    Args:
        path: The file.
        kind: A type hint, or a dataclass whose fields the object has: what is checked, and what is returned.
        most: Bytes that it may have.

    Raises:
        FileNotFoundError: There is none.
        DocumentError: It is torn, or of another shape.
    """
    return parse_json(read_text(path, most), str(path), kind)


def parse_json(text: str, name: str, kind: Any = Any) -> Any:
    """JSON of a known shape; keys that are given twice are an error.

    Args:
        text: The JSON.
        name: Where it is from, for messages.
        kind: As `read_json`.

    Raises:
        DocumentError: It is torn, or of another shape.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object)
        return data if kind is Any else typed(data, kind, name)
    except _TwiceError as error:
        raise DocumentError(f"{name}: {_both_lines(text, str(error))}") from None
    except json.JSONDecodeError as error:
        line = f", in line {error.lineno}" if "\n" in text.strip() else ""
        raise DocumentError(f"{name} is no JSON: {error.msg}{line}") from None
    except RecursionError:
        raise DocumentError(f"{name}: is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{name}: {first_line(error)}") from None


class _TwiceError(Exception):
    """A key that is given twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


def _both_lines(text: str, key: str) -> str:
    """Where the first object that has a key twice has it."""
    open_objects: list[dict[str, int]] = []
    before, at = "", 0
    for token in _JSON_TOKEN.finditer(text):
        word = token.group()
        if word in "{[":
            open_objects.append({})
        elif word in "}]" and open_objects:
            open_objects.pop()
        elif word == ":" and open_objects and before.startswith('"'):
            found, line = json.loads(before, strict=False), text.count("\n", 0, at) + 1
            if found in open_objects[-1]:
                return f"the key {found!r} is given twice, in lines {open_objects[-1][found]} and {line}; leave one"
            open_objects[-1][found] = line
        before, at = word, token.start()
    return f"the key {key!r} is given twice"


def typed(value: Any, hint: Any, where: str) -> Any:
    """A plain value as a type hint says: ints become floats, lists tuples, dicts dataclasses; nothing else changes.

    Keys that a dataclass does not know are left out, so that files of later versions can be read.

    Args:
        value: Of YAML or JSON.
        hint: bool, int, float, str, None, Any, Literal, a union, list, tuple, dict or a dataclass of such.
        where: The key, for the message.

    Raises:
        DocumentError: It is of another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, hint, inner, where)
    if origin is Literal:
        _require(any(value == one and type(value) is type(one) for one in inner), value, hint, where)
        return value
    if dataclasses.is_dataclass(hint):
        return _filled(value, hint, where)
    if origin in (list, tuple):
        return _listed(value, hint, origin, inner, where)
    if origin is dict or hint is dict:
        _require(isinstance(value, Mapping), value, hint, where)
        kinds = inner or (Any, Any)
        return {typed(k, kinds[0], f"a key of {where}"): typed(v, kinds[1], f"{where}.{k}") for k, v in value.items()}
    return _leaf(value, hint, where)


def _leaf(value: Any, hint: Any, where: str) -> Any:
    kind = type(None) if hint is None else hint
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            _require(False, value, hint, where)
    _require(type(value) is kind, value, hint, where)
    return value


def _one_of(value: Any, hint: Any, inner: tuple[Any, ...], where: str) -> Any:
    # The exact type first: 1 is an int before it is a float.
    for one in sorted(inner, key=lambda one: one is not type(value)):
        try:
            return typed(value, one, where)
        except DocumentError:
            continue
    _require(False, value, hint, where)


def _listed(value: Any, hint: Any, origin: Any, inner: tuple[Any, ...], where: str) -> Any:
    _require(isinstance(value, (list, tuple)), value, hint, where)
    if origin is tuple and inner[-1] is not Ellipsis:
        _require(len(value) == len(inner), value, hint, where)
        return tuple(typed(one, kind, f"{where}[{i}]") for i, (one, kind) in enumerate(zip(value, inner, strict=True)))
    return origin(typed(one, inner[0], f"{where}[{i}]") for i, one in enumerate(value))


def _filled(value: Any, hint: Any, where: str) -> Any:
    _require(isinstance(value, Mapping), value, hint, where)
    hints, given = get_type_hints(hint), {}
    for one in dataclasses.fields(hint):
        if one.name in value:
            given[one.name] = typed(value[one.name], hints[one.name], f"{where}: {one.name}")
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{where}: {one.name!r} is missing")
    return hint(**given)


def _require(ok: bool, value: Any, hint: Any, where: str) -> None:
    if not ok:
        raise DocumentError(f"{where}={reprlib.repr(value)} is not valid: it must be {described(hint)}")


def described(hint: Any) -> str:
    """A type hint in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in inner)
    if origin is Literal:
        return " or ".join(str(one) for one in inner)
    if origin is list:
        return f"a list, each {described(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {described(inner[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return "null" if hint in (None, type(None)) else words.get(hint, str(hint))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
