"""The rate that a run measures: its equations on every backend, what it needs, what it leaves alone, and its bound."""

import copy
import math
import sys

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.reference import reference_averaged_step, reference_rate, reference_step
from tests.optim.helpers import backends, bits, gradients, start, step


def losses(steps):
    return [2.0 / (1 + 0.1 * t) for t in range(steps)]


def guarded(params, grads_per_step, found, **kwargs):
    optimizer = RAdaBeliefW(params, **kwargs)
    for grads, loss in zip(grads_per_step, found, strict=True):
        optimizer.observe(loss)
        step(optimizer, params, grads)
    return optimizer


@backends
@pytest.mark.parametrize("guard", [1.0, 2.0, 1e9])
@pytest.mark.parametrize("averaging", [None, "schedule_free"])
def test_every_backend_takes_the_references_rate(backend, guard, averaging):
    grads, found, betas = gradients((5, 8), 25), losses(25), (0.9, 0.95)
    y = z = start((5, 8))
    m, v, total = torch.zeros_like(y), torch.zeros_like(y), 0.0
    sums = [float(grad.abs().sum()) for grad in grads]
    for t, grad in enumerate(grads, 1):
        lr = reference_rate(sums[:t], found[:t], lr=2e-2, guard=guard)
        if averaging:
            y, z, m, v, total = reference_averaged_step(y, z, grad, m, v, t, total, lr=lr, betas=betas)
        else:
            y, m, v = reference_step(y, grad, m, v, t, lr=lr, betas=betas)
    param = torch.nn.Parameter(start((5, 8)))
    settings = {"lr": 2e-2, "betas": betas, "rate_guard": guard, "averaging": averaging}
    guarded([param], [[grad] for grad in grads], found, **settings, **backend)
    torch.testing.assert_close(param.detach(), y, rtol=1e-9, atol=1e-11)


def test_a_guard_without_end_is_the_given_rate_bit_for_bit():
    grads = [[grad] for grad in gradients((40,), 12, dtype=torch.float32)]
    ours, plain = (torch.nn.Parameter(start((40,), dtype=torch.float32)) for _ in range(2))
    guarded([ours], grads, losses(12), rate_guard=1e30)
    optimizer = RAdaBeliefW([plain])
    for (grad,) in grads:
        step(optimizer, [plain], [grad])
    assert bits(ours) == bits(plain)


def test_a_step_without_a_loss_is_an_error_that_names_the_setting():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = RAdaBeliefW([param], rate_guard=2.0)
    with pytest.raises(RuntimeError, match=r"rate_guard=2.0 needs the loss of every step: call optimizer.observe"):
        step(optimizer, [param], [torch.ones(3)])
    assert param.tolist() == [1.0, 1.0, 1.0]
    optimizer.observe(1.0)
    step(optimizer, [param], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="rate_guard"):
        step(optimizer, [param], [torch.ones(3)])


def test_a_dry_step_needs_no_loss_and_leaves_what_was_measured():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = guarded([param], [[torch.ones(3)]], [1.0], rate_guard=1.0)
    before, where = optimizer.state_dict()["param_groups"][0], param.tolist()
    measured = {key: value for key, value in before.items() if key.startswith("rate")}
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, [param], [torch.ones(3)])
    after = optimizer.state_dict()["param_groups"][0]
    assert {key: after[key] for key in measured} == measured
    assert param.tolist() == where


def test_the_mean_of_the_micro_batches_counts():
    grads = [[torch.full((2,), 0.5)]] * 3
    ours, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = RAdaBeliefW([ours], rate_guard=1.0)
    for one in grads:
        optimizer.observe(torch.tensor([1.0]))
        optimizer.observe(torch.tensor(3.0, requires_grad=True))
        step(optimizer, [ours], one)
    guarded([other], grads, [2.0] * 3, rate_guard=1.0)
    assert bits(ours) == bits(other)


def test_gradients_count_as_they_are_before_they_are_clipped():
    grads = [[grad] for grad in gradients((30,), 6, dtype=torch.float32, scale=1.0)]
    ours = torch.nn.Parameter(start((30,), dtype=torch.float32))
    optimizer = RAdaBeliefW([ours], rate_guard=1.0)
    for (grad,) in grads:
        optimizer.observe(1.0)
        ours.grad = grad.clone()
        optimizer.observe_gradients()
        torch.nn.utils.clip_grad_norm_([ours], 0.1)
        optimizer.step()
    group = optimizer.state_dict()["param_groups"][0]
    wanted = 0.0
    for (grad,) in grads:
        wanted = 0.9 * wanted + 0.1 * float(grad.double().abs().sum())
    assert group["rate_mean_gradient"] == pytest.approx(wanted, rel=1e-12)


