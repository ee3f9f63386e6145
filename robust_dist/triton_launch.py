"""Repeated Triton launches through the compiled kernel, at a tenth of the host time.

`kernel[grid](...)` binds and looks up all arguments on each launch, about 20 us; the `CompiledKernel` that it returns
launches in 2 us. That it takes all arguments in order, constants included, holds for the releases in `KNOWN`
(tests/test_triton_launch.py); other releases and Triton's interpreter launch as usual.
"""

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.language import dtype
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KNOWN = ((3, 6), (3, 9))  # oldest and newest release whose CompiledKernel is called directly


def _is_known() -> bool:
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    return KNOWN[0] <= version <= KNOWN[1]


def _kind(argument: Any) -> Any:
    """Everything Triton may specialise on: a pointer's type and alignment, any other argument's value."""
    cls = type(argument)
    if cls is int or cls is bool:
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() & 15 else (argument.dtype,)
    return argument.name if cls is dtype else argument  # Triton's dtypes hash slowly


def _is_narrow(number: int) -> bool:
    return -(2**31) <= number < 2**31


class Kernel:
    """Launches like `jit`, the kernel that it wraps: `kernel[grid](*arguments, **options)`."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._count = len(jit.arg_names)
        self._again: dict[Any, Any] | None = {} if isinstance(jit, JITFunction) and _is_known() else None
        self._last: tuple[Any, ...] | None = None
        # Arguments without specialisation on their values: only whether 32 bits hold them matters.
        self._free = [i for i, parameter in enumerate(getattr(jit, "params", ())) if parameter.do_not_specialize]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if self._again is None:
            return self.jit[grid]
        return lambda *arguments, **options: self._launch(grid, arguments, options)

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        assert self._again is not None
        given = arguments
        if len(arguments) < self._count:
            given = (*arguments, *(options[name] for name in self.jit.arg_names[len(arguments) :]))
        compiled = self._last_compiled(given, options)
        if compiled is None:
            kinds = [driver.active.get_current_device(), *map(_kind, given), *options.values()]
            for place in self._free:
                kinds[place + 1] = _is_narrow(given[place])
            key = tuple(kinds)
            compiled = self._again.get(key)
            self._last = None if compiled is None else self._seen(given, options, compiled)
        if compiled is None:
            compiled = self._again[key] = self.jit[grid](*arguments, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*given)
        return compiled

    def _last_compiled(self, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The kernel launched last, if the arguments are the same kind; comparing is cheaper than hashing."""
        if self._last is None:
            return None
        device, kinds, rest, last_options, compiled = self._last
        if self._rest(given, len(kinds)) != rest or options != last_options:
            return None
        if driver.active.get_current_device() != device:
            return None
        # `_kind` for tensors, inlined
        found = [t.dtype if t.data_ptr() & 15 else (t.dtype,) for t in given[: len(kinds)]]
        return compiled if found == kinds else None

    def _rest(self, given: tuple[Any, ...], first: int) -> list[Any]:
        """All arguments from `first` on, reduced to what Triton specialises on."""
        found = list(given[first:])
        for place in self._free:
            found[place - first] = _is_narrow(given[place])
        return found

    def _seen(self, given: tuple[Any, ...], options: dict[str, Any], compiled: Any) -> tuple[Any, ...] | None:
        """What `_last_compiled` compares; None unless the tensors come before all other arguments."""
        first = next((place for place, argument in enumerate(given) if not isinstance(argument, Tensor)), len(given))
        if any(isinstance(argument, Tensor) for argument in given[first:]):
            return None
        device, kinds = driver.active.get_current_device(), list(map(_kind, given[:first]))
        return device, kinds, self._rest(given, first), dict(options), compiled
