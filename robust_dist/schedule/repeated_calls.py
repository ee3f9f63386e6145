"""Which calls of a scheduler's step() are copies of one call, as far as wrappers of schedulers are known."""

from collections.abc import Callable

_tests: list[Callable[[], bool]] = []


def add_test(is_copy: Callable[[], bool]) -> None:
    """Have `is_copy` asked at each call: whether some wrapper repeats the call under way."""
    _tests.append(is_copy)


def is_copy() -> bool:
    """Whether the call under way repeats one that a wrapper has made for the same optimizer step."""
    return any(test() for test in _tests)
