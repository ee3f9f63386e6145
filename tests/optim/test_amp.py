"""GradScaler's protocol: scaled gradients, and steps that overflow."""

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from tests.optim.helpers import backends, bits, gradients, start, step, train


def _snapshot(optimizer, param):
    return bits(param), {k: bits(v) for k, v in optimizer.state[param].items()}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_gradients_are_unscaled_without_being_written_to(backend, dtype):
    grads = gradients((6,), 10, dtype=dtype)
    plain, scaled = start((6,), dtype=dtype).requires_grad_(), start((6,), dtype=dtype).requires_grad_()
    train([plain], [[g] for g in grads], **backend)
    optimizer = RAdaBeliefW([scaled], **backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for grad in grads:
        step(optimizer, [scaled], [grad * 1024])
        assert bits(scaled.grad) == bits(grad * 1024)
    assert torch.equal(plain.detach(), scaled.detach())


@backends
@pytest.mark.parametrize("steps_before", [0, 3, 9])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_overflow_leaves_parameter_step_and_state_as_they_were(backend, steps_before, bad, shape):
    grads = gradients((5,), steps_before + 1, dtype=torch.float32)
    param = torch.tensor([-0.0, 1.0, -2.0, 1e-30, 5.0]).requires_grad_()
    optimizer = train([param], [[g] for g in grads[:-1]], **backend)
    if steps_before:
        optimizer.state[param]["exp_avg"][0] = -0.0
    before = _snapshot(optimizer, param)
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 4.0), torch.full(shape, 1.0)
    grads[-1][2] = bad
    step(optimizer, [param], [grads[-1]])
    found = _snapshot(optimizer, param)
    assert found[0] == before[0]
    if steps_before:
        assert found[1] == before[1]
    else:
        assert not any(any(v) for v in found[1].values())


@backends
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scaler_skips_the_overflow_and_steps_like_no_scaler_otherwise(backend, unscale_first):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    param, twin = start((4,), dtype=torch.float32).requires_grad_(), start((4,), dtype=torch.float32).requires_grad_()
    optimizer, other = RAdaBeliefW([param], **backend), RAdaBeliefW([twin])
    for t, grad in enumerate(gradients((4,), 8, dtype=torch.float32)):
        overflows = t == 4
        optimizer.zero_grad()
        scaler.scale((param * (grad / 0 if overflows else grad)).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            step(other, [twin], [grad])
    assert scaler.get_scale() == 128.0
    assert optimizer.state[param]["step"].item() == 7
    torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-6, atol=1e-7)
