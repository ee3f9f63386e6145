"""The scalars of one step: in float64 on the host, or on the device without synchronising.

After both moments are updated, the parameter becomes
    theta = decay * theta - step_size * m / (sqrt(v + inner) + outer)     rectified, eq. 19
    theta = decay * theta - step_size * m                                 not rectified, eq. 20
with the bias corrections of eq. 8 and 9 folded into step_size, inner and outer. With averaging (averaging.py)
    d = step_size * g / (sqrt(v + inner) + outer) + (1 - decay) * y       rectified; else step_size * g + ...
    y = y + mix * (z - y) + push * d,   z = z - d
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust_dist.optim.averaging import device_share, share
from robust_dist.optim.counting import counts_of
from robust_dist.optim.reference import one_minus_power, rectification, tensor_rectification
from robust_dist.optim.settings import INSIDE, OUTSIDE, Hyper


@dataclass(frozen=True)
class Coefficients:
    """The scalars for tensors with the same step count: floats, or tensors if lr is a tensor.

    Attributes:
        decay: Factor on theta, 1 - lr * weight_decay.
        step_size: Factor on the update.
        rectified: Whether eq. 19 applies; otherwise eq. 20, and `inner` and `outer` are unused.
        inner: Added under the root.
        outer: Added to the root.
        fade: 1 - decay.
        mix: The share of z in the new y, with averaging.
        push: The factor on d in the new y, with averaging.
    """

    decay: float | Tensor
    step_size: float | Tensor
    rectified: bool
    inner: float = 0.0
    outer: float = 0.0
    fade: float | Tensor = 0.0
    mix: float = 0.0
    push: float = 0.0


def host_coefficients(step: float, h: Hyper, lr: float | Tensor, weight_decay: float | Tensor) -> Coefficients:
    """The scalars for step t = `step`, in float64."""
    bias1 = 1.0 if h.averaging else one_minus_power(h.beta1, step)
    fade = lr * weight_decay if h.decay_by_rate else weight_decay
    decay = 1.0 - fade
    mix = share(step, h.beta2, h.rectify_threshold) if h.averaging else 0.0
    push = h.beta1 * (1.0 - mix) - 1.0
    gamma = rectification(step, h.beta2, h.rectify_threshold)
    if gamma is None:
        return Coefficients(decay, lr / bias1, rectified=False, fade=fade, mix=mix, push=push)
    bias2 = one_minus_power(h.beta2, step)
    root = math.sqrt(bias2)
    inner = h.eps * bias2 if h.eps_placement == INSIDE else 0.0
    outer = 0.0 if h.eps_placement == INSIDE else h.eps * (root if h.eps_placement == OUTSIDE else 1.0)
    return Coefficients(decay, lr * (gamma * root / bias1), True, inner, outer, fade, mix, push)


@dataclass(frozen=True)
class DeviceCoefficients:
    """The scalars of n tensors, each with its own step count, as tensors.

    theta = decay * theta + m / (slope * sqrt(v + inner) + offset) covers both cases of the module's docstring.

    Attributes:
        decay: 0-d; 1 - lr * weight_decay.
        inner: n 0-d tensors, added under the root.
        slope: n 0-d tensors; -1 / step_size if rectified, else 0.
        offset: n 0-d tensors; -outer / step_size if rectified, else -1 / step_size.
        idle: 0-d bool; whether lr is 0, so that theta must keep its bits. None if lr is a float other than 0.
        fade: 0-d; 1 - decay.
        mix: n 0-d tensors, the share of z in the new y; empty without averaging.
        push: n 0-d tensors, the factor on d in the new y.
    """

    decay: Tensor
    inner: tuple[Tensor, ...]
    slope: tuple[Tensor, ...]
    offset: tuple[Tensor, ...]
    idle: Tensor | None
    fade: Tensor
    mix: tuple[Tensor, ...] = ()
    push: tuple[Tensor, ...] = ()


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(device=like.device, dtype=like.dtype)
    if torch.compiler.is_compiling():
        # As a factor, a varying number stays an input of the compiled graph; torch.full would make it a constant.
        return torch.ones((), device=like.device, dtype=like.dtype) * value
    return torch.full((), float(value), device=like.device, dtype=like.dtype)


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    return -torch.expm1(step * math.log(beta)) if beta > 0.0 else torch.ones_like(step)


def device_coefficients(steps: list[Tensor], h: Hyper, dtype: torch.dtype) -> DeviceCoefficients:
    """The scalars of n tensors from their step tensors, computed in float64 if the device supports it.

    Args:
        steps: n step tensors on one device, for t = 1, 2, ...
        h: The settings; lr and weight_decay tensors should be on that device.
        dtype: The dtype of the result.
    """
    accurate = torch.float32 if steps[0].device.type == "mps" else torch.float64
    t = counts_of(torch.stack(steps)).to(accurate)
    lr, weight_decay = _scalar(h.lr, t), _scalar(h.weight_decay, t)
    gamma, rectified = tensor_rectification(t, h.beta2, h.rectify_threshold)
    bias1, bias2 = _one_minus_power(0.0 if h.averaging else h.beta1, t), _one_minus_power(h.beta2, t)
    root = bias2.sqrt()
    inner = h.eps * bias2 if h.eps_placement == INSIDE else torch.zeros_like(t)
    outer = torch.zeros_like(t) if h.eps_placement == INSIDE else torch.full_like(t, h.eps)
    outer = outer * root if h.eps_placement == OUTSIDE else outer
    inverse = -bias1 / (lr * torch.where(rectified, gamma * root, 1.0))
    slope = torch.where(rectified, inverse, 0.0)
    offset = torch.where(rectified, outer * inverse, inverse)
    varies = torch.compiler.is_compiling() or isinstance(h.lr, Tensor)
    idle = lr == 0.0 if varies or h.lr == 0.0 else None
    inners, slopes, offsets = (vector.to(dtype).unbind() for vector in (inner, slope, offset))
    fade = lr * weight_decay if h.decay_by_rate else weight_decay
    found = DeviceCoefficients((1.0 - fade).to(dtype), inners, slopes, offsets, idle, fade.to(dtype))
    if not h.averaging:
        return found
    mix = device_share(t, h.beta2, h.rectify_threshold)
    push = h.beta1 * (1.0 - mix) - 1.0
    return replace(found, mix=mix.to(dtype).unbind(), push=push.to(dtype).unbind())


def either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The logical or of two optional conditions."""
    if first is None or second is None:
        return second if first is None else first
    return first | second
