"""How tensors lie in memory."""

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, contiguous or channels_last."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def can_flatten(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors lie in memory without gaps and in the same order, so that they can be walked as arrays."""
    return is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)
