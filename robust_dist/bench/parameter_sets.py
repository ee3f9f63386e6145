"""Shapes of models' parameters, for benchmarks of an optimizer's step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_dist.bench.scale import resnet50, vit_large

Shape = tuple[int, ...]


def _block(c_in: int, c_out: int, *, shortcut: bool) -> list[Shape]:
    norm: list[Shape] = [(c_out,), (c_out,)]
    shapes: list[Shape] = [(c_out, c_in, 3, 3), *norm, (c_out, c_out, 3, 3), *norm]
    return shapes + ([(c_out, c_in, 1, 1), *norm] if shortcut else [])


def _resnet(stem: int, widths: Sequence[int], blocks: int, *, shortcut: bool) -> list[Shape]:
    shapes: list[Shape] = [(stem, 3, 3, 3), (stem,), (stem,)]
    c_in = stem
    for width in widths:
        for _ in range(blocks):
            shapes += _block(c_in, width, shortcut=shortcut and c_in != width)
            c_in = width
    return [*shapes, (10, c_in), (10,)]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet56": lambda: _resnet(16, (16, 32, 64), 9, shortcut=False),
    "resnet18": lambda: _resnet(64, (64, 128, 256, 512), 2, shortcut=True),
    "resnet50": resnet50,
    "vit_l": vit_large,
    "flat": lambda: [(100_000_000,)],
}


def numel(shapes: Sequence[Shape]) -> int:
    """Elements of all of them."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def parameters(shapes: Sequence[Shape], device: torch.device) -> list[Tensor]:
    """Parameters with gradients, float32, both of normal noise, the same at each call.

    Args:
        shapes: One for each parameter.
        device: Where they lie.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(device)
    return params
