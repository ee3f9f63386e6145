"""Shapes of models' parameters, for benchmarks of an optimizer's step."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from robust_dist.bench.scale import Shape, resnet50, vit_large
from robust_dist.models import build_model


def _model(name: str) -> list[Shape]:
    with torch.device("meta"):
        return [tuple(param.shape) for param in build_model(name, 10, in_channels=3).parameters()]


# Names of sets to the shapes of their parameters.
SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet56": partial(_model, "resnet56"),
    "resnet18": partial(_model, "resnet18_cifar"),
    "resnet50": resnet50,
    "vit_l": vit_large,
    "flat": lambda: [(100_000_000,)],
}


def parameters(shapes: Sequence[Shape], device: torch.device) -> list[Tensor]:
    """float32 parameters with gradients, both of normal noise, the same at each call.

    Args:
        shapes: One for each parameter.
        device: Where they lie.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(device)
    return params
