"""What has no effect, or another one than was asked for, with a measured rate or averaged weights is said by name."""

import copy
import math

import numpy as np
import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from tests.optim.helpers import bits, step

AVERAGING = {"averaging": "schedule_free"}


def two(lr=0.1, other=0.01, **settings):
    """An optimizer of two groups with learning rates of their own."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    return RAdaBeliefW([{"params": [params[0]], "lr": lr}, {"params": [params[1]], "lr": other}], **settings)


def stepped(optimizer, steps=1):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(steps):
        optimizer.observe(1.0)
        step(optimizer, params, [torch.ones_like(param) for param in params])
    return params


def test_groups_with_rates_of_their_own_are_an_error_where_no_rate_counts():
    wanted = r"lr=0.01 and lr=0.1, and would step alike: rate_guard=1 takes no .*one lr, or set rate_guard above 1"
    with pytest.raises(ValueError, match=wanted):
        two(rate_guard=1)
    with pytest.raises(ValueError, match=wanted):
        two(lr=torch.tensor(0.1), rate_guard=1.0)
    optimizer = two(other=0.1, rate_guard=1.0)
    with pytest.raises(ValueError, match=wanted):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.01})
    assert len(optimizer.param_groups) == 2
    stepped(optimizer)


def test_groups_may_have_rates_of_their_own_where_these_count_and_0_stops_a_group():
    two(rate_guard=2.0)
    two()
    mixed = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr, "rate_guard": k} for lr, k in ((1, 1), (2, None))
    ]
    RAdaBeliefW(mixed)
    params = stepped(two(other=0.0, rate_guard=1.0))
    assert params[0].tolist() != [1.0, 1.0]
    assert params[1].tolist() == [1.0, 1.0]


def test_a_group_may_join_while_a_schedule_is_at_another_rate():
    optimizer = two(other=0.1, rate_guard=1.0)
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1})


def test_rates_that_are_set_apart_by_hand_are_an_error_of_the_first_step_and_a_warning_later():
    optimizer = two(other=0.1, rate_guard=1.0)
    optimizer.param_groups[1]["lr"] = 0.01
    with pytest.raises(ValueError, match=r"lr=0.01 and lr=0.1, and would step alike"):
        stepped(optimizer)
    assert all(param.tolist() == [1.0, 1.0] for group in optimizer.param_groups for param in group["params"])
    optimizer.param_groups[1]["lr"] = 0.1
    stepped(optimizer)
    # As a checkpoint of an older release may be, which goes on as it was.
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["lr"] = 0.01
    again, twin = two(other=0.1, rate_guard=1.0), two(other=0.1, rate_guard=1.0)
    again.load_state_dict(saved)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(UserWarning, match=r"lr=0.01 and lr=0.1, and would step alike") as caught:
        found = stepped(again, 3)
    assert len(caught) == 1
    assert list(map(bits, found)) == list(map(bits, stepped(twin, 3)))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rate_that_changes_without_effect_is_one_warning(by_hand):
    optimizer = two(other=0.1, rate_guard=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def change():
        if by_hand:
            optimizer.param_groups[0]["lr"] -= 0.01
        else:
            schedule.step()

    stepped(optimizer)
    change()
    with pytest.warns(UserWarning, match=r"lr has changed from 0.1 to 0.0.*takes no learning rate.*decay='constant'"):
        stepped(optimizer)
    for _ in range(2):  # a warning here would fail the test
        change()
        stepped(optimizer)


@pytest.mark.parametrize("guard", [1.0, 2.0])
def test_a_rate_that_counts_or_is_0_for_a_while_may_change(guard):
    optimizer = two(other=0.1, rate_guard=guard)
    for lr in (0.1, 0.0, 0.1) if guard == 1.0 else (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        stepped(optimizer)


def test_a_constant_without_a_measured_rate_is_an_error():
    with pytest.raises(ValueError, match=r"rate_constant=2.0 has no effect without rate_guard: give both"):
        two(rate_constant=2.0)
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    RAdaBeliefW([{"params": params[:1], "rate_guard": 1.0}, {"params": params[1:]}], rate_constant=2.0)


def test_a_share_of_a_step_is_at_most_1():
    with pytest.raises(ValueError, match=r"weight_decay=1.5 with decay_by_rate=False is the share"):
        two(weight_decay=1.5, decay_by_rate=False)
    two(weight_decay=1.5)


SETTINGS = [
    ({"rate_guard": 1.0}, {}, "rate_guard", 1.0, None),
    (AVERAGING, {}, "averaging", "schedule_free", None),
    ({"rate_guard": 1.0}, {"rate_guard": 2.0}, "rate_guard", 1.0, 2.0),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("made", "saved", "name", "old", "new"), SETTINGS)
def test_a_state_that_switches_averaging_or_the_measured_rate_says_so(made, saved, name, old, new, turned):
    if turned:
        made, saved, old, new = saved, made, new, old
    state = copy.deepcopy(two(other=0.1, **saved).state_dict())
    optimizer = two(other=0.1, **made)
    with pytest.warns(UserWarning, match=f"state has {name}={new!r}, which holds.*made with {name}={old!r}") as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    assert optimizer.param_groups[0].get(name) == new
    stepped(optimizer)
    two(other=0.1, **saved).load_state_dict(state)  # says nothing


@pytest.mark.parametrize("loss", ["x", "1.0", None, [1.0], True, torch.ones(1, dtype=torch.bool), torch.ones(1) * 1j])
def test_what_is_no_loss_is_an_error(loss):
    with pytest.raises(TypeError, match=r"observe\(\) takes a (real )?loss.*got "):
        two(other=0.1, rate_guard=1.0).observe(loss)


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_loss_of_another_number_of_elements_is_an_error(shape):
    with pytest.raises(ValueError, match=r"takes a loss of 1 element, got shape .*mean over the micro-batch"):
        two(other=0.1, rate_guard=1.0).observe(torch.ones(shape))


@pytest.mark.parametrize(
    "loss",
    [
        2,
        2.0,
        np.float32(2),
        np.array(2.0),
        torch.tensor(2),
        torch.tensor([[2.0]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(1.0, requires_grad=True) * 2,
        torch.nn.Parameter(torch.tensor(2.0)),
    ],
)
def test_a_loss_may_be_any_real_number_with_or_without_a_graph(loss):
    found = []
    for one in (loss, 2.0):
        optimizer = two(other=0.1, rate_guard=1.0)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        optimizer.observe(one)
        step(optimizer, params, [torch.ones(2)] * 2)
        found.append([optimizer.measured_rate, *map(bits, params)])
    assert found[0] == found[1]


def test_a_loss_on_another_device_is_read_there():
    """The meta device has no values: it is a rate on that device all the same."""
    from robust_dist.optim.rate import Measured
    from robust_dist.optim.settings import MEASURED

    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    param.grad = torch.empty_like(param)
    groups = [{"params": [param], "lr": 0.1, "rate_guard": 1.0, **dict.fromkeys(MEASURED, 0.0)}]
    measured = Measured(groups)
    measured.observe(torch.tensor(1.0, requires_grad=True) * 2)
    (rate,) = measured.rates(groups, None, None).values()
    assert rate.device.type == "meta"


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_gradients_need_a_scale_that_can_be_taken_off(scale):
    with pytest.raises(ValueError, match=rf"scale={scale} must be a finite number above 0"):
        two(other=0.1, rate_guard=1.0).observe_gradients(scale)


@pytest.mark.parametrize(("copies", "error"), [(0, ValueError), (1.5, TypeError)])
def test_copies_are_a_number_of_ranks(copies, error):
    with pytest.raises(error, match=rf"copies={copies} is"):
        two(other=0.1, rate_guard=1.0).measure_over(copies=copies)
