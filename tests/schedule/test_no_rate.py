"""A schedule of rates over an optimizer that takes none is refused before the first step, and a right one is not."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch


def optimizer(lr=0.1, **settings):
    return RAdaBeliefW([torch.nn.Parameter(torch.ones(2))], lr=lr, **{"rate_guard": 1.0, **settings})


WRONG = [
    ({}, r"decay='cosine'"),
    ({"decay": "step"}, r"decay='step'"),
    ({"decay": "constant", "warmup_steps": 1}, r"warmup_steps=1\)"),
    ({"warmup_steps": 3, "averaging": "schedule_free"}, r"warmup_steps=3, decay='cosine'"),
    ({"decay": lambda step, total: 0.5}, r"decay=<function"),
]


@pytest.mark.parametrize(("settings", "named"), WRONG)
def test_a_rate_that_changes_is_an_error_that_says_what_is_left(settings, named):
    averaging = {key: settings[key] for key in settings if key == "averaging"}
    ours = {key: settings[key] for key in settings if key != "averaging"}
    made = optimizer(**averaging)
    before = dict(made.param_groups[0])
    with pytest.raises(ValueError, match=rf"RobustSchedule\(.*{named}.*rate_guard=1, .*give decay='constant'"):
        RobustSchedule(made, 40, **ours)
    assert dict(made.param_groups[0]) == before


def test_what_is_left_switches_the_weight_decay():
    made = optimizer(weight_decay=0.5)
    schedule = RobustSchedule(made, 4, decay="constant")
    decays = []
    for _ in range(4):
        made.observe(1.0)
        made.param_groups[0]["params"][0].grad = torch.ones(2)
        decays.append(made.param_groups[0]["weight_decay"])
        made.step()
        schedule.step()
    assert decays == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_lr_ratio": 1.0},
        {"decay": lambda step, total: float(step >= 10)},  # 0 stops the parameters
    ],
)
def test_a_rate_that_does_not_change_is_right(settings):
    RobustSchedule(optimizer(), 40, **settings)
    WeightDecaySwitch(optimizer(), 40)


def test_a_rate_that_counts_for_some_groups_may_change():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    RobustSchedule(RAdaBeliefW([{"params": params[:1], "rate_guard": 1.0}, {"params": params[1:]}]), 40)
    RobustSchedule(optimizer(rate_guard=2.0), 40, warmup_steps=3)


def test_a_rate_that_falls_beside_an_average_is_a_warning_and_a_warm_up_is_none():
    with pytest.warns(UserWarning, match=r"decay='cosine' lowers .* averaging='schedule_free' averages .*'constant'"):
        RobustSchedule(optimizer(rate_guard=None, averaging="schedule_free"), 40)
    RobustSchedule(optimizer(rate_guard=None, averaging="schedule_free"), 40, warmup_steps=3, decay="constant")


IDLE = {
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 40),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: SequentialLR(o, [LinearLR(o, 0.5), RobustSchedule(o, 40, decay="constant")], [5]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, 40, cycle_momentum=False),
    "ConstantLR": lambda o: ChainedScheduler([ConstantLR(o, 0.5)]),
}
RIGHT = {
    "constant": lambda o: RobustSchedule(o, 40, decay="constant"),
    "lambda": lambda o: LambdaLR(o, lambda step: 1.0),
    "freeze": lambda o: LambdaLR(o, lambda step: float(step > 5)),
    "line": lambda o: LinearLR(o, 1.0, 1.0),
    "another's": lambda o: CosineAnnealingLR(optimizer(rate_guard=None), 40),
}


def prepared(make, **settings):
    """What Accelerate has after `prepare`, and the optimizer that takes no rate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    made = optimizer(**settings)
    return accelerator, *accelerator.prepare(made, make(made))


@pytest.mark.parametrize("name", IDLE)
def test_under_accelerate_torchs_schedulers_are_refused_by_name(name):
    from robust_dist.engines.accelerate import check

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To get the last learning rate", UserWarning)
        accelerator, made, schedule = prepared(IDLE[name])
        state = schedule.state_dict()
        with pytest.raises(ValueError, match=rf"a {name} sets .* rate_guard=1 takes none: leave it out"):
            check(accelerator, made)
        assert str(schedule.state_dict()) == str(state)
        check(*prepared(IDLE[name], rate_guard=2.0)[:2])


@pytest.mark.parametrize("name", RIGHT)
def test_under_accelerate_what_leaves_the_rate_alone_passes(name):
    from robust_dist.engines.accelerate import check

    accelerator, made, _ = prepared(RIGHT[name])
    check(accelerator, made)
