"""Finding and reading JSON and YAML files, with errors that name the file and line.

`robust_dist/configs` is the checkout's `configs` folder, which the wheel includes.
"""

import dataclasses
import json
import math
import os
import re
import reprlib
import stat
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

CONFIGS = Path(__file__).parent / "configs"
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]')
Place = tuple[Any, ...]

MOST_BYTES = 1 << 20
_MOST_NODES = 50_000
_MOST_DEPTH = 40
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def find_config(kind: str, given: str | Path) -> Path:
    """The path of a file, or of the package's own file with that name.

    Args:
        kind: "recipes", "studies" or "accelerate".
        given: A path, or the name of one of the package's files, with or without `.yaml`. A file in the current folder
            takes precedence.

    Returns:
        The path. It is returned unchanged if there is no such file; the reader then reports that.
    """
    path = Path(given)
    if path.is_file() or len(path.parts) != 1:
        return path
    packaged = CONFIGS / kind / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
    return packaged if packaged.is_file() else path


def config_names(kind: str) -> list[str]:
    """The names that `find_config` accepts, sorted."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


class DocumentError(ValueError):
    """A file with unreadable or wrong content; the message names the file, and the line or key."""


def read_text(path: str | Path, most: int | None = None) -> str:
    """The text of a regular UTF-8 file, with or without a byte-order mark, of at most `most` bytes.

    Raises:
        FileNotFoundError: It does not exist.
        DocumentError: It is a folder or device, cannot be read, is too long, or is not UTF-8.
    """
    try:
        # Opening a pipe with this name must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DocumentError(f"{path}: not a regular file")
            if most is not None and found.st_size > most:
                raise DocumentError(f"{path}: has {found.st_size} bytes, more than the limit of {most}")
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
        raise DocumentError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def read_json(path: str | Path, kind: Any = Any, *, most: int | None = None) -> Any:
    """A JSON file of a known shape.

    Args:
        path: The file.
        kind: A type hint or a dataclass; the content is checked against it and returned as that type.
        most: The largest size accepted, in bytes.

    Raises:
        FileNotFoundError: It does not exist.
        DocumentError: It is torn or has another shape.
    """
    return parse_json(read_text(path, most), str(path), kind)


def parse_json(text: str, name: str, kind: Any = Any) -> Any:
    """JSON text parsed and checked as by `read_json`; messages begin with `name`.

    Raises:
        DocumentError: It is torn, has a duplicate key, or has another shape.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object)
        return data if kind is Any else typed(data, kind, name)
    except _TwiceError as error:
        raise DocumentError(f"{name}: {_both_lines(text, str(error))}") from None
    except json.JSONDecodeError as error:
        line = f", in line {error.lineno}" if "\n" in text.strip() else ""
        raise DocumentError(f"{name} is not JSON: {error.msg}{line}") from None
    except RecursionError:
        raise DocumentError(f"{name}: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{name}: {first_line(error)}") from None


class _TwiceError(Exception):
    """A duplicate key in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


def _both_lines(text: str, key: str) -> str:
    """The two lines of the first duplicate key."""
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
                return f"the key {found!r} is given twice, in lines {open_objects[-1][found]} and {line}; keep one"
            open_objects[-1][found] = line
        before, at = word, token.start()
    return f"the key {key!r} is given twice"


def typed(value: Any, hint: Any, where: str) -> Any:
    """Convert a plain value to a type hint: ints to floats, lists to tuples, dicts to dataclasses, nothing else.

    Unknown dataclass keys are ignored, so files from later versions stay readable.

    Args:
        value: A YAML or JSON value.
        hint: bool, int, float, str, None, Any, Literal, a union, list, tuple, dict or a dataclass of these.
        where: The key, for messages.

    Raises:
        DocumentError: It has another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, hint, inner, where)
    if origin is Literal:
        _require(any(value == choice and type(value) is type(choice) for choice in inner), value, hint, where)
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
    # Exact type first: 1 is an int before it is a float.
    for kind in sorted(inner, key=lambda kind: kind is not type(value)):
        try:
            return typed(value, kind, where)
        except DocumentError:
            continue
    _require(False, value, hint, where)


def _listed(value: Any, hint: Any, origin: Any, inner: tuple[Any, ...], where: str) -> Any:
    _require(isinstance(value, (list, tuple)), value, hint, where)
    if origin is tuple and inner[-1] is not Ellipsis:
        _require(len(value) == len(inner), value, hint, where)
        return tuple(
            typed(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, inner, strict=True))
        )
    return origin(typed(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))


def _filled(value: Any, hint: Any, where: str) -> Any:
    _require(isinstance(value, Mapping), value, hint, where)
    hints, given = get_type_hints(hint), {}
    for known in dataclasses.fields(hint):
        if known.name in value:
            given[known.name] = typed(value[known.name], hints[known.name], f"{where}: {known.name}")
        elif known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{where}: {known.name!r} is missing")
    return hint(**given)


def _require(ok: bool, value: Any, hint: Any, where: str) -> None:
    if not ok:
        raise DocumentError(f"{where}={reprlib.repr(value)} is not valid: it must be {described(hint)}")


