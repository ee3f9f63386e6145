"""The readable equations against independent float64 arithmetic."""

import math
import random

import pytest
import torch

from robust_dist.optim.reference import rectification, reference_step, rho, rho_inf, tensor_rectification


def _by_hand(theta, grads, lr, b1, b2, eps, decay):
    """PAPER.md's table for one element in plain Python."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - m) ** 2 + eps
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * b2**t / (1 - b2**t)
        if length > 4:
            gamma = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            theta -= lr * (gamma * m_hat / math.sqrt(v_hat + eps) + decay * theta)
        else:
            theta -= lr * (m_hat + decay * theta)
    return theta, m, v


def _inner_eps_oracle(theta, grads, lr, b1, b2, eps, decay):
    """Plain AdaBelief whose only eps, under the root, is eps (1 + 1 / (1 - b2)), rectified."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - m) ** 2
        gamma = rectification(t, b2)
        update = m / (1 - b1**t)
        if gamma is not None:
            update *= gamma / math.sqrt(v / (1 - b2**t) + eps * (1 + 1 / (1 - b2)))
        theta -= lr * (update + decay * theta)
    return theta


def _grads(steps, scale, seed=0):
    draw = random.Random(seed)
    return [draw.gauss(0.3, 1.0) * scale for _ in range(steps)]


def _run_reference(theta, grads, moments=(0.0, 0.0), first=1, **kwargs):
    p, m, v = torch.tensor([theta, *moments], dtype=torch.float64)
    for t, g in enumerate(grads, first):
        p, m, v = reference_step(p, torch.tensor(g, dtype=torch.float64), m, v, t, **kwargs)
    return p.item(), m.item(), v.item()


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_reference_equals_the_papers_equations(scale, betas):
    grads = _grads(300, scale)
    expected = _by_hand(0.7, grads, 3e-3, *betas, 1e-8, 0.02)
    found = _run_reference(0.7, grads, lr=3e-3, betas=betas, eps=1e-8, weight_decay=0.02)
    assert found == pytest.approx(expected, rel=1e-11)


def test_the_accumulated_eps_is_one_inner_eps_of_1001e_8():
    grads = _grads(3000, 1e-3)
    expected = _inner_eps_oracle(0.7, grads, 1e-2, 0.9, 0.999, 1e-8, 1e-2)
    assert _run_reference(0.7, grads)[0] == pytest.approx(expected, abs=1e-13)


def test_where_beliefs_are_certain_it_is_momentum_sgd_with_lr_over_3e_3():
    grads, lr = [1e-6] * 20000, 1e-2
    before, *moments = _run_reference(0.0, grads[:-1], lr=lr, weight_decay=0.0)
    after, *_ = _run_reference(before, grads[-1:], moments, len(grads), lr=lr, weight_decay=0.0)
    assert (before - after) / (lr / math.sqrt(1e-5) * 1e-6) == pytest.approx(1.0, rel=1e-3)


def test_rho_has_the_published_values_and_is_first_above_4_at_step_5():
    table = [1.000, 1.9995, 2.9987, 3.9975, 4.9960, 5.9942]
    assert [rho(t, 0.999) for t in range(1, 7)] == pytest.approx(table, abs=5e-5)
    assert [rectification(t, 0.999) is not None for t in range(1, 7)] == [False] * 4 + [True] * 2
    assert rectification(5, 0.999) == pytest.approx(0.0173, abs=5e-5)


def test_a_threshold_of_5_rectifies_one_step_later():
    assert rectification(5, 0.999, 5.0) is None
    assert rectification(6, 0.999, 5.0) == rectification(6, 0.999)


@pytest.mark.parametrize("beta2", [0.6, 0.5, 0.0])
def test_no_step_is_rectified_where_rho_inf_is_at_most_4(beta2):
    assert rho_inf(beta2) <= 4 + 1e-12
    assert all(rectification(t, beta2) is None for t in (1, 5, 1000, 10**6))
    gamma, rectified = tensor_rectification(torch.tensor([1.0, 1e6]), beta2)
    assert gamma.tolist() == [1.0, 1.0]
    assert not rectified.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("beta2", [0.7, 0.9, 0.99, 0.999, 0.99999])
def test_rectification_on_tensors_is_accurate_in_float32_too(dtype, tolerance, beta2):
    steps = [*range(1, 60), 100, 249, 250, 251, 1000, 30000, 10**6]
    gamma, rectified = tensor_rectification(torch.tensor(steps, dtype=dtype), beta2)
    expected = [rectification(t, beta2) for t in steps]
    assert rectified.tolist() == [e is not None for e in expected]
    assert gamma.tolist() == pytest.approx([1.0 if e is None else e for e in expected], rel=tolerance)
    assert gamma.dtype == dtype
