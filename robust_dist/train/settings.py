"""Checks of a recipe's values, with errors that name the setting."""

import math


def require(ok: bool, setting: str, value: object, wanted: str) -> None:
    """Raise a ValueError that names the setting, its value and what would be right."""
    if not ok:
        raise ValueError(f"{setting}={value!r} is not valid: it must be {wanted}")


def require_number(setting: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a ValueError unless `value` is finite and lies in low to high."""
    bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    require(math.isfinite(value) and low <= value <= high, setting, value, f"a finite number, {bound}")
