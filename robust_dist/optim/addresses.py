"""Addresses of many tensors, and whether dicts still hold the same objects, in one call.

`Tensor.data_ptr` takes ten times as long, most of a steady step with many small tensors. The C functions
(native/objects.c) read torch's C++ tensor inside its Python object, at an offset that is determined once per process
from the known address of a tensor's implementation. If the C library was not built, this torch lacks the function, or
the offset is not found, Python asks each tensor.
"""

import ctypes
import functools
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WORD = 8


class _Interfaces(ctypes.Structure):
    """`interfaces` of native/objects.c."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("item", "next", "data")), ("place", ctypes.c_int64)]


class _Native:
    """The C functions, called with the GIL held."""

    def __init__(self, path: str, by: _Interfaces) -> None:
        pointer, whole, thing = ctypes.c_void_p, ctypes.c_int64, ctypes.py_object
        found = ctypes.PyDLL(path)
        self.addresses, self.hold = found.robust_dist_addresses, found.robust_dist_hold
        self.addresses.argtypes, self.addresses.restype = [pointer, thing, whole, pointer], whole
        self.hold.argtypes, self.hold.restype = [pointer, thing, whole, pointer, whole], ctypes.c_int
        self.interfaces = by
        self.by = ctypes.addressof(by)


def _place() -> int | None:
    """The offset of torch's C++ tensor, a pointer to its implementation, in the Python object; None if not found."""
    tensor = torch.empty(1)
    for place in range(_WORD, Tensor.__basicsize__, _WORD):
        if ctypes.c_int64.from_address(id(tensor) + place).value == tensor._cdata:
            return place
    return None


@functools.cache
def _native() -> _Native | None:
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    library = next(Path(__file__).parent.glob("_fused*.so"), None)
    if library is None or not has_lock or ctypes.sizeof(ctypes.c_void_p) != _WORD:
        return None
    torch_library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    try:
        of_torch = ctypes.CDLL(str(torch_library)).aoti_torch_get_data_ptr
        functions = (ctypes.pythonapi.PyList_GetItem, ctypes.pythonapi.PyDict_Next, of_torch)
        pointers = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        place = _place()
        found = None if place is None else _Native(str(library), _Interfaces(*pointers, place))
    except (OSError, AttributeError):  # another torch, or a library built from older sources
        return None
    return found if found is not None and _is_right(found) else None


def _is_right(native: _Native) -> bool:
    tensors = [torch.empty(3), torch.nn.Parameter(torch.empty(2)), torch.empty(4)[1:], torch.empty(0)]
    return _ask(native, tensors).tolist() == list(map(Tensor.data_ptr, tensors))


def _ask(native: _Native, tensors: list[Tensor]) -> "array[int]":
    found = array("q", bytes(_WORD * len(tensors)))
    count = native.addresses(native.by, tensors, len(tensors), found.buffer_info()[0])
    if count != len(tensors):
        raise RuntimeError(f"tensor {count} has no address")
    return found


def addresses(tensors: list[Tensor]) -> "array[int]":
    """`data_ptr()` of each tensor, as an array("q").

    Raises:
        RuntimeError: A tensor has no address, e.g. a sparse one.
    """
    native = _native()
    return array("q", list(map(Tensor.data_ptr, tensors))) if native is None else _ask(native, tensors)


def same(found: Iterable[Any], kept: Iterable[Any]) -> bool:
    """Whether two iterables of equal length yield the same objects."""
    return all(map(is_, found, kept))


class Contents:
    """A snapshot of dicts: the identities of their keys and values, in order.

    Attributes:
        values: The values of all dicts, one after the other.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        self._keys = list(chain.from_iterable(dicts))
        self.values: list[Any] = list(chain.from_iterable(map(dict.values, dicts)))
        self._width = len(dicts[0])
        items = chain.from_iterable(zip(map(id, self._keys), map(id, self.values), strict=True))
        self._items = array("q", list(items)) if all(len(one) == self._width for one in dicts) else None

    def are_in(self, dicts: list[Any]) -> bool:
        """Whether these dicts, as many, have the same contents."""
        native = _native()
        if native is not None and self._items is not None:
            return bool(native.hold(native.by, dicts, len(dicts), self._items.buffer_info()[0], self._width))
        lengths = sum(map(len, dicts))
        values: Iterable[Any] = chain.from_iterable(map(dict.values, dicts))
        keys = chain.from_iterable(dicts)
        return lengths == len(self.values) and same(values, self.values) and same(keys, self._keys)
