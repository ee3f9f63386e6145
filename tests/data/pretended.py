"""Fake CUDA tensors, on any machine: they have no values, so that reading one fails."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_dist.data import ImageSet

DEVICE = torch.device("cuda", 0)


class NoCopies(TorchDispatchMode):
    """Reject operations that move values between host and device; kernel arguments are allowed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        before, after = (
            {t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.dim()}
            for tree in ((args, kwargs), found)
        )
        assert len(before | after) < 2, f"{function} moves values from {before} to {after}"
        return found


@contextlib.contextmanager
def pretending():
    """Tensors created on `DEVICE` within have no values, and waiting for them raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies():
        yield


def image_set(count, size):
    """A set on `DEVICE` with three classes, built without the checks, which read the labels."""
    made = object.__new__(ImageSet)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8, device=DEVICE)
    labels = torch.empty(count, dtype=torch.int64, device=DEVICE)
    for name, value in {"images": images, "labels": labels, "classes": tuple("abc"), "name": "pretended"}.items():
        object.__setattr__(made, name, value)
    return made


def move(pipeline):
    """Move a pipeline's tables to `DEVICE`."""
    for module in pipeline.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