def described(hint: Any) -> str:
    """A type hint in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(choice) for choice in inner)
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin is list:
        return f"a list, each {described(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {described(inner[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return "null" if hint in (None, type(None)) else words.get(hint, str(hint))


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Document:
    """The content of a YAML file.

    Attributes:
        data: dict, list, str, int, float, bool or None, nested.
        name: The file, for messages.
        lines: The line of each value's key, by its place: a tuple of keys and indices.
        texts: The spelling of unquoted scalars.
        doubts: Why a scalar such as 010 is ambiguous as a number; filled only on request.
    """

    data: Any
    name: str
    lines: dict[Place, int] = field(default_factory=dict)
    texts: dict[Place, str] = field(default_factory=dict)
    doubts: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """The file and line of a value."""
        return f"{self.name}, line {self.lines[place]}" if place in self.lines else self.name


def read_yaml(path: str | Path, *, doubts: bool = False) -> Document:
    """A YAML file; errors and `doubts` as for `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, MOST_BYTES), str(path), doubts=doubts)


def parse_yaml(text: str, name: str, *, doubts: bool = False) -> Document:
    """Parse YAML that has only one reading into plain data.

    Duplicate keys, tags, excessive aliases or nesting, and numbers that YAML 1.1 reads in a base other than ten, 010
    (octal) and 1:30 (base 60), are rejected.

    Args:
        text: The YAML; an empty text gives None.
        name: Where it comes from, for messages.
        doubts: Keep such numbers as text and record them, for a caller that knows where text is expected.

    Raises:
        DocumentError: The YAML is invalid or ambiguous.
    """
    import yaml

    document = Document(None, name)
    try:
        node = _loader()(text).get_single_node()
        data = None if node is None else _Reader(document, doubts).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise DocumentError(f"{name}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentError(f"{name}: is not YAML ({first_line(error)})") from None
    return dataclasses.replace(document, data=data)


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "tag", None) is not None:
                raise yaml.MarkedYAMLError(None, None, f"tags are not supported: {event.tag!r}", event.start_mark)
            self.depth += 1
            if self.depth > _MOST_DEPTH:
                raise yaml.MarkedYAMLError(None, None, f"nested more than {_MOST_DEPTH} levels deep", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader


class _Reader:
    """Converts YAML nodes to plain data, recording lines and spellings in the document."""

    def __init__(self, document: Document, doubts: bool) -> None:
        self.document, self.doubts, self.nodes = document, doubts, 0

    def value(self, node: Any, place: Place) -> Any:
        self.nodes += 1
        self.document.lines.setdefault(place, node.start_mark.line + 1)
        if self.nodes > _MOST_NODES:
            raise DocumentError(f"{self.document.name}: has more than {_MOST_NODES} values after expanding aliases")
        if len(place) > _MOST_DEPTH:
            raise DocumentError(f"{self.document.where(place)}: nested more than {_MOST_DEPTH} levels deep")
        if node.id == "sequence":
            return [self.value(inner, (*place, index)) for index, inner in enumerate(node.value)]
        if node.id == "mapping":
            return self._mapping(node, place)
        if node.style is not None:
            return str(node.value)
        self.document.texts[place] = node.value
        try:
            return scalar(node.value, self.document.where(place))
        except DocumentError as error:
            if not self.doubts:
                raise
            self.document.doubts[place] = str(error)
            return str(node.value)

    def _mapping(self, node: Any, place: Place) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            here = f"{self.document.name}, line {line}"
            if key_node.id != "scalar":
                raise DocumentError(f"{here}: a key must be a word or a number")
            key = "<<" if key_node.value == "<<" else self._key(key_node, here)
            if key in lines:
                raise DocumentError(
                    f"{self.document.name}: the key {'.'.join(map(str, (*place, key)))!r} is given twice, in lines "
                    f"{lines[key]} and {line}; keep one"
                )
            lines[key] = line
            if key == "<<" and key_node.style is None:
                merged = self._merged(value_node, place, here)
                continue
            below = (*place, key)
            self.document.lines[below] = line
            found[key] = self.value(value_node, below)
        return merged | found

    def _key(self, node: Any, here: str) -> Any:
        key = str(node.value) if node.style is not None else scalar(node.value, here)
        # A number equal to a bool, or NaN, could not be looked up again.
        return str(node.value) if isinstance(key, bool) or key != key else key

    def _merged(self, node: Any, place: Place, here: str) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for mapping in node.value if node.id == "sequence" else [node]:
            if mapping.id != "mapping":
                raise DocumentError(f"{here}: << takes a mapping or a list of mappings")
            self.nodes += 1
            merged = self._mapping(mapping, place) | merged
        return merged


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back unchanged: text that looks like a number is quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: Any, text: str) -> Any:
        try:
            plain = scalar(text) == text
        except DocumentError:
            plain = False
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")

    Dumper.add_representer(str, represent)
    # No aliases for repeated objects.
    Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def scalar(text: str, where: str = "") -> Any:
    """The value of an unquoted YAML word: None, bool, int, float or str.

    Raises:
        DocumentError: 010 or 1:30, which YAML 1.1 reads in another base; or a number that is too large.
    """
    if text in _NULL:
        return None
    if text.lower() in _TRUE + _FALSE and text in (text.lower(), text.upper(), text.capitalize()):
        return text.lower() in _TRUE
    before = f"{where}: " if where else ""
    if _OCTAL.fullmatch(text) or _BASE_60.fullmatch(text):
        base = "octal" if ":" not in text else "base 60"
        raise DocumentError(
            f"{before}{text} is read as {base} by YAML 1.1 but not by people; write the number in decimal, or quote "
            "it as text"
        )
    if _INT.fullmatch(text):
        try:
            return int(text.replace("_", ""), 0)
        except ValueError:
            raise DocumentError(f"{before}{reprlib.repr(text)} is not a number, or too long") from None
    if _FLOAT.fullmatch(text):
        number = float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
        if math.isinf(number) and "inf" not in text.lower():
            raise DocumentError(f"{before}{reprlib.repr(text)} is too large")
        return number
    return text
