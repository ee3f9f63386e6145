import math

import pytest
import torch

from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.schedule.toys import make


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, r"total_steps=0 is below 1"),
        ({"total_steps": -5}, ValueError, r"total_steps=-5"),
        ({"total_steps": 10.0}, TypeError, r"total_steps=10.0 is a float"),
        ({"total_steps": True}, TypeError, r"total_steps=True"),
        ({"total_steps": "auto"}, TypeError, r"total_steps='auto'"),
        ({"warmup_steps": 11}, ValueError, r"warmup_steps=11 is above 10"),
        ({"warmup_steps": -1}, ValueError, r"warmup_steps=-1"),
        ({"warmup_steps": 1.5}, TypeError, r"warmup_steps=1.5"),
        ({"weight_decay_off_at": 1.01}, ValueError, r"off_at=1.01 .* <= 1"),
        ({"weight_decay_off_at": -0.1}, ValueError, r"off_at=-0.1"),
        ({"weight_decay_off_at": math.nan}, ValueError, r"off_at=nan"),
        ({"weight_decay_off_at": "0.75"}, TypeError, r"off_at='0.75'"),
        ({"min_lr_ratio": 2}, ValueError, r"min_lr_ratio=2"),
        ({"min_lr_ratio": math.inf}, ValueError, r"min_lr_ratio=inf"),
        ({"last_epoch": -2}, ValueError, r"last_epoch=-2"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it_and_touches_nothing(settings, error, message):
    optimizer = make()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=message):
        RobustSchedule(optimizer, **({"total_steps": 10} | settings))
    assert [dict(group) for group in optimizer.param_groups] == before


def test_a_name_that_it_does_not_have_and_no_total_are_pythons_type_errors():
    with pytest.raises(TypeError, match="warmup_num_step"):
        RobustSchedule(make(), 10, warmup_num_step=3)
    with pytest.raises(TypeError, match="total_steps"):
        RobustSchedule(make())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reduce": "most"}, ValueError, r"reduce='most' .*'any', 'all', 'majority'"),
        ({"should_switch": True}, TypeError, r"should_switch=True"),
        ({"off_at": 7}, ValueError, r"off_at=7"),
        ({"total_steps": 0}, ValueError, r"total_steps=0"),
    ],
)
def test_a_wrong_setting_of_the_switch_is_an_error_that_names_it(settings, error, message):
    with pytest.raises(error, match=message):
        WeightDecaySwitch(make(), **({"total_steps": 10} | settings))


@pytest.mark.parametrize("made", [RobustSchedule, WeightDecaySwitch])
def test_what_is_no_optimizer_is_a_type_error(made):
    with pytest.raises(TypeError, match="Linear"):
        made(torch.nn.Linear(1, 1), 10)


@pytest.mark.parametrize("number", [torch.tensor(10), __import__("numpy").int64(10)])
def test_whole_numbers_of_other_kinds_are_taken(number):
    assert WeightDecaySwitch(make(), number).total_steps == 10
