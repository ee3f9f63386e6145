"""What the optimizer's tests share: ways to run it, and drivers that feed it the same gradients."""

import pytest
import torch
from torch import Tensor

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.fused_cpu import library
from robust_dist.optim.reference import reference_step

BACKENDS = {
    "default": {},
    "foreach": {"foreach": True},
    **({"fused": {"fused": True}} if library() else {}),
    "single": {"foreach": False},
    "capturable_foreach": {"capturable": True, "foreach": True},
    "capturable_single": {"capturable": True, "foreach": False},
}
backends = pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=list(BACKENDS))


def gradients(shape, steps, *, dtype=torch.float64, scale=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(steps)]


def start(shape, *, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train(params, grads_per_step, **kwargs):
    """Step `params` with the given gradients; returns the optimizer."""
    optimizer = RAdaBeliefW(params, **kwargs)
    for grads in grads_per_step:
        step(optimizer, params, grads)
    return optimizer


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step()


def reference(param: Tensor, grads, **kwargs):
    """The trajectory's end by the readable equations, in float64."""
    param = param.double()
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        param, m, v = reference_step(param, grad.double(), m, v, t, **kwargs)
    return param, m, v


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor, so that -0.0 and 0.0 differ."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
