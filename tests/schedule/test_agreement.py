import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from robust_dist.schedule import RankDisagreementError, RobustSchedule, WeightDecaySwitch
from robust_dist.schedule.agreement import Report, _decode, _ranks
from tests.ranks import TIMEOUT, run_ranks
from tests.schedule.toys import BASES, decays, make, train_step, wanted_decays

ON = [decay for _, decay in BASES]
OFF = [0.0] * len(BASES)


def collectives():
    """How many collectives the default group has run, as its backend counts them."""
    return dist.group.WORLD._get_sequence_number_for_group()


def run_counted(schedule, optimizer, steps):
    """(step, collectives) for every step that made any, in the optimizer's step or in the schedule's."""
    seen = []
    for step in range(steps):
        before = collectives()
        optimizer.step()
        in_optimizer = collectives()
        schedule.step()
        if collectives() != before:
            seen.append((step, in_optimizer - before, collectives() - in_optimizer))
    return seen


def check_two_collectives_a_run():
    for made in (WeightDecaySwitch, RobustSchedule):
        optimizer = make()
        before = collectives()
        schedule = made(optimizer, 40)
        assert collectives() == before, "making one must not need the other ranks"
        # Before the first update, and after the 30th: the first step without decay is 30.
        assert run_counted(schedule, optimizer, 35) == [(0, 1, 0), (29, 0, 1)]
        state = schedule.state_dict()
        resumed = made(make(), 40)
        resumed.load_state_dict(state)
        assert run_counted(resumed, resumed.optimizer, 3) == [(0, 1, 0)], "past the switch only the new run's start"
        schedule.load_state_dict(state)
        assert run_counted(schedule, optimizer, 3) == [(0, 1, 0)], "a load begins a new run"


def check_a_dry_step_asks_nobody():
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 4)
    rates = [group["lr"] for group in optimizer.param_groups]
    if dist.get_rank() == 0:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    assert run_counted(switch, optimizer, 4) == [(0, 1, 0), (2, 0, 1)]


def disagreement(build, steps=6):
    """The message that this rank gets, the seconds it took, and the updates made before."""
    optimizer, schedule = build(dist.get_rank())
    dist.barrier()
    began, done = time.perf_counter(), 0
    try:
        for _ in range(steps):
            optimizer.step()
            done += 1
            schedule.step()
    except RankDisagreementError as error:
        return str(error), time.perf_counter() - began, done
    raise AssertionError("no disagreement was found")


def _with_late_group(rank):
    optimizer = make()
    schedule = WeightDecaySwitch(optimizer, 4)
    if rank == 1:
        optimizer.register_step_post_hook(
            lambda o, *_: (
                len(o.param_groups) == 3 and o.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            )
        )
    return optimizer, schedule


def _resumed(rank):
    optimizer = make()
    schedule = RobustSchedule(optimizer, 8)
    if rank == 1:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 3} | {"weight_decay_switch": _switch_at(3)})
    return optimizer, schedule


def _switch_at(step):
    state = WeightDecaySwitch(make(), 8).state_dict()
    return {**state, "step": step}


def _both(made, optimizer, *args, **kwargs):
    return optimizer, made(optimizer, *args, **kwargs)


def _groups(rank):
    return BASES[: 3 - rank]


DISAGREEMENTS = {
    "total": lambda r: _both(RobustSchedule, make(), 10 + r),
    "off_at": lambda r: _both(WeightDecaySwitch, make(), 10, off_at=0.5 + 0.25 * r),
    "decay": lambda r: _both(WeightDecaySwitch, make(bases=[(0.1, 0.02 + r)]), 10),
    "groups": lambda r: _both(WeightDecaySwitch, make(bases=_groups(r)), 10),
    "step": _resumed,
    "late group": _with_late_group,
    "trigger": lambda r: _both(WeightDecaySwitch, make(), 10, should_switch=(lambda: False) if r else None),
    "reduce": lambda r: _both(
        WeightDecaySwitch, make(), 10, should_switch=lambda: False, reduce=("any", "all", "majority")[r]
    ),
}


def own_trigger(reduce, first_wish):
    """Decays used and collectives made by step, where rank r wishes the switch from its call `first_wish[r]` on."""
    optimizer = make()
    calls = iter(range(1, 100))
    switch = WeightDecaySwitch(
        optimizer, 99, should_switch=lambda: next(calls) >= first_wish[dist.get_rank()], reduce=reduce
    )
    used, counts = [], []
    for _ in range(10):
        before = collectives()
        used.append(train_step(optimizer, switch)[0])
        counts.append(collectives() - before)
    return used, counts, switch.switch_step


def own_trigger_waits_for_nobody():
    """Rank 1 makes no step until rank 0 has made the same one: a step that waited for it would never end."""
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 99, should_switch=lambda: False)
    train_step(optimizer, switch)
    train_step(optimizer, switch)
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["rank 0 has stepped"], timedelta(seconds=TIMEOUT / 2))
    switch.step()
    if dist.get_rank() == 0:
        store.set("rank 0 has stepped", "")
    dist.barrier()


