"""The keys of a recipe: their dataclass metadata, their values as a tree or flat, and their checks."""

import math
import reprlib
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_origin, get_type_hints

from robust_dist.validate import whole_number

# Metadata of a key's field, or of a whole section's.
# It may change between two starts of a run, because it changes the weights by no more than rounding.
FREE: dict[str, Any] = {"free": True}
# It changes how long a training step takes.
COSTLY: dict[str, Any] = {"costly": True}
# Its value may name the user's own code, `module:Name` (robust_dist/own_code.py).
NAMES_CODE: dict[str, Any] = {"names_code": True}
# The name in a recipe of a part passed to `fit`.
OWN = "own"
# Above any count or size in a run; beyond it tensors and file names overflow.
MOST = 2**31 - 1


def only_for(*names: str) -> dict[str, Any]:
    """Metadata of a key that belongs to some values of its section's `name`."""
    return {"only_for": names}


def synonyms(**words: str) -> dict[str, Any]:
    """Metadata of a key that accepts synonyms for a value, as older versions' recipes may have."""
    return {"synonyms": words}


def default_of(of: "Field[Any]") -> Any:
    """The default of a dataclass field."""
    return of.default if of.default_factory is MISSING else of.default_factory()


@dataclass(frozen=True)
class Keys:
    """The dotted keys of a recipe's class.

    Attributes:
        sections: The class of each section.
        mappings: Type hints of keys that take names and values of the user's choice, such as `model.options`.
        values: Type hints of all other keys.
        free: Keys and sections that may change between two starts of a run.
        costly: Keys and sections that change how long a training step takes.
        names_code: Keys whose value may be a `module:Name`.
        synonyms: For each key that has some, its values' synonyms.
    """

    sections: dict[str, type]
    mappings: dict[str, Any]
    values: dict[str, Any]
    free: frozenset[str]
    costly: frozenset[str]
    names_code: frozenset[str]
    synonyms: dict[str, dict[str, str]]

    def owner(self, name: str) -> str | None:
        """The mapping that contains a dotted name."""
        return next((mapping for mapping in self.mappings if name.startswith(f"{mapping}.")), None)

    def is_known(self, name: str) -> bool:
        """Whether a dotted name is a key, a section or a name below a mapping."""
        return any(name in part for part in (self.sections, self.mappings, self.values)) or self.owner(name) is not None

    def in_our_words(self, flat: dict[str, Any]) -> dict[str, Any]:
        """Dotted keys and values, with synonyms replaced by the recipe's own values."""
        others = {key: words for key, words in self.synonyms.items() if isinstance(flat.get(key), str)}
        return flat | {key: words.get(flat[key], flat[key]) for key, words in others.items()}

    def is_free(self, name: str) -> bool:
        """Whether a key, or a section containing it, may change between two starts of a run."""
        return _says(self.free, name)

    def is_costly(self, name: str) -> bool:
        """Whether a key, or a section containing it, changes how long a training step takes."""
        return _says(self.costly, name)

    def did_you_mean(self, name: str, prefix: str = "") -> str:
        """The end of a message about an unknown key: the nearest ones, each after `prefix`, or ""."""
        known = [*self.values, *self.mappings, *self.sections]
        near = get_close_matches(name, known, n=2)
        # Right except for the section, as in `lr`.
        near += [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2] and other not in near]
        return f"; did you mean {' or '.join(repr(prefix + other) for other in near[:3])}?" if near else ""


def _says(names: frozenset[str], name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))


@cache
def keys_of(kind: type) -> Keys:
    """The keys of a dataclass of dataclasses."""
    found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = {}, {}, {}
    said: dict[str, set[str]] = {"free": set(), "costly": set(), "names_code": set()}
    words: dict[str, dict[str, str]] = {}
    sections, mappings, values = found
    for name, hint, of in _walk(kind, ""):
        place = sections if is_dataclass(hint) else mappings if get_origin(hint) is dict else values
        place[name] = hint
        for fact, names in said.items():
            if of.metadata.get(fact):
                names.add(name)
        if "synonyms" in of.metadata:
            words[name] = of.metadata["synonyms"]
    facts: dict[str, Any] = {fact: frozenset(names) for fact, names in said.items()}
    return Keys(*found, **facts, synonyms=words)


def _walk(kind: type, prefix: str) -> Iterator[tuple[str, Any, "Field[Any]"]]:
    hints = get_type_hints(kind)
    for of in fields(kind):
        hint = hints[of.name]
        yield prefix + of.name, hint, of
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{of.name}.")  # type: ignore[arg-type]


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as nested dicts of plain YAML values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return {name: plain(value) for name, value in asdict(recipe).items()}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; an empty dict leaves no key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def values_of(section: Any, kind: type, *left_out: str) -> dict[str, Any]:
    """A section's values by name, without those in `left_out`; for a subclass, only the keys of `kind`."""
    return {of.name: getattr(section, of.name) for of in fields(kind) if of.name not in left_out}


def require(ok: bool, setting: str, value: object, wanted: str) -> None:
    """Raise a ValueError that names the setting, its value and what would be right."""
    if not ok:
        raise ValueError(f"{setting}={reprlib.repr(value)} is not valid: it must be {wanted}")


def require_number(setting: str, value: float, low: float, high: float | None = None) -> None:
    """Raise a ValueError unless `value` is finite and from low to high (None: `MOST` for whole numbers)."""
    most = (MOST if isinstance(value, int) else math.inf) if high is None else high
    bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    bound += f", and at most {MOST}" if high is None and isinstance(value, int) and value > MOST else ""
    if isinstance(value, int) and not isinstance(value, bool):
        whole_number(setting, value, math.ceil(low), MOST if high is None else math.floor(high))
    # Not math.isfinite, which fails for ints too large for a float.
    require(low <= value <= most and value != math.inf, setting, value, f"a finite number, {bound}")
