"""The paper's update in the paper's notation; the fast backends are tested against this file.

Source: Noguchi and Yamauchi, "Proposal of a robust and accurate deep learning method for hyperparameters".
The paper prints the condition as "gamma_t > 4". gamma_t never exceeds 1, and eq. 13 is real only for rho_t > 4, which
is also RAdam's condition, so it is read as rho_t > 4. With beta2 = 0.999 it first holds at t = 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PAPER_THRESHOLD = 4.0


def one_minus_power(beta: float, step: float) -> float:
    """1 - beta^step without cancellation, for 0 <= beta < 1 and step > 0."""
    return -math.expm1(step * math.log(beta)) if beta > 0.0 else 1.0


def rho_inf(beta2: float) -> float:
    """Eq. 11, the longest possible approximated simple moving average."""
    return 2.0 / (1.0 - beta2) - 1.0


def rho(step: float, beta2: float) -> float:
    """Eq. 12, the length of the approximated simple moving average at `step` = 1, 2, ..."""
    power = beta2**step
    return rho_inf(beta2) - 2.0 * step * power / one_minus_power(beta2, step)


def rectification(step: float, beta2: float, threshold: float = PAPER_THRESHOLD) -> float | None:
    """Eq. 13, gamma_t, in float64.

    Args:
        step: The step t = 1, 2, ...
        beta2: Decay of the second moment, 0 <= beta2 < 1.
        threshold: The update is rectified if rho_t is greater than this; at least 4.

    Returns:
        gamma_t, or None if the step is not rectified (eq. 20), as always for beta2 <= 0.6, where rho_inf <= 4.
    """
    longest = rho_inf(beta2)
    if longest <= max(threshold, PAPER_THRESHOLD):
        return None
    length = rho(step, beta2)
    if length <= threshold:
        return None
    gain = (length - 4.0) * (length - 2.0) * longest
    return math.sqrt(gain / ((longest - 4.0) * (longest - 2.0) * length))


def _one_minus_ratio(x: Tensor) -> Tensor:
    # 1 - x / expm1(x) cancels for small x, too much for float32: use its Bernoulli series there
    square = x * x
    series = x / 2 - square * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    return torch.where(x < 0.25, series, 1.0 - x / torch.expm1(x))


def tensor_rectification(step: Tensor, beta2: float, threshold: float = PAPER_THRESHOLD) -> tuple[Tensor, Tensor]:
    """Eq. 13 on tensors, without synchronising; accurate in float32 too.

    With x = -t log(beta2), eq. 12 reads rho_t = (rho_inf + 2 / log(beta2)) + (2 / -log(beta2)) (1 - x / (e^x - 1)).

    Args:
        step: Steps t = 1, 2, ..., float32 or float64 of any shape.
        beta2: Decay of the second moment, 0 <= beta2 < 1.
        threshold: The update is rectified where rho_t is greater than this; at least 4.

    Returns:
        gamma_t (1 where not rectified), with the shape and dtype of `step`, and a bool tensor: whether it is rectified.
    """
    longest = rho_inf(beta2)
    if longest <= max(threshold, PAPER_THRESHOLD):
        return torch.ones_like(step), torch.zeros_like(step, dtype=torch.bool)
    rate = -math.log(beta2)
    length = (longest - 2.0 / rate) + (2.0 / rate) * _one_minus_ratio(step * rate)
    rectified = length > threshold
    length = torch.where(rectified, length, longest)
    gain = (length - 4.0) * (length - 2.0) / length
    scale = longest / ((longest - 4.0) * (longest - 2.0))
    return torch.where(rectified, torch.sqrt(gain * scale), 1.0), rectified


def reference_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of one tensor: eq. 6, 16, 8, 9, then 19 or 20.

    Args:
        param: theta_{t-1}, any floating dtype; use float64 for comparisons.
        grad: g_t, same shape.
        exp_avg: m_{t-1}, zeros before the first step.
        exp_avg_sq: v_{t-1}, zeros before the first step.
        step: t = 1, 2, ...
        lr: eta, after the schedule.
        betas: (beta1, beta2).
        eps: Added to v at every step, and again under the root.
        weight_decay: lambda.

    Returns:
        New tensors (theta_t, m_t, v_t); the arguments are not modified.
    """
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * grad  # eq. 6
    v = beta2 * exp_avg_sq + (1 - beta2) * (grad - m) ** 2 + eps  # eq. 16
    m_hat = m / one_minus_power(beta1, step)  # eq. 8
    v_hat = v / one_minus_power(beta2, step)  # eq. 9
    gamma = rectification(step, beta2)  # eq. 11 to 13
    if gamma is None:
        return param - lr * (m_hat + weight_decay * param), m, v  # eq. 20
    return param - lr * (gamma * m_hat / torch.sqrt(v_hat + eps) + weight_decay * param), m, v  # eq. 19


def reference_averaged_step(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    weight_sum: float,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """One step with schedule-free averaging, as averaging.py describes it.

    Args:
        y: Weights at which `grad` was computed.
        z: Fast weights; equal to y before the first step.
        grad: g_t.
        exp_avg: m_{t-1}; only used in eq. 16.
        exp_avg_sq: v_{t-1}.
        step: t = 1, 2, ...
        weight_sum: w_1 + ... + w_{t-1}.
        lr: eta.
        betas: (beta1, beta2).
        eps: As in `reference_step`.
        weight_decay: lambda.

    Returns:
        New (y, z, m, v), and the sum of the weights up to w_t.
    """
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * grad  # eq. 6
    v = beta2 * exp_avg_sq + (1 - beta2) * (grad - m) ** 2 + eps  # eq. 16
    v_hat = v / one_minus_power(beta2, step)  # eq. 9
    gamma = rectification(step, beta2)
    update = grad if gamma is None else gamma * grad / torch.sqrt(v_hat + eps)
    weight = 1.0 if rho_inf(beta2) <= PAPER_THRESHOLD else (gamma or 0.0) ** 2
    weight_sum += weight
    share = weight / weight_sum if weight_sum else 0.0
    x = y + (1 - 1 / beta1) * (z - y)
    z = z - lr * (update + weight_decay * y)
    x = (1 - share) * x + share * z
    return (1 - beta1) * z + beta1 * x, z, m, v, weight_sum


def reference_rate(
    gradients: Sequence[float], losses: Sequence[float], *, lr: float, guard: float, constant: float = 4.0
) -> float:
    """The learning rate of a step with `rate_guard` (rate.py).

    Args:
        gradients: sum|g| of steps 1 to t.
        losses: The losses of these steps, minus the entropy of the targets.
        lr: The configured learning rate.
        guard: The factor by which the rate may differ from `lr`; 1 ignores `lr`.
        constant: c.
    """
    mean_gradient = mean_loss = 0.0
    ratios = []
    for gradient, loss in zip(gradients, losses, strict=True):
        mean_gradient = 0.9 * mean_gradient + 0.1 * gradient
        mean_loss = 0.9 * mean_loss + 0.1 * loss
        ratios.append(mean_loss / mean_gradient)
    measured = constant * min(ratios[-1], 2 * min(ratios))
    return min(max(lr, measured / guard), guard * measured)