def own_trigger_resumed(saved_at, saver):
    """A run saved after `saved_at` steps, on `saver`'s rank alone where it is given, against the undisturbed."""

    def build(asked):
        optimizer = make()
        calls = iter(range(asked + 1, 100))
        first = (5, 3)[dist.get_rank()]
        return optimizer, WeightDecaySwitch(optimizer, 99, should_switch=lambda: next(calls) >= first)

    optimizer, switch = build(0)
    undisturbed = [train_step(optimizer, switch)[0] for _ in range(8)]
    optimizer, switch = build(0)
    used = [train_step(optimizer, switch)[0] for _ in range(saved_at)]
    box = [switch.state_dict() if saver in (None, dist.get_rank()) else None]
    if saver is not None:
        dist.broadcast_object_list(box, src=saver)
    optimizer, switch = build(saved_at)
    switch.load_state_dict(box[0])
    used += [train_step(optimizer, switch)[0] for _ in range(saved_at, 8)]
    assert used == undisturbed


def two_ranks():
    check_two_collectives_a_run()
    check_a_dry_step_asks_nobody()
    for saved_at in range(7):
        for saver in (None, 1):
            own_trigger_resumed(saved_at, saver)
    own_trigger_waits_for_nobody()
    return {
        "disagreements": {name: disagreement(build) for name, build in DISAGREEMENTS.items()},
        "any": own_trigger("any", [6, 3]),
        "all": own_trigger("all", [6, 3]),
        "never": own_trigger("all", [60, 3]),
    }


@pytest.fixture(scope="module")
def two():
    return run_ranks(two_ranks, 2)


def test_a_run_makes_two_collectives_a_vote_survives_saving_and_no_step_waits_for_another_ranks_vote(two):
    assert len(two) == 2, "the checks are made on the ranks"


@pytest.mark.parametrize(
    ("name", "values", "updates"),
    [
        ("total", ["at the start", "total_steps: rank 0: 10; rank 1: 11"], 0),
        ("off_at", ["at the start", "off_at: rank 0: 0.5; rank 1: 0.75"], 0),
        ("decay", ["base_weight_decay: rank 0: [0.02]; rank 1: [1.02]"], 0),
        ("groups", ["num_groups: rank 0: 3; rank 1: 2", "rank 1: [0.02, 0.0]"], 0),
        ("step", ["step: rank 0: 0; rank 1: 3"], 0),
        ("late group", ["num_groups: rank 0: 3; rank 1: 4"], 1),
        ("trigger", ["trigger: rank 0: at a step; rank 1: any rank's"], 0),
        ("reduce", ["trigger: rank 0: any rank's; rank 1: all ranks'"], 0),
    ],
)
def test_ranks_that_differ_get_an_error_with_every_ranks_values_before_the_first_update(two, name, values, updates):
    results = [result["disagreements"][name] for result in two]
    assert results[0][0] == results[1][0]
    for message, seconds, done in results:
        assert all(value in message for value in values), message
        assert seconds < TIMEOUT / 2
        assert done <= updates + (updates > 0) * 2


def test_any_ranks_wish_switches_all_ranks_one_step_later(two):
    # Rank 1 wishes it at its third call, after optimizer step 2.
    for used, counts, switch_step in [result["any"] for result in two]:
        assert switch_step == 4
        assert used == [ON] * 4 + [OFF] * 6
        assert counts == [2, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_all_ranks_wish_switches_one_step_after_the_last(two):
    for used, counts, switch_step in [result["all"] for result in two]:
        assert switch_step == 7
        assert used == [ON] * 7 + [OFF] * 3
        assert counts == [2, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert [result["never"][2] for result in two] == [None, None]


def three_ranks():
    majority = own_trigger("majority", [9, 3, 5])
    pair = dist.new_group([1, 2])
    optimizer = make()
    # Rank 0 has another total, but is not asked.
    schedule = RobustSchedule(optimizer, 8 + (dist.get_rank() == 0), process_group=pair)
    dist.barrier()
    used = [train_step(optimizer, schedule)[0] for _ in range(8)]
    switch = WeightDecaySwitch(make(), 8 + dist.get_rank(), process_group=pair)
    try:
        switch.step()
        message = ""
    except RankDisagreementError as error:
        message = str(error)
    return majority, used, message


def test_three_ranks_majority_and_a_process_group_of_two():
    results = run_ranks(three_ranks, 3)
    for rank, (majority, used, message) in enumerate(results):
        assert majority[2] == 6
        assert used == [wanted_decays(step, 8 + (rank == 0)) for step in range(8)]
        # Ranks are named as the whole job numbers them.
        assert ("rank 1: 9; rank 2: 10" in message) is (rank > 0)


@pytest.mark.parametrize("num_groups", [0, 1, 26, 27, 300])
def test_a_report_says_the_same_after_its_way_through_a_tensor(num_groups):
    decays = tuple(0.1 * i for i in range(num_groups))
    report = Report(10**12, 0.1, 7, "any rank's", num_groups, decays)
    told = _decode(report.encode().tolist())
    assert (told["total_steps"], told["off_at"], told["step"]) == ("1000000000000", "0.1", "7")
    assert told["base_weight_decay"].startswith(str(list(decays[:26])))
    changed = Report(10**12, 0.1, 7, "any rank's", num_groups, (*decays[:-1], 9.0))
    assert (report == changed) or not torch.equal(report.encode(), changed.encode())


def test_many_ranks_are_named_in_runs():
    assert _ranks([3]) == "rank 3"
    assert _ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_without_a_process_group_nothing_is_asked():
    assert not dist.is_initialized()
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 2)
    train_step(optimizer, switch)
    assert decays(optimizer) == ON
