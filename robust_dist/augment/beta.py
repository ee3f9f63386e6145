"""Draws from Beta(alpha, alpha) as a table: no rejection, no gamma draws, static shapes, the same everywhere."""

import math

import torch
from torch import Tensor

_CELLS = 4096
_WIDEST = 60.0  # log-odds beyond which a share is below 1e-26 and cuts no pixel


def _log_density(odds: Tensor, alpha: float) -> Tensor:
    """Of the log-odds of a Beta(alpha, alpha) draw, up to a constant: -2 alpha log(2 cosh(odds / 2))."""
    half = odds.abs() / 2
    return -2 * alpha * (half + torch.log1p(torch.exp(-2 * half)))


def beta_table(alpha: float) -> Tensor:
    """Knots of the distribution function: float64 [2, 8193], probabilities and the shares they belong to.

    Simpson's rule over the log-odds, in which every alpha has a smooth density; interpolated linearly.
    """
    peak = -2 * alpha * math.log(2)
    reach = min(_WIDEST, 2 * math.acosh(math.exp(min(40 / alpha, 80) / 2)))
    odds = torch.linspace(-reach, reach, 4 * _CELLS + 1, dtype=torch.float64)
    density = torch.exp(_log_density(odds, alpha) - peak)
    step = odds[2] - odds[0]
    mass = step / 6 * (density[:-2:2] + 4 * density[1::2] + density[2::2])
    tail = density[:1] / alpha
    total = torch.cat([tail, mass, tail]).cumsum(0)
    probability = total[:-1] / total[-1]
    share = torch.sigmoid(odds[::2])
    probability[0], probability[-1] = 0.0, 1.0
    share[0], share[-1] = 0.0, 1.0
    return torch.stack([probability, share])


def beta_share(u: Tensor, table: Tensor) -> Tensor:
    """The share below which a part u of all draws lies: float64 like u in [0, 1)."""
    probability, share = table.unbind(0)
    right = torch.searchsorted(probability, u, right=True).clamp(1, probability.shape[0] - 1)
    p_left, p_right = probability[right - 1], probability[right]
    s_left, s_right = share[right - 1], share[right]
    return s_left + (s_right - s_left) * ((u - p_left) / (p_right - p_left))
