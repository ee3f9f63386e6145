"""State on large pages: fewer address translations, which a pass at the memory's speed waits for."""

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
    """Ask Linux to back the whole large pages inside a tensor's memory by such; a refusal changes nothing."""
    madvise = _madvise()
    if madvise is None or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = (storage.data_ptr() + storage.nbytes() - first) // _LARGE_PAGE * _LARGE_PAGE
    if size > 0:
        madvise(first, size, _MADV_HUGEPAGE)


def empty_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor for a parameter's state: of its shape, layout in memory, device and sharding, not yet filled."""
    found = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    _advise(getattr(found, "_local_tensor", found))
    return found
