"""Optional packages: importing one with a clear error, and which of the package's own extras are complete."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType

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
        ImportError: the module is not installed; names the `purpose` and the pip command that mends it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        message = f"{purpose} needs {package}: pip install '{PACKAGE}[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error


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
    """What the installed package's own metadata ask for `extra`; an extra of ours in it is resolved.

    Raises:
        importlib.metadata.PackageNotFoundError: the package runs from a bare folder.
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
