"""Checks of a recipe's values, with errors that name the setting."""

import math
import reprlib

from robust_dist.validate import whole_number

# What a recipe calls a part that `fit` was given.
OWN = "own"


def require(ok: bool, setting: str, value: object, wanted: str) -> None:
    """Raise a ValueError that names the setting, its value and what would be right."""
    if not ok:
        raise ValueError(f"{setting}={reprlib.repr(value)} is not valid: it must be {wanted}")


# More than any count, size or number of steps of a run; beyond it tensors and file names overflow.
MOST = 2**31 - 1


def require_number(setting: str, value: float, low: float, high: float | None = None) -> None:
    """Raise a ValueError unless `value` is finite and lies in low to high (`MOST` for whole numbers where None)."""
    most = (MOST if isinstance(value, int) else math.inf) if high is None else high
    bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    bound += f", and at most {MOST}" if high is None and isinstance(value, int) and value > MOST else ""
    if isinstance(value, int) and not isinstance(value, bool):
        whole_number(setting, value, math.ceil(low), MOST if high is None else math.floor(high))
    # Not math.isfinite, which fails for ints beyond a float.
    require(low <= value <= most and value != math.inf, setting, value, f"a finite number, {bound}")
