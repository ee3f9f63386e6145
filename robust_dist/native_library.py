"""The compiled libraries beside this package's modules: found, loaded through ctypes, or the reason why not."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(folder: Path, declare: Callable[[Any], None]) -> Any:
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
