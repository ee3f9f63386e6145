"""Rates and decays that are tensors, and that somebody else holds, too."""

import copy
import pickle

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.schedule.toys import decays, paper_lr, rates, train_step

TOTAL = 8
LR, DECAY = 0.1, 0.5


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def shared(groups=1, cls=RAdaBeliefW):
    """An optimizer whose defaults and groups hold one lr and one weight_decay, and these two."""
    lr, decay = torch.tensor(LR), torch.tensor(DECAY)
    return cls([{"params": [parameter()]} for _ in range(groups)], lr=lr, weight_decay=decay), lr, decay


def wanted(step, groups=1):
    return (
        pytest.approx([0.0 if step >= 0.75 * TOTAL else DECAY] * groups),
        pytest.approx([paper_lr(step, TOTAL, LR)] * groups),
    )


def used_by(optimizer, schedule, steps=TOTAL):
    return [train_step(optimizer, schedule) for _ in range(steps)]


@pytest.mark.parametrize("cls", [RAdaBeliefW, torch.optim.AdamW])
def test_the_users_tensors_the_defaults_and_other_groups_are_not_filled(cls):
    optimizer, lr, decay = shared(groups=3, cls=cls)
    used = used_by(optimizer, RobustSchedule(optimizer, TOTAL))
    assert used == [wanted(step, 3) for step in range(TOTAL)]
    assert (lr.item(), decay.item()) == (pytest.approx(LR), pytest.approx(DECAY))
    assert optimizer.defaults["lr"] is lr


def test_a_group_that_is_added_later_has_the_defaults_as_its_base_values():
    optimizer, _, _ = shared()
    schedule = RobustSchedule(optimizer, TOTAL)
    for step in range(TOTAL):
        if step == 3:
            optimizer.add_param_group({"params": [parameter()]})
        if step == 5:
            # The first group's own tensor in a second group: its value is that of step 5.
            optimizer.add_param_group({"params": [parameter()], "lr": optimizer.param_groups[0]["lr"]})
        before = rates(optimizer)
        train_step(optimizer, schedule)
        assert before[0] == pytest.approx(paper_lr(step, TOTAL, LR))
    assert schedule.base_lrs == pytest.approx([LR, LR, paper_lr(5, TOTAL, LR)])


def test_two_optimizers_with_one_tensor_have_their_own_rates():
    first, lr, decay = shared()
    schedule = RobustSchedule(first, TOTAL)
    used_by(first, schedule, 4)
    second = torch.optim.AdamW([parameter()], lr=lr, weight_decay=decay)
    used = used_by(second, RobustSchedule(second, TOTAL))
    assert used == [wanted(step) for step in range(TOTAL)]
    assert (decays(first), rates(first)) == wanted(4)


def test_a_tensor_that_a_user_puts_into_a_group_is_not_filled():
    optimizer, _, _ = shared()
    schedule = RobustSchedule(optimizer, TOTAL)
    used_by(optimizer, schedule, 2)
    lr, decay = torch.tensor(0.3), torch.tensor(7.0)
    optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
    used_by(optimizer, schedule, 2)
    assert (lr.item(), decay.item()) == (pytest.approx(0.3), 7.0)
    assert decays(optimizer) == pytest.approx([DECAY])
    assert rates(optimizer) == pytest.approx([0.3 * paper_lr(4, TOTAL, 1) / paper_lr(2, TOTAL, 1)])


def test_groups_that_share_a_tensor_in_a_checkpoint_have_their_own_after_a_load():
    source, lr, _ = shared(groups=2)
    state = copy.deepcopy(source.state_dict())
    optimizer, _, _ = shared(groups=2)
    schedule = RobustSchedule(optimizer, TOTAL)
    optimizer.load_state_dict(state)
    one, other = (group["lr"] for group in optimizer.param_groups)
    assert one is not other
    assert used_by(optimizer, schedule) == [wanted(step, 2) for step in range(TOTAL)]
    assert state["param_groups"][0]["lr"].item() == lr.item()


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_optimizer_has_its_own(copies):
    optimizer, lr, _ = shared()
    schedule = RobustSchedule(optimizer, TOTAL)
    used_by(optimizer, schedule, 3)
    other, its_schedule = copies((optimizer, schedule))
    assert used_by(other, its_schedule, 5) == [wanted(step) for step in range(3, TOTAL)]
    assert (decays(optimizer), rates(optimizer)) == wanted(3)
    assert lr.item() == pytest.approx(LR)


@pytest.mark.parametrize("made", [RobustSchedule, WeightDecaySwitch])
def test_the_groups_own_tensor_stays_the_same_object_for_a_captured_step_also_for_the_next_schedule(made):
    optimizer, _, _ = shared()
    schedule = made(optimizer, TOTAL)
    own = dict(optimizer.param_groups[0])
    used_by(optimizer, schedule, 7)
    del schedule
    used_by(optimizer, made(optimizer, TOTAL), 7)
    assert all(optimizer.param_groups[0][key] is own[key] for key in ("weight_decay", "lr"))
