"""The augmentation in one pass on the CPU, in C (native/fused.c)."""

import torch
from torch import Tensor, nn


def missing() -> str | None:
    """Why the pass cannot be used here; None where it can."""
    return "this build has no such pass"


def runs_on(device: torch.device) -> bool:
    """Whether the pass takes tensors of `device`."""
    return device.type == "cpu"


def augment(
    pipeline: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See robust_dist/augment/backends.py."""
    raise NotImplementedError
