import pytest
import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.schedule.toys import BASES, decays, make, train_step, wanted_decays

ON = [decay for _, decay in BASES]
OFF = [0.0] * len(BASES)


@pytest.mark.parametrize("cls", [RAdaBeliefW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 100])
def test_the_decay_is_off_for_every_step_from_three_quarters_on(cls, total):
    optimizer = make(cls)
    switch = WeightDecaySwitch(optimizer, total)
    for step in range(total + 3):
        used, _ = train_step(optimizer, switch)
        assert used == wanted_decays(step, total), step
    assert switch.is_off


@pytest.mark.parametrize(
    ("off_at", "total", "first_off"),
    [
        (0.75, 100, 75),
        (0.75, 101, 76),
        (0.1, 30, 3),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.07, 100, 7),
        (0.28, 100, 28),
        (0.57, 100, 57),
        (0.55, 20, 11),
        (1 / 3, 3, 1),
        (0.0, 5, 0),
        (1, 5, 5),
        (1e-9, 5, 1),
        (0.999999999, 10**12, 999999999000),
    ],
)
def test_the_threshold_is_exact_decimal_arithmetic(off_at, total, first_off):
    assert WeightDecaySwitch(make(), total, off_at=off_at).switch_step == first_off


def test_off_at_zero_starts_without_decay_and_one_never_switches_within_the_run():
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 4, off_at=0)
    assert switch.is_off
    assert decays(optimizer) == OFF
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 4, off_at=1.0)
    for _ in range(4):
        assert not switch.is_off
        assert train_step(optimizer, switch)[0] == ON


@pytest.mark.parametrize("late", [1, 3, 5])
def test_a_group_that_is_added_later_has_its_decay_until_the_switch(late):
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 6, off_at=0.5)
    seen = []
    for step in range(6):
        if step == late:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": 0.125})
            optimizer.param_groups[-1]["params"][0].grad = torch.ones(1)
            optimizer.register_step_pre_hook(lambda o, *_: seen.append(decays(o)[-1]))
        train_step(optimizer, switch)
    assert seen == [0.0 if step >= 3 else 0.125 for step in range(late, 6)]
    assert switch.state_dict()["base_weight_decay"] == [*ON, 0.125]


def test_an_optimizer_without_weight_decay_is_left_alone():
    optimizer = torch.optim.Rprop([torch.nn.Parameter(torch.ones(2))])
    switch = WeightDecaySwitch(optimizer, 2, off_at=0.5)
    train_step_without_decay = [optimizer.step(), switch.step()]
    assert train_step_without_decay == [None, None]
    assert "weight_decay" not in optimizer.param_groups[0]


def test_steps_with_param_groups_cut_to_one_each_use_their_own_decay():
    # What DeepSpeed's ZeRO does (trap 4); no call of step() may move the clock.
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 4)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(decays(o)))
    for step in range(4):
        whole = optimizer.param_groups
        for group in whole:
            optimizer.param_groups = [group]
            # What a universal load leaves in every group (trap 9).
            group["weight_decay"], group["initial_weight_decay"] = 0.9, 0.9
            optimizer.step()
        optimizer.param_groups = whole
        switch.step()
        assert used[-3:] == [[decay] for decay in wanted_decays(step, 4)]
    assert switch.num_steps == 4


def test_a_decay_written_by_hand_is_replaced_before_the_next_step():
    optimizer = make()
    used = []
    switch = WeightDecaySwitch(optimizer, 4, off_at=0.5)
    optimizer.register_step_pre_hook(lambda o, *_: used.append(decays(o)))
    for _ in range(4):
        optimizer.param_groups[0]["weight_decay"] = 7.0
        train_step(optimizer, switch)
    assert used == [ON, ON, OFF, OFF]


def test_decays_that_are_tensors_keep_their_storage():
    optimizer = make(tensors=True)
    switch = WeightDecaySwitch(optimizer, 4, off_at=0.5)
    tensors = [group["weight_decay"] for group in optimizer.param_groups]
    for step in range(4):
        assert [t.item() for t in tensors] == pytest.approx(wanted_decays(step, 4, 0.5))
        train_step(optimizer, switch)


def test_a_group_that_an_engine_drops_takes_its_decay_with_it():
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 4, off_at=0.5)
    del optimizer.param_groups[0]
    assert [train_step(optimizer, switch)[0] for _ in range(3)] == [ON[1:], ON[1:], OFF[1:]]
    assert switch.state_dict()["base_weight_decay"] == ON[1:]


def test_a_new_switch_on_an_optimizer_that_is_past_one_knows_the_decays():
    optimizer = make()
    old = WeightDecaySwitch(optimizer, 4)
    for _ in range(4):
        train_step(optimizer, old)
    assert decays(optimizer) == OFF
    WeightDecaySwitch(optimizer, 4)
    assert decays(optimizer) == ON


def test_two_switches_on_one_optimizer_are_an_error_at_the_first_step_of_the_older():
    optimizer = make()
    schedule = RobustSchedule(optimizer, 4)
    switch = WeightDecaySwitch(optimizer, 4)
    optimizer.step()
    switch.step()
    with pytest.raises(RuntimeError, match="weight_decay_off_at=None"):
        schedule.step()


def test_a_schedule_without_its_switch_leaves_the_decay_to_one_of_the_users_own():
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 8, off_at=0.25)
    schedule = RobustSchedule(optimizer, 8, weight_decay_off_at=None)
    assert [train_step(optimizer, schedule, switch)[0] for _ in range(4)] == [ON, ON, OFF, OFF]


def test_an_own_trigger_is_applied_one_step_later_and_for_good():
    optimizer = make()
    wishes = iter([False, False, True, False, False])
    asked = []

    def should_switch():
        asked.append(next(wishes))
        return asked[-1]

    switch = WeightDecaySwitch(optimizer, 100, off_at=0.01, should_switch=should_switch)
    assert switch.switch_step is None
    used = [train_step(optimizer, switch)[0] for _ in range(8)]
    # Said yes at the third call, after optimizer step 2: step 4 is the first without.
    assert used == [ON] * 4 + [OFF] * 4
    assert switch.switch_step == 4
    assert len(asked) == 3


def test_a_discarded_switch_is_not_kept_alive_by_its_optimizer():
    import gc
    import weakref

    optimizer = make()
    gone = weakref.ref(WeightDecaySwitch(optimizer, 4))
    gc.collect()
    assert gone() is None
    train_step(optimizer)
