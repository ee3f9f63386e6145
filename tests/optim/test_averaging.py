"""Schedule-free averaging: every backend takes the reference's steps, and train() and eval() turn y into x and back."""

import copy

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.reference import reference_averaged_step
from tests.optim.helpers import backends, bits, gradients, start, step, train

AVERAGING = {"averaging": "schedule_free"}


def averaged(param, grads, **kwargs):
    """The reference's (y, z) after these gradients."""
    y = z = param.double()
    m, v, total = torch.zeros_like(y), torch.zeros_like(y), 0.0
    for t, grad in enumerate(grads, 1):
        y, z, m, v, total = reference_averaged_step(y, z, grad.double(), m, v, t, total, **kwargs)
    return y, z


@backends
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9), (0.9, 0.5)])
def test_every_backend_takes_the_references_steps(backend, betas):
    grads = gradients((7, 33), 40)
    y, z = averaged(start((7, 33)), grads, lr=3e-3, betas=betas, weight_decay=0.1)
    param = torch.nn.Parameter(start((7, 33)))
    optimizer = train(
        [param], [[grad] for grad in grads], lr=3e-3, betas=betas, weight_decay=0.1, **AVERAGING, **backend
    )
    torch.testing.assert_close(param.detach(), y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(optimizer.state[param]["z"], z, rtol=1e-9, atol=1e-11)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_the_fast_weights_in_float32(backend, dtype):
    grads = gradients((400,), 30, dtype=torch.float32)
    y, z = averaged(start((400,), dtype=dtype), [grad.to(dtype) for grad in grads], lr=3e-3)
    param = torch.nn.Parameter(start((400,), dtype=dtype))
    settings = AVERAGING | {"master_weights": dtype is torch.bfloat16}
    optimizer = train([param], [[grad.to(dtype)] for grad in grads], lr=3e-3, **settings, **backend)
    state = optimizer.state[param]
    assert state["z"].dtype is torch.float32
    torch.testing.assert_close(state["z"].double(), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.get("master", param).detach().double(), y, rtol=1e-4, atol=1e-5)


def test_eval_gives_the_average_of_the_fast_weights_and_train_goes_on():
    grads = gradients((50,), 30)
    param = torch.nn.Parameter(start((50,)))
    optimizer = RAdaBeliefW([param], lr=1e-2, betas=(0.9, 0.9), **AVERAGING)
    average, total = None, 0.0
    from robust_dist.optim.reference import rectification

    for t, grad in enumerate(grads, 1):
        step(optimizer, [param], [grad])
        weight = (rectification(t, 0.9) or 0.0) ** 2
        total += weight
        z = optimizer.state[param]["z"].clone()
        share = weight / total if total else 0.0
        average = z * share + (start((50,)) if average is None else average) * (1 - share)
    y = param.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(param.detach(), average, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) before step"):
        step(optimizer, [param], [grads[0]])
    optimizer.eval()
    optimizer.train()
    torch.testing.assert_close(param.detach(), y, rtol=1e-12, atol=1e-14)


def test_without_averaging_train_and_eval_do_nothing():
    param = torch.nn.Parameter(start((5,)))
    optimizer = train([param], [[grad] for grad in gradients((5,), 3)])
    before = bits(param)
    optimizer.eval()
    optimizer.train()
    assert bits(param) == before
    assert not optimizer.averages_weights
    assert "train_mode" not in optimizer.param_groups[0]


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_state_dict_resumes_bit_for_bit(evaluated):
    grads = gradients((6, 5), 20, dtype=torch.float32)

    def halfway():
        param = torch.nn.Parameter(start((6, 5), dtype=torch.float32))
        optimizer = train([param], [[grad] for grad in grads[:10]], **AVERAGING)
        if evaluated:
            optimizer.eval()
        return param, optimizer

    param, optimizer = halfway()
    other = torch.nn.Parameter(param.detach().clone())
    resumed = RAdaBeliefW([other], **AVERAGING)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, p in ((optimizer, param), (resumed, other)):
        one.train()
        for grad in grads[10:]:
            step(one, [p], [grad])
    assert bits(param) == bits(other)


def test_a_state_without_fast_weights_begins_to_average_where_it_stands():
    grads = gradients((9,), 12)
    param = torch.nn.Parameter(start((9,)))
    before = train([param], [[grad] for grad in grads[:6]])
    optimizer = RAdaBeliefW([param], **AVERAGING)
    for key, value in before.state[param].items():
        optimizer.state[param][key] = value
    where = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, [param], [grads[6]])
    assert bits(optimizer.state[param]["z"]) == bits(where) == bits(param)


@backends
def test_the_decay_need_not_be_multiplied_by_the_rate(backend):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    train(
        [param], [[torch.zeros(3, dtype=torch.float64)]] * 4, lr=1e-3, weight_decay=0.1, decay_by_rate=False, **backend
    )
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9**4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"averaging": "polyak"}, "averaging must be None or 'schedule_free'"),
        ({**AVERAGING, "betas": (0.0, 0.999)}, r"needs betas\[0\] above 0"),
        ({**AVERAGING, "betas": (0.9, 0.99999)}, r"needs betas\[1\] of at most 0.9999"),
        ({**AVERAGING, "differentiable": True}, "differentiable=True does not support averaging"),
        ({"rate_guard": 0.5}, "rate_guard must be None or a finite number of at least 1"),
        ({"rate_guard": 1.0, "maximize": True}, "does not support maximize=True"),
        ({"rate_constant": 0.0}, "rate_constant must be a finite number above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RAdaBeliefW([torch.nn.Parameter(torch.ones(1))], **settings)
