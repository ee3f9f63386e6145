"""Checks of settings; a ValueError or TypeError names the setting, its value and what is allowed."""

import math
import operator
import reprlib
from numbers import Real
from typing import Any


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high].

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is outside the range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        kind = f"{name}={reprlib.repr(value)} is a {type(value).__name__}"
        raise TypeError(f"{kind}: it must be a whole number in range, {low} or more")
    number = operator.index(value)
    if number < low:
        raise ValueError(f"{name}={reprlib.repr(number)} is below {low}: it must be a whole number in range")
    if high is not None and number > high:
        raise ValueError(f"{name}={reprlib.repr(number)} is above {high}: it must be a whole number in range")
    return number


def real_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high].

    Raises:
        TypeError: It is not a real number.
        ValueError: It is out of range, infinite or NaN.
    """
    wanted = f"a finite number >= {low}" + ("" if high == math.inf else f" and <= {high}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be {wanted}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name}={number} is out of range; it must be {wanted}")
    return number


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`, which must be one of `choices`.

    Raises:
        ValueError: It is not one of them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; it must be one of {', '.join(map(repr, choices))}")
    return str(value)
