"""Which bytes live at which moment: a dispatch mode that follows storages from their first tensor to their last."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages under these tensors, each storage once; a DTensor counts with its local part."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make while it is active; works on fake tensors as on real ones.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: The most that `live` has been since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these tensors' storages out, now and later."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def restart(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and take note of new storages among its results."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._note(result.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size
