"""Optional parts of an installation: packages, extras, entry points of other packages, compiled libraries."""

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
    """A package required by an extra: its name and lowest version (None: any)."""

    name: str
    at_least: str | None

    def problem(self) -> str | None:
        """What is wrong with the installed package, or None."""
        try:
            found = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return f"{self.name} is missing"
        if self.at_least and version_tuple(found) < version_tuple(self.at_least):
            return f"{self.name} is {found}, {self.at_least} or later is required"
        return None


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional `module`.

    Raises:
        ImportError: It is not installed; the message names the `purpose` and the pip command that installs it.
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
    """The object registered under a name by an installed package's entry point, or None.

    Raises:
        ValueError: As for `load_entry_point`, or several packages register the name.
    """
    found = metadata.entry_points(group=group, name=name)
    if len(found) > 1:
        raise ValueError(f"several packages add {name!r} as entry points in {group!r}; keep only one installed")
    return load_entry_point(next(iter(found)), kind) if found else None


def load_entry_point(point: metadata.EntryPoint, kind: type[T], error: type[Exception] = ValueError) -> T:
    """The value of an entry point.

    Raises:
        ValueError: It cannot be loaded or is not a `kind`; raised as `error` if given.
    """
    where = f"the entry point {point.name} = {point.value} in the group {point.group!r}"
    try:
        value = point.load()
    except Exception as cause:  # An import can raise anything.
        raise error(f"{where} cannot be loaded ({cause}); repair or remove the package that provides it") from cause
    if not isinstance(value, kind):
        raise error(f"{where} is a {type(value).__name__}; it must be a {kind.__name__}")
    return value


def version_tuple(version: str) -> tuple[int, ...]:
    """The release numbers of a version without trailing zeros: "2.10.0+cu130" gives (2, 10)."""
    numbers = re.match(r"[0-9.]*", version)
    parts = [int(part) for part in (numbers.group() if numbers else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def extra_names() -> list[str]:
    """The extras of the installed package; raises PackageNotFoundError if it is not installed."""
    return metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def extra_requirements(extra: str) -> list[Requirement]:
    """The requirements of `extra` in the installed package's metadata, with our own extras resolved.

    Raises:
        importlib.metadata.PackageNotFoundError: The package is not installed.
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
    """The library `_fused*.so` in a folder, or a str that says why there is none.

    Args:
        folder: Where it was built.
        declare: Sets the types of the functions to be called; a library built from older sources lacks some of them.
    """
    files = sorted(folder.glob("_fused*.so"))
    if not files:
        return "it was not built: the installation found no C compiler with OpenMP; install gcc, then reinstall"
    try:
        found = ctypes.CDLL(str(files[0]))
        declare(found)
    except OSError as error:
        return f"{files[0].name} cannot be loaded: {error}"
    except AttributeError as error:
        return f"{files[0].name} was built from other sources ({error}); reinstall the package"
    return found
