"""What an installation may lack: optional packages and extras, what others add by entry points, compiled libraries."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGE = "robust_dist"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*)")
EXTRA = re.compile(r"extra\s*==\s*[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Requirement:
    """One package that an extra asks for: its name, and the lowest version (None: any)."""

    name: str
    at_least: str | None

    def problem(self) -> str | None:
        """What is wrong with the installed package, or None."""
        try:
            found = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return f"{self.name} is missing"
        if self.at_least and version_tuple(found) < version_tuple(self.at_least):
            return f"{self.name} is {found}, {self.at_least} or later is needed"
        return None


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional `module`.

    Raises:
        ImportError: It is not installed; names the `purpose` and the pip command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        message = f"{purpose} needs {package}: pip install '{PACKAGE}[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error


def added(group: str, name: str, kind: type[T]) -> T | None:
    """The object that an installed package adds under a name by an entry point; None where none does.

    Raises:
        ValueError: As `load_entry_point`; or several packages add the name.
    """
    found = metadata.entry_points(group=group, name=name)
    if len(found) > 1:
        raise ValueError(f"several packages add {name!r} by entry points in the group {group!r}; leave one installed")
    return load_entry_point(next(iter(found)), kind) if found else None


def load_entry_point(point: metadata.EntryPoint, kind: type[T], error: type[Exception] = ValueError) -> T:
    """The value of an entry point.

    Raises:
        ValueError: It cannot be loaded, or is of another class than `kind`; `error`, where that is given.
    """
    where = f"the entry point {point.name} = {point.value} in the group {point.group!r}"
    try:
        value = point.load()
    except Exception as cause:  # An import can raise anything.
        raise error(f"{where} cannot be loaded ({cause}); repair or remove the package that has it") from cause
    if not isinstance(value, kind):
        raise error(f"{where} is of the class {type(value).__name__}; it must be of the class {kind.__name__}")
    return value


def version_tuple(version: str) -> tuple[int, ...]:
    """The release numbers of a version without trailing zeros: "2.10.0+cu130" is (2, 10)."""
    numbers = re.match(r"[0-9.]*", version)
    parts = [int(part) for part in (numbers.group() if numbers else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def extra_names() -> list[str]:
    """The extras of the installed package; raises PackageNotFoundError where it runs from a bare folder."""
    return metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def extra_requirements(extra: str) -> list[Requirement]:
    """The requirements of `extra` by the installed package's metadata; an extra of ours in it is resolved.

    Raises:
        importlib.metadata.PackageNotFoundError: The package runs from a bare folder.
    """
    return list(dict.fromkeys(_resolve(extra)))


def _resolve(extra: str) -> Iterator[Requirement]:
    for line in metadata.requires(PACKAGE) or []:
        marker = EXTRA.search(line)
        if marker is None or _normal(marker.group(1)) != _normal(extra):
            continue
        name, inner, specifier = _parse(line)
        if _normal(name) == _normal(PACKAGE):
            for other in inner:
                yield from _resolve(other)
        else:
            yield Requirement(name, specifier)


def _parse(line: str) -> tuple[str, list[str], str | None]:
    match = REQUIREMENT.match(line)
    assert match is not None, line
    name, extras, specifier = match.groups()
    lowest = re.search(r">=\s*([0-9][^,\s)]*)", specifier)
    return name, [part.strip() for part in (extras or "").split(",") if part.strip()], lowest and lowest.group(1)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def load_library(folder: Path, declare: Callable[[Any], None]) -> Any:
    """The library `_fused*.so` of a folder, or why there is none, as a str.

    Args:
        folder: Where it was built.
        declare: Sets the types of the functions that are called; a library of older sources lacks some.
    """
    files = sorted(folder.glob("_fused*.so"))
    if not files:
        return (
            "it was not built: the installation found no C compiler with OpenMP; install gcc and then the package again"
        )
    try:
        found = ctypes.CDLL(str(files[0]))
        declare(found)
    except OSError as error:
        return f"{files[0].name} cannot be loaded: {error}"
    except AttributeError as error:
        return f"{files[0].name} was built from other sources ({error}); install the package again"
    return found
