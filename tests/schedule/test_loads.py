import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.schedule.toys import BASES, decays, make, paper_lr, rates, train_step, wanted_decays

TOTAL = 12
OPTIMIZERS = [RAdaBeliefW, torch.optim.AdamW]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(cls, steps):
    optimizer = make(cls)
    schedule = RobustSchedule(optimizer, TOTAL, warmup_steps=2)
    history = [train_step(optimizer, schedule) for _ in range(steps)]
    return optimizer, schedule, history


def parameters(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def copy_parameters(source, target):
    for theirs, ours in zip(source.param_groups, target.param_groups, strict=True):
        ours["params"][0].data.copy_(theirs["params"][0].data)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("saved_at", [0, 1, 5, 8, 9, 10, 12])
@pytest.mark.parametrize("loaded_at", [0, 5, 11])
@pytest.mark.parametrize("order", list(itertools.permutations(("optimizer", "schedule"))))
def test_after_any_load_in_either_order_rate_and_decay_are_what_the_step_says(cls, saved_at, loaded_at, order):
    source, saved, _ = run(cls, saved_at)
    whole, _, history = run(cls, TOTAL)
    optimizer, schedule, _ = run(cls, loaded_at)
    states = {"optimizer": (optimizer, source), "schedule": (schedule, saved)}
    copy_parameters(source, optimizer)
    for name in order:
        target, origin = states[name]
        target.load_state_dict(through_a_file(origin.state_dict()))
    assert schedule.last_epoch == schedule.weight_decay_switch.num_steps == saved_at
    assert decays(optimizer) == wanted_decays(saved_at, TOTAL)
    assert [train_step(optimizer, schedule) for _ in range(saved_at, TOTAL)] == history[saved_at:]
    for ours, theirs in zip(parameters(optimizer), parameters(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("saved_at", [2, 11])
@pytest.mark.parametrize("now", [2, 11])
def test_loading_the_optimizer_alone_leaves_rate_and_decay_at_the_schedules_step(saved_at, now):
    source, _, _ = run(torch.optim.AdamW, saved_at)
    optimizer, _schedule, _ = run(torch.optim.AdamW, now)
    before = decays(optimizer), rates(optimizer)
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert (decays(optimizer), rates(optimizer)) == before
    assert decays(optimizer) == wanted_decays(now, TOTAL)


def test_base_values_in_an_optimizers_file_do_not_replace_the_schedules():
    source = make(bases=[(0.9, 0.8)] * 3)
    RobustSchedule(source, TOTAL)
    optimizer, schedule, _ = run(torch.optim.AdamW, 2)
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert decays(optimizer) == wanted_decays(2, TOTAL)
    assert schedule.base_lrs == [lr for lr, _ in BASES]
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == wanted_decays(2, TOTAL)


@pytest.mark.parametrize("saved_at", [2, 11])
@pytest.mark.parametrize("first", ["optimizer", "switch"])
def test_the_switch_alone_keeps_its_word_after_a_load(saved_at, first):
    source = make()
    saved = WeightDecaySwitch(source, TOTAL)
    for _ in range(saved_at):
        train_step(source, saved)
    optimizer = make(bases=[(lr, 0.77) for lr, _ in BASES])
    switch = WeightDecaySwitch(optimizer, TOTAL)
    loads = [
        lambda: optimizer.load_state_dict(through_a_file(source.state_dict())),
        lambda: switch.load_state_dict(through_a_file(saved.state_dict())),
    ]
    for load in loads if first == "optimizer" else loads[::-1]:
        load()
    assert switch.is_off is (saved_at >= 9)
    for step in range(saved_at, TOTAL + 2):
        assert train_step(optimizer, switch)[0] == wanted_decays(step, TOTAL)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("saved_at", [0, 4, 10])
def test_a_load_through_torchs_distributed_checkpoint_api_leaves_both_right(cls, saved_at):
    def build():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
        groups = [
            {"params": [p], "lr": lr, "weight_decay": decay}
            for p, (lr, decay) in zip(model.parameters(), [*BASES, (0.2, 0.3)], strict=True)
        ]
        optimizer = cls(groups, lr=0.1)
        return model, optimizer, RobustSchedule(optimizer, TOTAL)

    bases = [*BASES, (0.2, 0.3)]
    model, optimizer, schedule = build()
    for _ in range(saved_at):
        train_step(optimizer, schedule)
    saved = copy.deepcopy((get_optimizer_state_dict(model, optimizer), schedule.state_dict()))
    # On an optimizer without state torch makes a dry step with lr = 0 (trap 12): no parameter may move.
    model2, optimizer2, schedule2 = build()
    model2.load_state_dict(model.state_dict())
    before = parameters(optimizer2)
    schedule2.load_state_dict(saved[1])
    set_optimizer_state_dict(model2, optimizer2, saved[0])
    assert all(map(torch.equal, parameters(optimizer2), before))
    assert decays(optimizer2) == wanted_decays(saved_at, TOTAL, bases=bases)
    assert rates(optimizer2) == pytest.approx([paper_lr(saved_at, TOTAL, lr) for lr, _ in bases])
    for _ in range(saved_at, TOTAL):
        assert train_step(optimizer, schedule) == train_step(optimizer2, schedule2)
    assert all(map(torch.equal, parameters(optimizer2), parameters(optimizer)))


def test_groups_overwritten_without_a_load_hook_are_mended_before_the_first_step():
    # What DeepSpeed's ZeRO-3 universal load does (trap 9), after it has loaded the scheduler.
    source, saved, history = run(torch.optim.AdamW, 10)
    optimizer, schedule, _ = run(torch.optim.AdamW, 0)
    optimizer.load_state_dict(source.state_dict())
    schedule.load_state_dict(saved.state_dict())
    _, _, history = run(torch.optim.AdamW, TOTAL)
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "weight_decay", "initial_weight_decay"):
            group[key] = 0.123
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append((decays(o), rates(o))))
    for _ in range(2):
        train_step(optimizer, schedule)
    assert used == history[10:]


def test_a_state_of_another_number_of_groups_is_an_error_that_names_both():
    _, saved, _ = run(torch.optim.AdamW, 3)
    fewer = make(bases=BASES[:2])
    schedule = RobustSchedule(fewer, TOTAL)
    with pytest.raises(ValueError, match=r"3 param groups.*has 2"):
        schedule.load_state_dict(saved.state_dict())
    switch = WeightDecaySwitch(fewer, TOTAL)
    with pytest.raises(ValueError, match=r"3 param groups.*has 2"):
        switch.load_state_dict(saved.weight_decay_switch.state_dict())


def test_a_state_of_something_else_is_an_error_and_changes_nothing():
    optimizer, schedule, _ = run(torch.optim.AdamW, 3)
    with pytest.raises(ValueError, match="not a state of a RobustSchedule"):
        schedule.load_state_dict({"last_epoch": 9})
    with pytest.raises(ValueError, match="not a state of a WeightDecaySwitch"):
        schedule.weight_decay_switch.load_state_dict({"step": 9})
    assert schedule.last_epoch == schedule.weight_decay_switch.num_steps == 3
    assert decays(optimizer) == wanted_decays(3, TOTAL)


@pytest.mark.filterwarnings("ignore:the checkpoint was written with")
def test_settings_are_not_restored_and_the_step_means_what_this_run_says():
    _, saved, _ = run(torch.optim.AdamW, 10)
    optimizer = make()
    schedule = RobustSchedule(optimizer, 2 * TOTAL)
    schedule.load_state_dict(saved.state_dict())
    assert decays(optimizer) == wanted_decays(10, 2 * TOTAL)
    assert rates(optimizer)[0] == pytest.approx(paper_lr(10, 2 * TOTAL, BASES[0][0]))


def test_other_settings_in_a_checkpoint_are_named_in_a_warning():
    _, saved, _ = run(torch.optim.AdamW, 10)
    with pytest.warns(UserWarning, match=r"written with total_steps=12, this run has total_steps=24"):
        RobustSchedule(make(), 2 * TOTAL).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("at", [3, 10])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(copies, at):
    optimizer, schedule, _ = run(RAdaBeliefW, at)
    _, _, history = run(RAdaBeliefW, TOTAL)
    optimizer2, schedule2 = copies((optimizer, schedule))
    assert [train_step(optimizer2, schedule2) for _ in range(at, TOTAL)] == history[at:]
    optimizer2.param_groups[0]["weight_decay"] = 0.5
    train_step(optimizer2)
    assert decays(optimizer2) == [0.0] * 3
    assert [train_step(optimizer, schedule) for _ in range(at, TOTAL)] == history[at:]


@pytest.mark.parametrize("saved_at", range(6))
def test_an_own_triggers_vote_under_way_survives_saving(saved_at):
    def build():
        optimizer = make()
        count = itertools.count(1)
        return optimizer, WeightDecaySwitch(optimizer, 99, should_switch=lambda: next(count) == 3), count

    optimizer, switch, _ = build()
    undisturbed = [train_step(optimizer, switch)[0] for _ in range(7)]
    optimizer, switch, count = build()
    used = [train_step(optimizer, switch)[0] for _ in range(saved_at)]
    state = through_a_file(switch.state_dict())
    optimizer, switch, count2 = build()
    for _ in range(next(count) - 1):
        next(count2)
    switch.load_state_dict(state)
    used += [train_step(optimizer, switch)[0] for _ in range(saved_at, 7)]
    assert used == undisturbed
    assert switch.switch_step == 4
