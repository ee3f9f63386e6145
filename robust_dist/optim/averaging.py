"""Schedule-free averaging (Defazio et al. 2024) of the trained weights.

Gradients are computed at y; z are the fast weights, and x is the average used for evaluation::

    x_t = (1 - c_t) x_{t-1} + c_t z_t,   y_t = (1 - b1) z_t + b1 x_t,   c_t = w_t / (w_1 + ... + w_t)

A parameter holds y during training and x = y + (1 - 1 / b1) (z - y) during evaluation; z is in its state.
w_t is gamma_t^2 (eq. 13), which grows with t, and 0 where eq. 20 holds: the average begins with the first rectified
step. If no step is ever rectified, w_t is 1. c_t depends on t alone, so no further state is needed.
"""

import math
from functools import cache

import torch
from torch import Tensor

from robust_dist.optim.reference import PAPER_THRESHOLD, rho_inf, tensor_rectification


@cache
def _table(beta2: float, threshold: float) -> tuple[Tensor, Tensor]:
    """w_t and their cumulative sums for t = 1, 2, ..., float64, up to where gamma is 1 within rounding."""
    if rho_inf(beta2) <= max(threshold, PAPER_THRESHOLD):
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    steps = torch.arange(1, math.ceil(50 / (1 - beta2)) + 1, dtype=torch.float64)
    gamma, rectified = tensor_rectification(steps, beta2, threshold)
    weights = torch.where(rectified, gamma * gamma, 0.0)
    return weights, weights.cumsum(0)


@cache
def weights_on(device: torch.device, beta2: float, threshold: float) -> tuple[Tensor, Tensor]:
    """w_t and their cumulative sums for t = 1, 2, ..., float64, cached on the device; past the end w_t is 1."""
    weights, sums = _table(beta2, threshold)
    return weights.to(device), sums.to(device)


def share(step: float, beta2: float, threshold: float) -> float:
    """c_t for t = `step`; 0 before the first rectified step."""
    weights, sums = _table(beta2, threshold)
    last = min(int(step), len(sums)) - 1
    total = float(sums[last]) + step - (last + 1)
    return float(weights[last]) / total if total else 0.0


def device_share(step: Tensor, beta2: float, threshold: float) -> Tensor:
    """c_t for steps on a device, with their shape and floating dtype, without synchronising."""
    weights, sums = weights_on(step.device, beta2, threshold)
    last = step.clamp(max=len(sums)).long() - 1
    total = sums.to(step.dtype)[last] + step - (last + 1)
    return torch.where(total > 0, weights.to(step.dtype)[last] / total, 0.0)


def average_of(y: Tensor, z: Tensor, beta1: float) -> None:
    """Replace y by x, in place."""
    y.lerp_(z, 1.0 - 1.0 / beta1)


def trained_of(x: Tensor, z: Tensor, beta1: float) -> None:
    """Replace x by y, in place."""
    x.lerp_(z, 1.0 - beta1)
