"""Optimizer state on huge pages: fewer address translations, which limit a memory-bound pass."""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


def _advise(tensor: Tensor) -> None:
    """Ask Linux to back a tensor's memory with huge pages; a refusal has no effect."""
    madvise = _madvise()
    if madvise is None or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = (storage.data_ptr() + storage.nbytes() - first) // _LARGE_PAGE * _LARGE_PAGE
    if size > 0:
        madvise(first, size, _MADV_HUGEPAGE)


def empty_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a parameter's state, with its shape, memory layout, device and sharding."""
    found = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    _advise(getattr(found, "_local_tensor", found))
    return found
