"""Importing the user's own code, named as `module:Name` in a recipe or study, and nothing else.

Allowed are files and packages in the current folder or in a folder on PYTHONPATH, and modules named on the command
line with `--import`. Python's own modules and installed packages are rejected unless they are named there.
"""

import argparse
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAME = re.compile(rf"{_MODULE.pattern}:[^\W\d]\w*")
_INSTALLED = {"site-packages", "dist-packages"}
# Files that mark a folder as a run or an export.
_RUNS = (("recipe.yaml", "data.json", "checkpoints"), ("model.json", "model.safetensors"))
_found: dict[str, Any] = {}
# Modules allowed on the command line.
named: set[str] = set()


class OwnCodeError(ValueError):
    """A name in a recipe that cannot be imported, or whose value is not what the key needs."""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--import MODULE` to a command's parser, stored as `imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="also allow MODULE:NAME from this installed module; by default only your own files are allowed",
    )


def is_name(value: str) -> bool:
    """Whether a value has the form `module:Name`."""
    return ":" in value


def check_form(key: str, value: str) -> None:
    """Reject a malformed `module:Name`; nothing is imported.

    Raises:
        OwnCodeError: It is not a dotted module, a colon and a name.
    """
    if not _NAME.fullmatch(value):
        raise OwnCodeError(f"{key}={value!r} is not valid: write MODULE:NAME, as in my_code:Net or my_package.nets:Net")


def allow(modules: Iterable[str]) -> None:
    """Allow names from these modules and their submodules, wherever they are installed.

    Raises:
        OwnCodeError: One of them is not a dotted module name.
    """
    for module in modules:
        if not _MODULE.fullmatch(module):
            raise OwnCodeError(f"--import {module}: write the dotted name of a module, as in --import timm.models")
        named.add(module)


def load(key: str, value: str) -> Any:
    """Import the object named by `module:Name`, if allowed. `key` is for messages.

    Raises:
        OwnCodeError: The module is not the user's own, does not exist or cannot be imported, or it lacks the name.
    """
    if value not in _found:
        check_form(key, value)
        module, _, name = value.partition(":")
        held = _imported(key, value, module)
        if not hasattr(held, name):
            close = get_close_matches(name, [other for other in vars(held) if not other.startswith("__")], n=3)
            guess = f"; did you mean {' or '.join(f'{module}:{other}' for other in close)}?" if close else ""
            raise OwnCodeError(f"{key}={value!r}: {held.__file__ or module} has no name {name!r}{guess}")
        _found[value] = getattr(held, name)
    return _found[value]


