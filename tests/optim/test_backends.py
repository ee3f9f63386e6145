"""Every backend against the readable equations in float64."""

import math

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.foreach import CPU_BLOCK
from tests.optim.helpers import BACKENDS, backends, bits, gradients, reference, start, step, train

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,), (3, 0)]


@backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference_in_float64(backend, shape):
    grads = gradients(shape, 40)
    param = start(shape).requires_grad_()
    optimizer = train([param], [[g] for g in grads], lr=0.03, weight_decay=0.1, **backend)
    p, m, v = reference(start(shape), grads, lr=0.03, weight_decay=0.1)
    torch.testing.assert_close(param.detach(), p, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], m, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], v, rtol=1e-12, atol=0)
    assert optimizer.state[param]["step"].item() == 40


@backends
def test_every_backend_equals_the_reference_in_float32(backend):
    grads = gradients((257,), 60, dtype=torch.float32)
    param = start((257,), dtype=torch.float32).requires_grad_()
    train([param], [[g] for g in grads], **backend)
    p, _, _ = reference(start((257,), dtype=torch.float32), grads)
    torch.testing.assert_close(param.detach().double(), p, rtol=2e-6, atol=2e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32_and_rounded_once(backend, dtype):
    low = start((64,), dtype=dtype).requires_grad_()
    optimizer = RAdaBeliefW([low], **backend)
    for grad in gradients((64,), 12, dtype=dtype):
        before = low.detach().clone()
        old = {k: v.clone() for k, v in optimizer.state[low].items()}
        step(optimizer, [low], [grad])
        exact = before.float().requires_grad_()
        twin = RAdaBeliefW([exact], **backend)
        twin.state[exact].update(old)
        step(twin, [exact], [grad.float()])
        assert torch.equal(low.detach(), exact.detach().to(dtype))
    state = optimizer.state[low]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


@backends
@pytest.mark.parametrize("betas", [(0.9, 0.6), (0.9, 0.5), (0.9, 0.0), (0.0, 0.999), (0.0, 0.0), (0.99, 0.9999)])
def test_extreme_betas_equal_the_reference(backend, betas):
    grads = gradients((5,), 30)
    param = start((5,)).requires_grad_()
    train([param], [[g] for g in grads], betas=betas, **backend)
    torch.testing.assert_close(param.detach(), reference(start((5,)), grads, betas=betas)[0], rtol=1e-11, atol=1e-12)


@backends
def test_non_contiguous_parameters_equal_the_reference(backend):
    views = [start((4, 6)).t(), start((4, 6))[:, ::2], start((2, 4, 3, 3)).to(memory_format=torch.channels_last)]
    params = [view.detach().requires_grad_() for view in views]
    copies = [p.detach().clone().contiguous() for p in params]
    grads = [gradients(p.shape, 20, seed=i) for i, p in enumerate(params)]
    train(params, list(zip(*grads, strict=True)), **backend)
    for param, copy, own in zip(params, copies, grads, strict=True):
        torch.testing.assert_close(param.detach(), reference(copy, own)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cutting_into_cache_blocks_changes_nothing(memory_format):
    # Less than a block, more than one, one to the element, and several tensors in one.
    shapes = [(3,), (8, 4, 96, 96), (7,), (CPU_BLOCK + 1,), (CPU_BLOCK,), (0,), ()]
    assert math.prod(shapes[1]) > CPU_BLOCK
    params = [start(s) for s in shapes]
    params[1] = params[1].to(memory_format=memory_format)
    params = [p.requires_grad_() for p in params]
    grads = [gradients(s, 7, seed=i) for i, s in enumerate(shapes)]
    threads = torch.get_num_threads()
    # One thread takes the smaller blocks.
    torch.set_num_threads(1)
    try:
        train(params, list(zip(*grads, strict=True)), foreach=True)
    finally:
        torch.set_num_threads(threads)
    for param, shape, own in zip(params, shapes, grads, strict=True):
        torch.testing.assert_close(param.detach(), reference(start(shape), own)[0], rtol=1e-12, atol=1e-13)


@backends
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_is_stepped_as_two_real_ones(backend, dtype):
    real = start((6, 2), dtype=torch.float64).to(torch.view_as_real(torch.zeros((), dtype=dtype)).dtype)
    pairs = [g.to(real.dtype) for g in gradients((6, 2), 15)]
    number = torch.view_as_complex(real.clone()).requires_grad_()
    pair = real.clone().requires_grad_()
    optimizer = train([number], [[torch.view_as_complex(g)] for g in pairs], **backend)
    train([pair], [[g] for g in pairs], **backend)
    assert torch.equal(torch.view_as_real(number.detach()), pair.detach())
    assert optimizer.state[number]["exp_avg_sq"].dtype == dtype


@backends
def test_maximize_is_the_descent_of_the_negative_gradient_and_leaves_gradients_alone(backend):
    grads = gradients((9,), 10)
    up, down = start((9,)).requires_grad_(), start((9,)).requires_grad_()
    optimizer = RAdaBeliefW([up], maximize=True, **backend)
    for grad in grads:
        step(optimizer, [up], [grad])
        assert bits(up.grad) == bits(grad)
    train([down], [[-g] for g in grads], **backend)
    torch.testing.assert_close(up.detach(), down.detach(), rtol=1e-14, atol=0)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 7])
