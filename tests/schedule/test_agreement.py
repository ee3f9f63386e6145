import functools
import json
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RankDisagreementError, RobustSchedule, WeightDecaySwitch
from robust_dist.schedule.comparison import Report, disagreement
from tests.ranks import TIMEOUT, run_ranks
from tests.schedule.toys import BASES, decays, make, train_step, wanted_decays
from tests.versions import TORCH_2_7

ON = [decay for _, decay in BASES]
OFF = [0.0] * len(BASES)
TOTAL = 12
ENGINES = ("DDP", *["FSDP2"] * TORCH_2_7)


def wait_for(key):
    dist.distributed_c10d._get_default_store().wait([key], timedelta(seconds=TIMEOUT / 2))


def say(key):
    dist.distributed_c10d._get_default_store().set(key, "1")


def wrapped(engine):
    """A model, and what counts the collectives that its gradients' group has run."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    if engine == "DDP":
        return DistributedDataParallel(model), dist.group.WORLD._get_sequence_number_for_group
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = {id(group): group for group in (dist.group.WORLD, mesh.get_group())}.values()
    return fully_shard(model, mesh=mesh), lambda: sum(g._get_sequence_number_for_group() for g in groups)


class Course:
    """A run whose gradients are averaged at each step; `skips` tells the steps after which the schedule is not called.

    `seconds`, `done` and `collectives` are of the steps, `error` is what ended them.
    """

    def __init__(self, engine, total=TOTAL):
        self.model, self.count = wrapped(engine)
        self.optimizer = RAdaBeliefW(self.model.parameters(), lr=0.1)
        self.schedule = RobustSchedule(self.optimizer, total)
        self.done, self.collectives, self.error = 0, 0, None

    def go(self, steps, skips=()):
        began = time.perf_counter()
        try:
            for step in range(steps):
                self.model(torch.ones(2, 4)).sum().backward()
                before = self.count()
                self.optimizer.step()
                if step not in skips:
                    self.schedule.step()
                self.collectives += self.count() - before
                self.optimizer.zero_grad()
                self.done += 1
        except RankDisagreementError as error:
            self.error = str(error)
        self.seconds = time.perf_counter() - began
        return self


def a_rank_misses_a_step(engine, step):
    last = dist.get_world_size() - 1
    off = Course(engine).go(TOTAL, [step] if dist.get_rank() == last else [])
    assert off.error is not None, f"{engine}: nobody noticed"
    assert f"rank {last}: " in off.error
    assert "step: rank" in off.error
    assert off.seconds < TIMEOUT / 4
    assert off.done < TOTAL
    return off.done, off.error, off.collectives


def nobody_is_off(engine):
    well = Course(engine).go(3 * TOTAL)
    assert well.error is None
    assert well.count() > 0
    return well.collectives


def uneven_batches(with_join):
    """Two epochs in which rank r has 6 - r batches; without Join each rank trains a model of its own."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    model = DistributedDataParallel(model) if with_join else model
    optimizer = RAdaBeliefW(model.parameters(), lr=0.1, weight_decay=0.1)
    schedule = RobustSchedule(optimizer, 8)
    used = []
    for _ in range(2):
        with Join([model], enable=True) if with_join else torch.enable_grad():
            for _ in range(6 - dist.get_rank()):
                model(torch.ones(2, 4)).sum().backward()
                used.append(optimizer.param_groups[0]["weight_decay"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert used == [0.1] * 6 + [0.0] * (len(used) - 6)


def keeping_step(build, steps=8, meet=dist.barrier):
    """The message that this rank gets and the steps made before; the ranks meet between two steps."""
    optimizer, schedule, *more = build(dist.get_rank())
    done = 0
    try:
        for step in range(steps):
            meet()
            optimizer.step()
            for event in more:
                schedule = event(step, schedule) or schedule
            schedule.step()
            done += 1
    except RankDisagreementError as error:
        return str(error), done
    return None, done


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


def _on_rank_1(event, at=3):
    """A run in which rank 1 alone does something to its schedule after some steps."""

    def build(rank):
        optimizer, schedule = _both(WeightDecaySwitch, make(), 40)
        return optimizer, schedule, lambda step, schedule: event(schedule) if (rank, step) == (1, at) else None

    return build


def _loaded_again(schedule):
    schedule.load_state_dict(schedule.state_dict())


def _loaded_from_elsewhere(schedule):
    schedule.load_state_dict({**schedule.state_dict(), "step": 1})


DISAGREEMENTS = {
    "total": lambda r: _both(RobustSchedule, make(), 10 + r),
    "off_at": lambda r: _both(WeightDecaySwitch, make(), 10, off_at=0.5 + 0.25 * r),
    "decay": lambda r: _both(WeightDecaySwitch, make(bases=[(0.1, 0.02 + r)]), 10),
    "groups": lambda r: _both(WeightDecaySwitch, make(bases=BASES[: 3 - r]), 10),
    "step": _resumed,
    "late group": _with_late_group,
    "trigger": lambda r: _both(WeightDecaySwitch, make(), 10, should_switch=(lambda: False) if r else None),
    "reduce": lambda r: _both(
        WeightDecaySwitch, make(), 10, should_switch=lambda: False, reduce=("any", "all", "majority")[r]
    ),
    "made again": _on_rank_1(lambda schedule: WeightDecaySwitch(schedule.optimizer, 40)),
    "loaded": _on_rank_1(_loaded_from_elsewhere),
}


def check_a_dry_step_and_a_load_of_the_same_step_may_be_made_alone():
    def build(rank):
        optimizer, switch, event = _on_rank_1(_loaded_again)(rank)
        rates = [group["lr"] for group in optimizer.param_groups]
        if rank == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        return optimizer, switch, event

    assert keeping_step(build, 40) == (None, 40)


def check_an_error_is_not_the_end():
    optimizer, schedule = DISAGREEMENTS["off_at"](0)
    state = {**schedule.state_dict(), "step": dist.get_rank()}
    schedule.load_state_dict(state)
    message, _ = keeping_step(lambda _: (optimizer, schedule))
    assert "step: rank 0" in message
    schedule.load_state_dict({**state, "step": 4})
    assert keeping_step(lambda _: (optimizer, schedule)) == (None, 8)


def check_nobody_waits_for_a_rank_that_is_late():
    """Rank 1 makes no step before rank 0 has made all of its own."""
    optimizer = make()
    schedule = RobustSchedule(optimizer, 40)
    votes = make()
    switch = WeightDecaySwitch(votes, 40, should_switch=lambda: False)
    if dist.get_rank() == 1:
        wait_for("rank 0 has stepped")
    for _ in range(45):
        train_step(optimizer, schedule)
        train_step(votes, switch)
    if dist.get_rank() == 0:
        say("rank 0 has stepped")
    dist.barrier()


def own_trigger(reduce, first_wish):
    """Decays used and the step decided, where rank r wishes the switch from its call `first_wish[r]` on."""
    optimizer = make()
    calls = iter(range(1, 100))
    wanted = first_wish[dist.get_rank()]
    switch = WeightDecaySwitch(optimizer, 99, should_switch=lambda: next(calls) >= wanted, reduce=reduce)
    used, count, made = [], dist.group.WORLD._get_sequence_number_for_group, 0
    for _ in range(10):
        dist.barrier()
        before = count()
        used.append(train_step(optimizer, switch)[0])
        made += count() - before
    assert made == 0
    return used, switch.switch_step


def own_trigger_apart(reduce, steps_ahead):
    """Ranks that do not keep step, rank r being about r * `steps_ahead` calls ahead as rank 0 wishes the switch."""
    optimizer, rank = make(), dist.get_rank()
    wishes = []
    switch = WeightDecaySwitch(optimizer, 10**6, should_switch=lambda: bool(wishes), reduce=reduce)
    for _ in range(1 + rank * steps_ahead):
        train_step(optimizer, switch)
    dist.barrier()
    wishes.append(rank == 0 or reduce != "any")
    used, end = [], time.monotonic() + TIMEOUT / 4
    while not switch.is_off and time.monotonic() < end:
        used.append(train_step(optimizer, switch)[0])
        time.sleep(0.002 * rank)
    assert all(one == ON for one in used)
    return switch.switch_step, switch.num_steps


def own_trigger_resumed(saved_at, saver):
    """A run saved after `saved_at` steps, on `saver`'s rank alone where it is given, against the undisturbed."""

    def build(asked):
        optimizer = make()
        calls = iter(range(asked + 1, 100))
        first = (5, 3)[dist.get_rank()]
        return optimizer, WeightDecaySwitch(optimizer, 99, should_switch=lambda: next(calls) >= first)

    def go(optimizer, switch, steps):
        used = []
        for _ in range(steps):
            used += train_step(optimizer, switch)[:1]
            dist.barrier()
        return used

    undisturbed = go(*build(0), 8)
    assert undisturbed == [ON] * 4 + [OFF] * 4
    optimizer, switch = build(0)
    used = go(optimizer, switch, saved_at)
    box = [switch.state_dict() if saver in (None, dist.get_rank()) else None]
    if saver is not None:
        dist.broadcast_object_list(box, src=saver)
    # Into the same run, too, whose decisions of before the load are then none.
    for used_by, taker in (build(saved_at), (optimizer, switch)):
        calls = iter(range(saved_at + 1, 100))
        first = (5, 3)[dist.get_rank()]
        taker.should_switch = lambda calls=calls, first=first: next(calls) >= first
        taker.load_state_dict(box[0])
        rest = go(used_by, taker, 8 - saved_at)
        assert used + rest == undisturbed, (used + rest, taker.switch_step)


def check_a_state_saved_before_the_others_have_voted_has_their_decision():
    rank = dist.get_rank()
    for call in (1, 2):
        optimizer, calls = make(), iter(range(1, 100))
        switch = WeightDecaySwitch(optimizer, 99, should_switch=lambda c=calls, n=call: next(c) == n and rank == 1)
        for _ in range(call - 1):
            train_step(optimizer, switch)
        dist.barrier()
        time.sleep(0.2 * rank)
        train_step(optimizer, switch)
        assert switch.state_dict()["switch_step"] == call + 1


def the_host_of_the_store_ends_first():
    """Rank 0 returns, and its process ends; rank 1 goes on to the end of its run."""
    optimizer = make()
    schedule = RobustSchedule(optimizer, 40)
    votes = make()
    switch = WeightDecaySwitch(votes, 40, should_switch=lambda: True, reduce="all")
    train_step(optimizer, schedule)
    dist.barrier()
    if dist.get_rank() == 0:
        return None
    end = time.monotonic() + TIMEOUT / 4
    store = dist.distributed_c10d._get_default_store()
    while time.monotonic() < end:
        try:
            store.check(["key"])
        except RuntimeError:
            break
        time.sleep(0.05)
    used = [train_step(optimizer, schedule)[0] for _ in range(1, 40)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            train_step(votes, switch)
    return used, [str(one.message) for one in caught]


def two_ranks():
    check_a_dry_step_and_a_load_of_the_same_step_may_be_made_alone()
    check_an_error_is_not_the_end()
    check_nobody_waits_for_a_rank_that_is_late()
    for saved_at in range(7):
        for saver in (None, 1):
            own_trigger_resumed(saved_at, saver)
    check_a_state_saved_before_the_others_have_voted_has_their_decision()
    uneven_batches(with_join=True)
    uneven_batches(with_join=False)
    dist.barrier()
    found = {
        "disagreements": {name: keeping_step(build, 12) for name, build in DISAGREEMENTS.items()},
        "off": {(engine, step): a_rank_misses_a_step(engine, step) for engine in ENGINES for step in (1, 3, 8)},
        "well": [nobody_is_off(engine) for engine in ENGINES],
        "any": own_trigger("any", [6, 3]),
        "all": own_trigger("all", [6, 3]),
        "never": own_trigger("all", [60, 3]),
        "apart": [own_trigger_apart("any", 40), own_trigger_apart("all", 3)],
    }
    return found | {"host ended": the_host_of_the_store_ends_first()}


@pytest.fixture(scope="module")
def two():
    return run_ranks(two_ranks, 2)


@pytest.fixture(scope="module")
def four():
    return run_ranks(four_ranks, 4)


def test_uneven_batches_late_ranks_and_steps_that_a_rank_makes_alone_to_save_are_no_disagreement(two, four):
    assert (len(two), len(four)) == (2, 4), "the checks are made on the ranks"


@pytest.mark.parametrize(
    ("name", "values", "updates"),
    [
        ("total", ["at the start", "total_steps: rank 0: 10; rank 1: 11"], 2),
        ("off_at", ["at the start", "off_at: rank 0: 0.5; rank 1: 0.75"], 2),
        ("decay", ["base_weight_decay: rank 0: [0.02]; rank 1: [1.02]"], 2),
        ("groups", ["num_groups: rank 0: 3; rank 1: 2", "rank 1: [0.02, 0.0]"], 2),
        ("step", ["step: rank 0: 0; rank 1: 3"], 2),
        ("late group", ["num_groups: rank 0: 3; rank 1: 4"], 3),
        ("trigger", ["trigger: rank 0: at a step; rank 1: any rank's"], 2),
        ("reduce", ["trigger: rank 0: any rank's; rank 1: all ranks'"], 2),
        ("made again", ["during the run", "step: rank 0: 7; rank 1: 4"], 10),
        ("loaded", ["during the run", "step: rank 0: 7; rank 1: 5"], 10),
    ],
)
def test_ranks_that_differ_get_one_error_with_every_ranks_values_a_few_steps_later(two, name, values, updates):
    results = [result["disagreements"][name] for result in two]
    assert results[0] == results[1]
    message, done = results[0]
    assert all(value in message for value in values), message
    assert done <= updates


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_rank_that_misses_a_step_is_named_on_every_rank_without_a_collective(two, four, engine, step):
    for launch in (two, four):
        results = [result["off"][engine, step] for result in launch]
        assert results == [results[0]] * len(launch)
        assert results[0][2] == 0


def test_a_run_makes_no_collective_of_its_own(two, four):
    assert [result["well"] for launch in (two, four) for result in launch] == [[0] * len(ENGINES)] * 6


def test_a_run_goes_on_after_the_rank_that_hosted_the_store_has_ended(two):
    assert two[0]["host ended"] is None
    used, caught = two[1]["host ended"]
    assert used == [wanted_decays(step, 40) for step in range(1, 40)]
    assert len(caught) == 1
    assert "should_switch" in caught[0]


def test_any_ranks_wish_switches_all_ranks_one_step_later(two):
    # Rank 1 wishes it at its third call, after optimizer step 2.
    assert [result["any"] for result in two] == [([ON] * 4 + [OFF] * 6, 4)] * 2


def test_all_ranks_wish_switches_one_step_after_the_last(two):
    assert [result["all"] for result in two] == [([ON] * 7 + [OFF] * 3, 7)] * 2
    assert [result["never"][1] for result in two] == [None, None]


def test_ranks_that_do_not_keep_step_switch_after_the_foremost_at_one_step(two, four):
    for launch in (two, four):
        for results in zip(*[result["apart"] for result in launch], strict=True):
            (at,) = {switch_step for switch_step, _ in results}
            assert at is not None
            assert [steps for _, steps in results] == [at] * len(launch), "no rank was past it"


def a_discriminator_on_some_ranks():
    """Rank 0 trains a discriminator beside the generator of all, and another total of steps is meant."""
    rank = dist.get_rank()
    other = None
    if rank == 0:
        other = RAdaBeliefW(torch.nn.Linear(4, 1).parameters(), lr=0.1)
        alone = RobustSchedule(other, 5)
    course = Course("DDP", 32)
    for _ in range(20):
        course.go(1)
        if other is not None:
            train_step(other, alone)
    assert course.error is None
    # The generator's ranks still see each other.
    course.go(8, [0] if rank == 2 else [])
    assert "rank 2" in course.error


def a_model_of_its_own_on_each_rank():
    rank = dist.get_rank()
    optimizer = RAdaBeliefW(torch.nn.Linear(4, 3 + rank).parameters(), lr=0.1)
    assert keeping_step(lambda _: _both(RobustSchedule, optimizer, 8 + rank), 12) == (None, 12)


def a_rank_that_trained_alone_before():
    """Rank 0 tries the same model by itself, with another schedule, and then joins the others."""
    if dist.get_rank() == 0:
        first = make(torch.optim.SGD)
        schedule = RobustSchedule(first, 17)
        for _ in range(8):
            train_step(first, schedule)
    dist.barrier()
    assert keeping_step(lambda _: _both(RobustSchedule, make(torch.optim.SGD), 30), 30) == (None, 30)


def a_group_of_two(pair):
    optimizer, rank = make(), dist.get_rank()
    # Ranks 0 and 3 have another total, but are not asked.
    schedule = RobustSchedule(optimizer, 8 + (rank in (0, 3)), process_group=pair)
    dist.barrier()
    used = [train_step(optimizer, schedule)[0] for _ in range(8)]
    assert used == [wanted_decays(step, 8 + (rank in (0, 3))) for step in range(8)]
    meet = functools.partial(dist.barrier, pair) if rank in (1, 2) else lambda: None
    return keeping_step(lambda _: _both(WeightDecaySwitch, make(), 8 + rank, process_group=pair), 30, meet)[0]


def four_ranks():
    rank = dist.get_rank()
    uneven_batches(with_join=True)
    dist.barrier()
    a_discriminator_on_some_ranks()
    a_model_of_its_own_on_each_rank()
    a_rank_that_trained_alone_before()
    return {
        "off": {(engine, step): a_rank_misses_a_step(engine, step) for engine in ENGINES for step in (1, 3, 8)},
        "well": [nobody_is_off(engine) for engine in ENGINES],
        "majority": own_trigger("majority", [9, 3, 5, 5]),
        "apart": [own_trigger_apart("any", 10), own_trigger_apart("majority", 3)],
        "pair": a_group_of_two(dist.new_group([1, 2])),
        "rank": rank,
    }


def test_a_majority_of_four_ranks_is_three(four):
    assert [result["majority"][1] for result in four] == [6] * 4


def test_a_process_group_of_two_of_four_ranks_compares_these_alone(four):
    for result in four:
        # Ranks are named as the whole job numbers them.
        assert ("rank 1: 9; rank 2: 10" in (result["pair"] or "")) is (result["rank"] in (1, 2))


@pytest.mark.parametrize("num_groups", [0, 1, 26, 27, 300])
def test_a_report_shows_its_values_and_changes_with_any_decay(num_groups):
    decays = tuple(0.1 * i for i in range(num_groups))
    report = Report(10**12, 0.1, 7, "any rank's", False, decays)
    told = json.loads(report.encode())
    assert (told["total_steps"], told["off_at"], told["step"]) == ("1000000000000", "0.1", "7")
    assert told["base_weight_decay"].startswith(str(list(decays[:26])))
    changed = Report(10**12, 0.1, 7, "any rank's", False, (*decays[:-1], 9.0))
    assert report.encode() != changed.encode()
    assert "rank 0: " in str(disagreement({0: report.encode(), 1: changed.encode()}, "at the start"))


def test_without_a_process_group_nothing_is_asked():
    assert not dist.is_initialized()
    optimizer = make()
    switch = WeightDecaySwitch(optimizer, 2)
    train_step(optimizer, switch)
    assert decays(optimizer) == ON
