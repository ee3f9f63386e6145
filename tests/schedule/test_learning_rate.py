import math

import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule
from tests.schedule.toys import BASES, make, paper_lr, rates, train_step

EVERY_OPTIMIZER = [RAdaBeliefW, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.RAdam]


@pytest.mark.parametrize("cls", EVERY_OPTIMIZER)
def test_without_warmup_every_step_has_the_papers_rate(cls):
    optimizer = make(cls)
    schedule = RobustSchedule(optimizer, 37)
    for step in range(37):
        _, used = train_step(optimizer, schedule)
        assert used == pytest.approx([paper_lr(step, 37, lr) for lr, _ in BASES], rel=1e-14, abs=1e-18)
        assert schedule.get_last_lr() == rates(optimizer) == schedule.get_lr()


@pytest.mark.parametrize("total", [10, 11])
@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_warmup_is_the_line_of_the_docstring_and_the_cosine_follows(total, warmup, ratio):
    optimizer = make()
    schedule = RobustSchedule(optimizer, total, warmup_steps=warmup, min_lr_ratio=ratio)
    for step in range(total):
        _, used = train_step(optimizer, schedule)
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        else:
            factor = ratio + (1 - ratio) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        assert used == pytest.approx([lr * factor for lr, _ in BASES], rel=1e-14, abs=1e-18)


def test_the_first_rate_after_warmup_is_the_base_rate_and_no_rate_before_is_zero():
    optimizer = make()
    schedule = RobustSchedule(optimizer, 20, warmup_steps=5)
    used = [train_step(optimizer, schedule)[1][0] for _ in range(6)]
    assert used == sorted(used)
    assert used[0] > 0
    assert used[5] == BASES[0][0]


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_past_the_last_step_the_rate_stays_at_its_minimum(ratio):
    optimizer = make()
    schedule = RobustSchedule(optimizer, 4, min_lr_ratio=ratio)
    for _ in range(4):
        train_step(optimizer, schedule)
    for _ in range(5):
        assert train_step(optimizer, schedule)[1] == pytest.approx([lr * ratio for lr, _ in BASES], abs=1e-18)


def test_rates_that_are_tensors_are_filled_in_place_from_the_schedules_making_on():
    optimizer = make(tensors=True)
    schedule = RobustSchedule(optimizer, 4)
    tensors = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for step in range(4):
        used = [(lr.item(), decay.item()) for lr, decay in tensors]
        wanted = [(paper_lr(step, 4, lr), 0.0 if step >= 3 else decay) for lr, decay in BASES]
        assert [x for pair in used for x in pair] == pytest.approx([x for pair in wanted for x in pair], rel=1e-6)
        train_step(optimizer, schedule)
    for group, (lr, decay) in zip(optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is lr
        assert group["weight_decay"] is decay


def test_ticks_without_optimizer_steps_count_where_there_is_no_accelerate():
    optimizer = make()
    schedule = RobustSchedule(optimizer, 8)
    plotted = []
    for _ in range(8):
        plotted.append(rates(optimizer)[0])
        schedule.step()
    assert plotted == pytest.approx([paper_lr(step, 8, BASES[0][0]) for step in range(8)])


def test_step_with_a_number_goes_to_that_step():
    optimizer = make()
    schedule = RobustSchedule(optimizer, 8)
    schedule.step(7)
    assert rates(optimizer)[0] == pytest.approx(paper_lr(7, 8, BASES[0][0]))
    assert schedule.weight_decay_switch.is_off
    schedule.step(2)
    assert not schedule.weight_decay_switch.is_off
    assert schedule.last_epoch == 2


@pytest.mark.parametrize("epoch", [1.5, "3", -1])
def test_step_never_raises_type_error_which_deepspeed_would_swallow(epoch):
    schedule = RobustSchedule(make(), 8)
    with pytest.raises(ValueError, match="epoch"):
        schedule.step(epoch)
    schedule.step(any_keyword=3)
    assert schedule.last_epoch == 1


def test_last_epoch_is_torchs_the_last_step_done():
    optimizer = make()
    first = RobustSchedule(optimizer, 8)
    for _ in range(7):
        train_step(optimizer, first)
    second = RobustSchedule(optimizer, 8, last_epoch=6)
    assert second.last_epoch == first.last_epoch == 7
    assert rates(optimizer) == pytest.approx([paper_lr(7, 8, lr) for lr, _ in BASES])
    assert second.weight_decay_switch.num_steps == 7


def test_a_group_that_is_added_later_is_scheduled_too():
    optimizer = make()
    schedule = RobustSchedule(optimizer, 8)
    for step in range(8):
        if step == 3:
            late = torch.nn.Parameter(torch.zeros(2))
            optimizer.add_param_group({"params": [late], "lr": 5.0, "weight_decay": 0.25})
            schedule.step(3)
        used = train_step(optimizer, schedule)
        if step >= 3:
            assert used[1][-1] == pytest.approx(paper_lr(step, 8, 5.0))
            assert used[0][-1] == (0.0 if step >= 6 else 0.25)
    assert schedule.base_lrs == [lr for lr, _ in BASES] + [5.0]


def test_torchs_sequential_scheduler_can_hold_it():
    optimizer = make()
    flat = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [flat, RobustSchedule(optimizer, 8)], milestones=[3])
    used = []
    for _ in range(11):
        used.append(train_step(optimizer)[1][0])
        chain.step()
    assert used[3:] == pytest.approx([paper_lr(step, 8, BASES[0][0]) for step in range(8)])


def test_accelerate_must_not_find_total_steps_on_it():
    assert not hasattr(RobustSchedule(make(), 8), "total_steps")


@pytest.mark.parametrize("total_steps", [300, 7, 4])
def test_step_decay_is_a_tenth_from_half_and_a_hundredth_from_three_quarters_on(total_steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = RobustSchedule(torch.optim.SGD([parameter], lr=0.1), total_steps, decay="step")
    seen = []
    for _ in range(total_steps + 2):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    expected = [
        0.1 * (1 if 2 * s < total_steps else 0.1 if 4 * s < 3 * total_steps else 0.01) for s in range(len(seen))
    ]
    assert seen == pytest.approx(expected)


def test_a_constant_rate_stays_after_its_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = RobustSchedule(torch.optim.SGD([parameter], lr=0.3), 6, decay="constant", warmup_steps=2)
    seen = []
    for _ in range(8):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.1, 0.2] + [0.3] * 6)


@pytest.mark.parametrize("settings", [{"decay": "linear"}, {"decay": "step", "min_lr_ratio": 0.1}])
def test_an_unknown_decay_or_an_end_that_it_does_not_have_is_refused(settings):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="decay"):
        RobustSchedule(torch.optim.SGD([parameter], lr=0.3), 6, **settings)