def test_a_learning_rate_of_0_leaves_the_bits_of_parameters_alone(backend, dtype, steps_before):
    values = torch.tensor([-0.0, 0.0, 1.5, -3e-39, 1e30], dtype=dtype)
    param = values.clone().requires_grad_()
    grads = [g.to(dtype) for g in gradients((5,), steps_before + 6)]
    optimizer = RAdaBeliefW([param], lr=0.0, weight_decay=0.5, **backend)
    for grad in grads:
        step(optimizer, [param], [grad])
    assert bits(param) == bits(values)
    assert optimizer.state[param]["step"].item() == len(grads)


def test_a_learning_rate_of_0_in_a_tensor_leaves_the_bits_of_parameters_alone():
    values = torch.tensor([-0.0, 0.0, 1.5, 1e30])
    for foreach in (True, False):
        param = values.clone().requires_grad_()
        optimizer = RAdaBeliefW([param], lr=torch.tensor(0.0), capturable=True, foreach=foreach)
        for grad in gradients((4,), 9, dtype=torch.float32):
            step(optimizer, [param], [grad])
        assert bits(param) == bits(values)
        optimizer.param_groups[0]["lr"].fill_(0.1)
        step(optimizer, [param], [torch.ones(4)])
        assert not torch.equal(param.detach(), values)


@backends
def test_each_parameter_counts_its_own_steps(backend):
    early, late, never = (start((4,), seed=s).requires_grad_() for s in range(3))
    grads = gradients((4,), 12)
    optimizer = train([early, late, never], [[g, g if t >= 5 else None, None] for t, g in enumerate(grads)], **backend)
    torch.testing.assert_close(early.detach(), reference(start((4,), seed=0), grads)[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(late.detach(), reference(start((4,), seed=1), grads[5:])[0], rtol=1e-12, atol=1e-13)
    assert torch.equal(never.detach(), start((4,), seed=2))
    assert never not in optimizer.state


@backends
def test_one_group_may_mix_dtypes(backend):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.float16]
    mixed = [start((6,)).to(d).requires_grad_() for d in dtypes]
    alone = [start((6,)).to(d).requires_grad_() for d in dtypes]
    grads = gradients((6,), 10)
    train(mixed, [[g.to(d) for d in dtypes] for g in grads], **backend)
    for param, dtype in zip(alone, dtypes, strict=True):
        train([param], [[g.to(dtype)] for g in grads], **backend)
    assert [bits(p) for p in mixed] == [bits(p) for p in alone]


@pytest.mark.parametrize("backend", [BACKENDS["capturable_foreach"], BACKENDS["capturable_single"], {}])
def test_lr_and_weight_decay_in_tensors_are_read_at_every_step(backend):
    lr, decay = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    tensors, floats = start((5,)).requires_grad_(), start((5,)).requires_grad_()
    one = RAdaBeliefW([tensors], lr=lr, weight_decay=decay, **backend)
    other = RAdaBeliefW([floats])
    for t, grad in enumerate(gradients((5,), 12)):
        lr.fill_(0.1 / (t + 1))
        decay.fill_(0.2 if t < 6 else 0.0)
        other.param_groups[0].update(lr=lr.item(), weight_decay=decay.item())
        step(one, [tensors], [grad])
        step(other, [floats], [grad])
    torch.testing.assert_close(tensors.detach(), floats.detach(), rtol=1e-12, atol=1e-14)


def test_the_step_can_be_differentiated_through_lr_decay_gradient_and_state():
    def stepped(param, grad, lr, decay, m, v, t):
        param, grad = param.clone(), grad.clone()
        param.grad = grad
        optimizer = RAdaBeliefW([param], lr=lr, weight_decay=decay, differentiable=True)
        optimizer.state[param].update(step=torch.tensor(t), exp_avg=m.clone(), exp_avg_sq=v.clone())
        optimizer.step()
        return param, optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]

    for t in (1.0, 10.0):
        tensors = [start((3,), seed=s).requires_grad_() for s in range(2)]
        scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.1)]
        state = [start((3,), seed=3).requires_grad_(), start((3,), seed=4).abs().requires_grad_()]
        assert torch.autograd.gradcheck(stepped, (*tensors, *scalars, *state, t))


def test_a_differentiable_step_equals_the_reference():
    grads, param = gradients((4,), 8), start((4,)).requires_grad_()
    moving = param.clone()
    optimizer = RAdaBeliefW([moving], differentiable=True)
    for grad in grads:
        moving.grad = grad
        optimizer.step()
    torch.testing.assert_close(moving.detach(), reference(start((4,)), grads)[0], rtol=1e-12, atol=1e-13)
    moving.sum().backward()
    assert param.grad is not None


@pytest.mark.parametrize(("placement", "accumulate"), [("outside", True), ("outside", False), ("inside", False)])
@backends
def test_the_other_places_of_eps_mean_what_they_say(backend, placement, accumulate):
    lr, eps, b1, b2 = 0.01, 1e-3, 0.9, 0.99
    grads, param = gradients((4,), 30), start((4,)).requires_grad_()
    options = {"eps_placement": placement, "accumulate_eps": accumulate, "rectify_threshold": 5.0}
    train([param], [[g] for g in grads], lr=lr, eps=eps, betas=(b1, b2), weight_decay=0.0, **options, **backend)
    p, m, v = start((4,)), torch.zeros(4).double(), torch.zeros(4).double()
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - m) ** 2 + (eps if accumulate else 0.0)
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        root = v_hat.sqrt() + eps if placement == "outside" else (v_hat + eps).sqrt()
        inf = 2 / (1 - b2) - 1
        rho = inf - 2 * t * b2**t / (1 - b2**t)
        gain = (rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho)
        p = p - lr * (gain**0.5 * m_hat / root if rho > 5 else m_hat)
    torch.testing.assert_close(param.detach(), p, rtol=1e-11, atol=1e-12)
