"""A CPU counterpart of a CUDA graph: the operations of one call, repeated over the same memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        # Its tensors stay alive, so that no memory is reused.
        self.operations.append((function, args, kwargs or {}, found))
        return found


class Tape:
    """Calls a function once to create what it keeps, records the next call, and replays the record from then on."""

    def __init__(self, function):
        self.function, self.calls, self.operations = function, 0, []

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            self.function()
        elif self.calls == 2:
            with _Recorder() as recorder:
                self.function()
            self.operations = recorder.operations
        else:
            with torch.no_grad():
                for operation in self.operations:
                    _repeat(*operation)

    def forget(self):
        self.calls = 0

    def on_own_stream(self, function):
        function()


def _repeat(function, args, kwargs, found):
    memory = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    new = function(*args, **kwargs)
    for old, value in zip(tree_leaves(found), tree_leaves(new), strict=True):
        # Check that views and in-place operations wrote to the right place.
        if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in memory:
            old.copy_(value)
