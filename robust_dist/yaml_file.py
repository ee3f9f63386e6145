"""YAML as plain data, with nothing left to chance: read and written so that both agree."""

import dataclasses
import math
import re
import reprlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from robust_dist.documents import DocumentError, first_line, read_text

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


@dataclass(frozen=True)
class Document:
    """A YAML file's content.

    Attributes:
        data: dict, list, str, int, float, bool or None, nested.
        name: The file, for messages.
        lines: Where each value's key stands, by its place: a tuple of keys and indices.
        texts: How the unquoted scalars were written.
        doubts: Why a scalar, such as 010, is no number that everybody reads the same; only where they were asked for.
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
    """A YAML file.

    Args:
        path: The file.
        doubts: As `parse_yaml`.

    Raises:
        FileNotFoundError: There is none.
        DocumentError: As `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, MOST_BYTES), str(path), doubts=doubts)


def parse_yaml(text: str, name: str, *, doubts: bool = False) -> Document:
    """YAML as plain data, with nothing left to chance.

    Refused are keys that are given twice, tags, aliases or nesting beyond any use, and numbers that YAML 1.1 reads in
    another base than people do: 010 (octal) and 1:30 (base 60).

    Args:
        text: The YAML; an empty one is None.
        name: Where it is from, for messages.
        doubts: Keep such numbers as text, and note them: the caller knows where text is wanted.

    Raises:
        DocumentError: It is no such YAML.
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
        raise DocumentError(f"{name}: is no YAML ({first_line(error)})") from None
    return dataclasses.replace(document, data=data)


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "tag", None) is not None:
                raise yaml.MarkedYAMLError(None, None, f"tags are not taken: {event.tag!r}", event.start_mark)
            self.depth += 1
            if self.depth > _MOST_DEPTH:
                raise yaml.MarkedYAMLError(None, None, f"nested in more than {_MOST_DEPTH} levels", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader


class _Reader:
    """From YAML's nodes to plain data; notes lines and spellings in the document."""

    def __init__(self, document: Document, doubts: bool) -> None:
        self.document, self.doubts, self.nodes = document, doubts, 0

    def value(self, node: Any, place: Place) -> Any:
        self.nodes += 1
        self.document.lines.setdefault(place, node.start_mark.line + 1)
        if self.nodes > _MOST_NODES:
            raise DocumentError(f"{self.document.name}: has more than {_MOST_NODES} values, its aliases written out")
        if len(place) > _MOST_DEPTH:
            raise DocumentError(f"{self.document.where(place)}: nested in more than {_MOST_DEPTH} levels")
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
                    f"{self.document.name}: the key {_dotted((*place, key))!r} is given twice, in lines {lines[key]} "
                    f"and {line}; leave one"
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
        # A number equal to a bool, or a NaN that equals nothing, would not be found again.
        return str(node.value) if isinstance(key, bool) or key != key else key

    def _merged(self, node: Any, place: Place, here: str) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for one in node.value if node.id == "sequence" else [node]:
            if one.id != "mapping":
                raise DocumentError(f"{here}: << takes a mapping, or a list of them")
            self.nodes += 1
            merged = self._mapping(one, place) | merged
        return merged


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back the same: text that looks like a number is quoted."""
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
    # No alias where two values are one object.
    Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def scalar(text: str, where: str = "") -> Any:
    """What an unquoted word of YAML is: None, bool, int, float or str.

    Raises:
        DocumentError: 010 or 1:30, which YAML 1.1 reads in another base; or too large a number.
    """
    if text in _NULL:
        return None
    if text.lower() in _TRUE + _FALSE and text in (text.lower(), text.upper(), text.capitalize()):
        return text.lower() in _TRUE
    before = f"{where}: " if where else ""
    if _OCTAL.fullmatch(text) or _BASE_60.fullmatch(text):
        base = "octal" if ":" not in text else "base 60"
        raise DocumentError(
            f"{before}{text} is a number in {base} to YAML 1.1 and something else to people; write the number in "
            "decimal, or quote it as text"
        )
    if _INT.fullmatch(text):
        try:
            return int(text.replace("_", ""), 0)
        except ValueError:
            raise DocumentError(f"{before}{reprlib.repr(text)} is too long a number, or none") from None
    if _FLOAT.fullmatch(text):
        number = float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
        if math.isinf(number) and "inf" not in text.lower():
            raise DocumentError(f"{before}{reprlib.repr(text)} is too large a number")
        return number
    return text


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)