def call(key: str, value: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a user's object.

    Raises:
        OwnCodeError: It does not accept these arguments, or it raises; the message names the line.
    """
    check_call(key, value, function, *args, **kwargs)
    try:
        return function(*args, **kwargs)
    except Exception as error:  # User code can raise anything.
        raise OwnCodeError(f"{key}={value!r} failed: {_where(error)}") from error


def check_call(key: str, value: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Reject arguments that do not fit the signature, without calling."""
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        words = [type(arg).__name__ for arg in args] + [f"{name}={arg!r}" for name, arg in kwargs.items()]
        name = value.partition(":")[2]
        raise OwnCodeError(
            f"{key}={value!r} cannot be called as {name}({', '.join(words)}); its signature is {name}{signature}: "
            f"{error}"
        ) from None


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function or class has a parameter of this name."""
    signature = _signature(function)
    return signature is not None and name in signature.parameters


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function or class accepts arbitrary keyword arguments."""
    signature = _signature(function)
    return signature is not None and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def wrong(key: str, value: str, found: Any, wanted: str) -> OwnCodeError:
    """The error for a name whose value is not of the kind that the key needs."""
    what = f"the {type(found).__name__} {found.__name__}" if hasattr(found, "__name__") else f"a {type(found).__name__}"
    return OwnCodeError(f"{key}={value!r} is {what}; it must be {wanted}")


def source_of(value: str) -> tuple[str, str]:
    """File and SHA-256 of the module that defines a loaded name; ("", "") if it has no file."""
    module = sys.modules[value.partition(":")[0]]
    defined = sys.modules.get(getattr(_found[value], "__module__", ""), module)
    # For a name imported from an installed package, the importing module is the source.
    ours = defined if defined.__name__.partition(".")[0] == module.__name__.partition(".")[0] else module
    if ours.__file__ is None:
        return "", ""
    return ours.__file__, hashlib.sha256(Path(ours.__file__).read_bytes()).hexdigest()


def folders() -> list[Path]:
    """Folders of the user's modules: the current one and those on PYTHONPATH, except runs and Python's own."""
    given = [Path.cwd(), *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    return [folder for folder in dict.fromkeys(path.absolute() for path in given) if not _is_foreign(folder)]


def _is_foreign(folder: Path) -> bool:
    real = folder.resolve()
    pythons = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    if _INSTALLED & {*folder.parts, *real.parts} or real in pythons:
        return True
    return any(all((above / name).exists() for name in names) for above in (real, *real.parents) for names in _RUNS)


def _imported(key: str, value: str, module: str) -> ModuleType:
    importlib.invalidate_caches()
    if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in named):
        _check_own(key, value, module)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # An import can raise anything.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise OwnCodeError(f"{key}={value!r}: there is no module {error.name!r}{_near(error.name)}") from None
        raise OwnCodeError(f"{key}={value!r}: {module} cannot be imported: {_where(error)}") from error


def _check_own(key: str, value: str, module: str) -> None:
    """Reject a module that is not the user's own, before anything is imported."""
    top = module.partition(".")[0]
    folder = _folder_of(top)
    if folder is None:
        raise _refusal(key, value, top)
    if str(folder) not in sys.path:
        # Last: a file in this folder must not shadow a package that others import.
        sys.path.append(str(folder))
    spec = _spec(top)
    if spec is None or not all(_lies_below(place, folder) for place in _places(spec)):
        other = f" ({', '.join(_places(spec))})" if spec and _places(spec) else ""
        raise OwnCodeError(f"{key}={value!r}: another module {top!r}{other} shadows the one in {folder}; rename yours")


def _folder_of(top: str) -> Path | None:
    if top in sys.stdlib_module_names or top == "robust_dist":
        return None
    found = [(folder, PathFinder.find_spec(top, [str(folder)])) for folder in folders()]
    # A folder without __init__.py is a package only if nothing else has its name.
    whole = [folder for folder, spec in found if spec is not None and spec.origin is not None]
    return next(iter(whole + [folder for folder, spec in found if spec is not None]), None)


def _spec(top: str) -> ModuleSpec | None:
    try:
        return find_spec(top)
    except ValueError:
        return None


def _places(spec: ModuleSpec) -> list[str]:
    return [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or ())


def _lies_below(place: str, folder: Path) -> bool:
    path = Path(place)
    return path.absolute().is_relative_to(folder) or path.resolve().is_relative_to(folder.resolve())


def _refusal(key: str, value: str, top: str) -> OwnCodeError:
    where = "in the current folder or in a folder on PYTHONPATH"
    if _spec(top) is None and top not in sys.modules:
        return OwnCodeError(
            f"{key}={value!r}: there is no module {top!r}{_near(top)}. It must be your own file or package "
            f"{where} ({_listed()}), or an installed module that the command line allows: --import MODULE"
        )
    return OwnCodeError(
        f"{key}={value!r} is refused: a recipe imports only your own code, and {top!r} is not yours. Name a file or "
        f"package {where} ({_listed()}); or, for an installed module that you trust, add "
        f"--import {value.partition(':')[0]} to the command line"
    )


def _listed() -> str:
    return ", ".join(map(str, folders())) or "none here: the current folder is a run's or Python's own"


def _near(module: str) -> str:
    """A suggestion of similar file names, for a message about a missing module."""
    there = [path.stem for folder in folders() for path in folder.glob("*.py")]
    close = get_close_matches(module, there, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _where(error: BaseException) -> str:
    """An error with the last line of the user's own code in its traceback."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said.partition(' (')[0]} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else said


def _is_users(file: str) -> bool:
    path = Path(file)
    installed = _INSTALLED & set(path.parts) or path.is_relative_to(Path(__file__).parent)
    return not installed and any(_lies_below(file, folder) for folder in folders())