def test_gradients_observed_before_there_are_any_are_an_error_and_not_a_rate_of_0():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = RAdaBeliefW([param], rate_guard=1.0)
    optimizer.observe(1.0)
    optimizer.observe_gradients()
    with pytest.raises(RuntimeError, match=r"rate_guard=1.0: observe_gradients\(\) .* call it after backward\(\)"):
        step(optimizer, [param], [torch.ones(3)])
    assert param.tolist() == [1.0, 1.0, 1.0]
    optimizer.observe(1.0)
    step(optimizer, [param], [torch.ones(3)])
    assert param.tolist() != [1.0, 1.0, 1.0]


def test_a_loss_that_is_not_a_number_does_not_leave_the_rate_to_lr():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = guarded([param], [[torch.ones(3)]] * 2, [1.0, float("nan")], rate_guard=1.0)
    assert math.isnan(optimizer.measured_rate)
    assert param.isnan().all()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_overflows_touches_nothing(capturable):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = guarded([param], [[torch.ones(3)]] * 2, [1.0, 0.9], rate_guard=1.0, capturable=capturable)
    before, where = copy.deepcopy(optimizer.state_dict()), bits(param)
    optimizer.observe(float("nan"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    step(optimizer, [param], [torch.full((3,), torch.inf)])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert bits(param) == where
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.observe(0.8)
    step(optimizer, [param], [torch.full((3,), 4.0)])  # scaled by 4
    other = torch.nn.Parameter(torch.ones(3))
    guarded([other], [[torch.ones(3)]] * 3, [1.0, 0.9, 0.8], rate_guard=1.0, capturable=capturable)
    torch.testing.assert_close(param, other, rtol=1e-6, atol=0)


def test_on_a_device_no_value_is_read_and_after_the_first_step_none_is_sent():
    """The meta device has no values, so that reading one is an error."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from robust_dist.optim.rate import Measured
    from robust_dist.optim.settings import MEASURED

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
                sent.append(args[0])
            return function(*args, **(kwargs or {}))

    params = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for param in params:
        param.grad = torch.empty_like(param)
    groups = [{"params": params, "lr": 0.1, "rate_guard": 2.0, **dict.fromkeys(MEASURED, 0.0)}]
    measured, sent, counts = Measured(groups), [], []
    for loss in (1.0, torch.empty((), device="meta"), torch.empty(1, device="meta"), 2.0):
        with Copies():
            measured.observe(loss)
            rates = measured.rates(groups, None, torch.empty((), device="meta"))
        counts.append(len(sent))
        assert [rate.device.type for rate in rates.values()] == ["meta"]
    assert counts == [counts[0]] * 4


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy"])
def test_a_copy_goes_on_bit_for_bit(copied):
    grads = gradients((6, 5), 20, dtype=torch.float32)
    settings = {"rate_guard": 1.0, "averaging": "schedule_free"}
    param = torch.nn.Parameter(start((6, 5), dtype=torch.float32))
    optimizer = guarded([param], [[grad] for grad in grads[:10]], losses(10), **settings)
    if copied == "deepcopy":
        other_optimizer = copy.deepcopy(optimizer)
        (other,) = other_optimizer.param_groups[0]["params"]
    else:
        other = torch.nn.Parameter(param.detach().clone())
        other_optimizer = RAdaBeliefW([other], **settings)
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, p in ((optimizer, param), (other_optimizer, other)):
        for grad, loss in zip(grads[10:], losses(20)[10:], strict=True):
            one.observe(loss)
            step(one, [p], [grad])
    assert bits(param) == bits(other)


def test_engines_may_step_group_by_group_with_one_rate():
    """As ZeRO does: `param_groups` holds one group at a time, and whoever knows all gradients hands them over."""
    grads = [[torch.full((2,), 0.5), torch.full((3,), 0.25)]] * 4
    whole = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parts = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    optimizer = RAdaBeliefW([{"params": [p]} for p in whole], rate_guard=1.0)
    cut = RAdaBeliefW([{"params": [p]} for p in parts], rate_guard=1.0)
    for two in grads:
        optimizer.observe(1.0)
        step(optimizer, whole, two)
        cut.observe(1.0)
        for p, grad in zip(parts, two, strict=True):
            p.grad = grad.clone()
        cut.observe_gradients()
        groups = cut.param_groups
        for group in groups:
            cut.param_groups = [group]
            cut.step()
        cut.param_groups = groups
    assert list(map(bits, whole)) == list(map(bits, parts))
    with pytest.raises(RuntimeError, match="rate_guard"):
        cut.step()


def length_of_scale_invariant_weights(steps):
    """Their length after so many steps on noise, which never lowers the loss; the gradient shrinks as they grow."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40))
    optimizer = RAdaBeliefW([weight], betas=(0.9, 0.95), eps=1e-30, weight_decay=0.0, rate_guard=1.0)
    for _ in range(steps):
        loss = (torch.randn(16, 40) @ (weight / weight.norm()) - torch.randn(16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
    return weight.detach().norm().item()


def test_the_rate_of_scale_invariant_weights_runs_away_without_the_bound_and_not_with_it(monkeypatch):
    bounded = length_of_scale_invariant_weights(500)
    monkeypatch.setattr("robust_dist.optim.rate.BOUND", float("inf"))
    free = length_of_scale_invariant_weights(500)
    assert free > 1e6
    assert bounded < 1e4


def test_the_sum_of_absolute_values_is_exact_where_torchs_norm_is_not():
    from robust_dist.optim.fused_cpu import sum_abs

    tensor = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    tensors = [tensor, tensor[:7], tensor.double(), tensor.bfloat16(), tensor.half(), tensor[::2]]
    wanted = sum(t.double().abs().sum().item() for t in tensors)
    assert sum_abs(tensors) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_sum_of_absolute_values_is_the_same_at_each_number_of_threads(dtype):
    from robust_dist.optim.fused_cpu import sum_abs

    sizes = [0, 1, 15, 97, 131_072, 0, 300_001, 64, 64]
    tensors = [gradients((size,), 1, dtype=dtype, seed=size)[0] for size in sizes]
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(sum_abs(tensors))
    finally:
        torch.set_num_threads(before)
    (total,) = found
    assert total == pytest.approx(sum(t.double().abs().sum().item() for t in tensors), rel=1e-12)
    assert sum_abs([]) == 0.0


def python_calls(function):
    """How many functions of Python one call of `function` calls."""
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(frame) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_steady_step_takes_as_many_calls_for_fifty_tensors_as_for_five_and_has_the_bits_of_another():
    """Of hundreds of small tensors gathering costs more than the step."""
    from robust_dist.optim import fused_cpu

    if fused_cpu.library() is None:
        pytest.skip("the C library is not built")
    calls = {}
    for number in (5, 50):
        params = [torch.nn.Parameter(start((3,), dtype=torch.float32)) for _ in range(number)]
        grads = [gradients((3,), 1, dtype=torch.float32)[0] for _ in params]
        optimizer = guarded(params, [grads] * 7, losses(7), rate_guard=1.0)
        twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
        twin = RAdaBeliefW(twins, rate_guard=1.0)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(3):
            optimizer.observe(1.0)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            calls[number] = python_calls(optimizer.step)
        for _ in range(3):  # the gradients handed over, as where they are clipped
            twin.observe(1.0)
            for param, grad in zip(twins, grads, strict=True):
                param.grad = grad.clone()
            twin.observe_gradients()
            twin.step()
        assert list(map(bits, params)) == list(map(bits, twins))
    assert calls[5] == calls[50]


@pytest.mark.parametrize("capturable", [False, True])
def test_the_measured_rate_is_known_after_a_load_before_the_next_step(capturable):
    param = torch.nn.Parameter(torch.ones(3))
    falling = [3.0, 1.0, 0.2, 5.0]
    settings = {"rate_guard": 1.0, "capturable": capturable}
    optimizer = guarded([param], [[torch.ones(3)]] * 4, falling, **settings)
    fresh = RAdaBeliefW([param], **settings)
    assert fresh.measured_rate == 0.0
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.measured_rate == optimizer.measured_rate > 0.0
    assert copy.deepcopy(optimizer).measured_rate == optimizer.measured_rate


def test_a_step_without_any_gradient_measures_nothing():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = guarded([param], [[torch.ones(3)]], [1.0], rate_guard=1.0)
    before = optimizer.state_dict()["param_groups"][0]
    for _ in range(5):
        _step_without_gradient(optimizer, param)
    assert optimizer.state_dict()["param_groups"][0] == before
    with pytest.raises(RuntimeError, match="needs the loss of every step"):  # what was observed belonged to that step
        step(optimizer, [param], [torch.ones(3)])


def _step_without_gradient(optimizer, param):
    param.grad = None
    optimizer.observe(2.0)
    optimizer.step()


def test_the_options_may_be_set_in_a_group_between_two_steps():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = RAdaBeliefW([param])
    step(optimizer, [param], [torch.ones(3)])
    optimizer.param_groups[0] |= {"averaging": "schedule_free", "rate_guard": 1.0}
    optimizer.eval()
    optimizer.train()
    for _ in range(8):
        optimizer.observe(1.0)
        step(optimizer, [param], [torch.ones(3)])
    trained = param.tolist()
    optimizer.eval()
    assert optimizer.measured_rate > 0.0
    assert param.tolist() != trained


def test_a_skipped_batch_does_not_count_once_it_is_forgotten():
    ours, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = RAdaBeliefW([ours], rate_guard=1.0)
    optimizer.observe(float("nan"))
    optimizer.forget_observed()
    optimizer.observe(1.0)
    step(optimizer, [ours], [torch.ones(3)])
    guarded([other], [[torch.ones(3)]], [1.0], rate_guard=1.0)
    assert bits(ours) == bits(other)
