"""One tensor at a time, out of place: the backend for differentiable steps and foreach=False."""

import torch
from torch import Tensor

from robust_dist.optim.coefficients import Coefficients, device_coefficients, either, host_coefficients
from robust_dist.optim.rounding import Rounder
from robust_dist.optim.settings import Hyper
from robust_dist.optim.tensors import TensorLists


def moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """Eq. 6 and 16; g_t - m_t is computed as beta1 (g_t - m_{t-1}), which avoids cancellation."""
    belief = grad - exp_avg
    m = torch.lerp(exp_avg, grad, 1.0 - h.beta1)
    v = h.beta2 * exp_avg_sq + ((1.0 - h.beta2) * h.beta1 * h.beta1) * belief * belief + h.added_eps
    return m, v


def moved(param: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> Tensor:
    """Eq. 19 or 20 with the bias corrections folded into the coefficients."""
    if not c.rectified:
        return param * c.decay - c.step_size * m
    return param * c.decay - c.step_size * (m / (torch.sqrt(v + c.inner) + c.outer))


def averaged(
    y: Tensor, z: Tensor, grad: Tensor, root: Tensor | None, size: float | Tensor, fade: float | Tensor, by: tuple
) -> tuple[Tensor, Tensor]:
    """The new y and z of averaging.py; `root` is the gradient's denominator, and `by` is (mix, push)."""
    mix, push = by
    move = size * (grad if root is None else grad / root) + fade * y
    return y + mix * (z - y) + push * move, z - move


def true_grad(batch: TensorLists, index: int, h: Hyper) -> Tensor:
    """The gradient in the dtype of the arithmetic, unscaled, with the sign of `maximize`."""
    grad = batch.grads[index].to(batch.exp_avg_sqs[index].dtype)
    if batch.inverse_scale is not None:
        grad = grad * batch.inverse_scale.to(grad.device)
    return -grad if h.maximize else grad


def differentiable_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, h: Hyper
) -> tuple[Tensor, Tensor]:
    """Step `param` in place with autograd recording, including gradients for lr and weight_decay tensors.

    Returns:
        The new moments; the old ones are not modified, since the backward pass may need them.
    """
    grad = -grad if h.maximize else grad
    m, v = moments(grad.to(exp_avg.dtype), exp_avg, exp_avg_sq, h)
    old = param.clone().to(m.dtype)
    param.copy_(moved(old, m, v, host_coefficients(step, h, h.lr, h.weight_decay)))
    return m, v


def _new_moments(batch: TensorLists, index: int, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    old, grad = batch.exp_avg_sqs[index], true_grad(batch, index, h)
    return grad, *moments(grad, batch.exp_avgs[index].to(old.dtype), old, h)


def _host_step(batch: TensorLists, h: Hyper, step: float) -> None:
    lr, weight_decay = float(h.lr), float(h.weight_decay)
    c, rounder = host_coefficients(step, h, lr, weight_decay), Rounder(batch, h)
    for i, param in enumerate(batch.params):
        grad, m, v = _new_moments(batch, i, h)
        batch.exp_avgs[i].copy_(rounder.exp_avg(i, m))
        batch.exp_avg_sqs[i].copy_(v)
        if lr == 0.0:
            continue
        old = (batch.masters or batch.params)[i].to(m.dtype)
        if h.averaging:
            root = torch.sqrt(v + c.inner) + c.outer if c.rectified else None
            new, z = averaged(old, batch.zs[i], grad, root, c.step_size, c.fade, (c.mix, c.push))
            batch.zs[i].copy_(z)
        else:
            new = moved(old, m, v, c)
        if batch.masters:
            batch.masters[i].copy_(new)
        param.copy_(rounder.param(i, new))


def _keep(old: Tensor, new: Tensor, keep: Tensor | None) -> None:
    old.copy_(new if keep is None else torch.where(keep, old, new.to(old.dtype)))


def _device_step(batch: TensorLists, h: Hyper) -> None:
    c, rounder = device_coefficients(batch.steps, h, batch.exp_avg_sqs[0].dtype), Rounder(batch, h)
    skipped = None if batch.found_inf is None else batch.found_inf != 0
    idle = either(c.idle, skipped)
    for i, param in enumerate(batch.params):
        grad, m, v = _new_moments(batch, i, h)
        old = (batch.masters or batch.params)[i].to(m.dtype)
        root = torch.sqrt(v + c.inner[i]) * c.slope[i] + c.offset[i]
        if h.averaging:
            new, z = averaged(old, batch.zs[i], grad, root, -1.0, c.fade, (c.mix[i], c.push[i]))
            _keep(batch.zs[i], z, idle)
        else:
            new = old * c.decay + m / root
        _keep(batch.exp_avgs[i], rounder.exp_avg(i, m), skipped)
        _keep(batch.exp_avg_sqs[i], v, skipped)
        if batch.masters:
            _keep(batch.masters[i], new, idle)
        _keep(param, rounder.param(i, new), idle)


def single(batch: TensorLists, h: Hyper) -> None:
    """Step the batch one tensor at a time."""
    if batch.step is None:
        _device_step(batch, h)
    else:
        _host_step(batch, h, batch.step)
