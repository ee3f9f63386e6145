import pytest
import torch

from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.schedule.toys import make, train_step


def hooks_of(optimizer):
    names = [f"{kind}_{when}" for kind in ("step", "load_state_dict", "state_dict") for when in ("pre", "post")]
    return {name: len(getattr(optimizer, f"_optimizer_{name}_hooks")) for name in names}


@pytest.mark.parametrize("made", [RobustSchedule, WeightDecaySwitch])
def test_schedules_made_anew_leave_no_hooks_of_the_old_ones(made):
    optimizer = make()
    schedule = made(optimizer, 4)
    once, step = hooks_of(optimizer), optimizer.step
    for _ in range(100):
        schedule = made(optimizer, 4)
    assert hooks_of(optimizer) == once
    assert optimizer.step == step
    train_step(optimizer, schedule)
    del schedule
    assert hooks_of(optimizer)["step_pre"] == hooks_of(optimizer)["load_state_dict_post"] == 0


def test_an_older_switch_that_is_kept_is_not_called_any_more():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.1)
    kept = [WeightDecaySwitch(optimizer, 4) for _ in range(100)]
    assert hooks_of(optimizer)["step_pre"] == 1
    train_step(optimizer, kept[-1])
