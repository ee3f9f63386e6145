"""In any place among torch's schedulers RobustSchedule gives what CosineAnnealingLR gives there."""

import copy
import itertools

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

from robust_dist.engines import fsdp
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule
from tests.schedule.toys import decays, make, rates

TOTAL = 12
LR, DECAY = 0.1, 0.02


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, TOTAL)


def robust(optimizer):
    return RobustSchedule(optimizer, TOTAL)


class Drive:
    """One optimizer, the schedulers of one place, and who is stepped when.

    A place is a function of the optimizer and the one to be placed; it gives the schedulers by name, in the order in
    which they are made, and a function of the step that calls them.
    """

    def __init__(self, place, placed, tensors=False):
        self.optimizer = make(torch.optim.AdamW if tensors else RAdaBeliefW, [(LR, DECAY)], tensors)
        self.schedulers, self.tick = place(self.optimizer, placed)
        self.done = 0

    def run(self, until):
        """The rate and the decay of each step."""
        used = []
        while self.done < until:
            self.optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            before = rates(self.optimizer)[0]
            self.optimizer.step()
            assert rates(self.optimizer)[0] == before, "a step must not set the rate"
            used.append((before, decays(self.optimizer)[0]))
            self.tick(self.done)
            self.done += 1
        return used

    def save(self):
        states = {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}
        return copy.deepcopy({"optimizer": self.optimizer.state_dict(), **states})

    def load(self, state, done, order):
        for name in order:
            (self.optimizer if name == "optimizer" else self.schedulers[name]).load_state_dict(state[name])
        self.done = done


def one(scheduler):
    return {"it": scheduler}, lambda step: scheduler.step()


def handed_over(first, second, at):
    """The first is stepped for `at` steps, then the second in its place."""
    return {"first": first, "second": second}, lambda step: (first if step < at else second).step()


def beside_a_plateau(scheduler, plateau):
    def tick(step):
        scheduler.step()
        plateau.step(1.0)

    return {"it": scheduler, "plateau": plateau}, tick


PLACES = {
    "alone": lambda o, it: one(it(o)),
    "second in SequentialLR": lambda o, it: one(SequentialLR(o, [LinearLR(o, 0.1, 1.0, 4), it(o)], [4])),
    "first in SequentialLR": lambda o, it: one(SequentialLR(o, [it(o), ExponentialLR(o, 0.9)], [6])),
    "first in SequentialLR, before its own rate again": lambda o, it: one(
        SequentialLR(o, [it(o), ConstantLR(o, 1.0)], [6])
    ),
    "between others in SequentialLR": lambda o, it: one(
        SequentialLR(o, [ConstantLR(o, 0.5), it(o), ExponentialLR(o, 0.9)], [3, 8])
    ),
    "last in ChainedScheduler": lambda o, it: one(ChainedScheduler([LinearLR(o, 0.1, 1.0, 5), it(o)])),
    "first in ChainedScheduler": lambda o, it: one(ChainedScheduler([it(o), ConstantLR(o, 0.5, 5)])),
    "before SWALR": lambda o, it: handed_over(it(o), SWALR(o, 0.03, 3), 5),
    "before SWALR at once": lambda o, it: handed_over(it(o), SWALR(o, 0.03, 0), 5),
    "before ConstantLR": lambda o, it: handed_over(it(o), ConstantLR(o, 1.0), 5),
    "beside ReduceLROnPlateau": lambda o, it: beside_a_plateau(it(o), ReduceLROnPlateau(o, factor=0.5, patience=2)),
}


def switched_off(place, step):
    """Whether the schedule's own count of steps is at three quarters; it counts while it is its turn."""
    begins, ends = {
        "second in SequentialLR": (4, 99),
        "first in SequentialLR": (0, 5),
        "first in SequentialLR, before its own rate again": (0, 5),
        "between others in SequentialLR": (3, 7),
        "before SWALR": (0, 5),
        "before SWALR at once": (0, 5),
        "before ConstantLR": (0, 5),
    }.get(place, (0, 99))
    return min(step, ends) - begins >= 0.75 * TOTAL


@pytest.fixture(scope="module")
def uninterrupted():
    """CosineAnnealingLR's rates by place, through its 11 steps."""
    return {name: [rate for rate, _ in Drive(place, cosine).run(11)] for name, place in PLACES.items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*epoch parameter.*")


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_the_rates_are_those_of_cosine_annealing_in_the_same_place(place, tensors, uninterrupted):
    used = Drive(PLACES[place], robust, tensors).run(11)
    assert [rate for rate, _ in used] == pytest.approx(uninterrupted[place], rel=1e-5 if tensors else 1e-12)
    assert [decay for _, decay in used] == pytest.approx(
        [0.0 if switched_off(place, step) else DECAY for step in range(11)]
    )


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_has_the_rates_and_decays_of_the_whole_one_whatever_is_loaded_first(place, tensors):
    whole = Drive(PLACES[place], robust, tensors)
    used, states = [], []
    for step in range(11):
        states.append(whole.save())
        used += whole.run(step + 1)
    # Into a run that has just begun, and into one that is further on or less far.
    for at, loaded_at in ((0, 0), (2, 0), (4, 0), (5, 0), (9, 0), (2, 7), (9, 2)):
        for order in itertools.permutations(["optimizer", *whole.schedulers]):
            resumed = Drive(PLACES[place], robust, tensors)
            resumed.run(loaded_at)
            resumed.load(copy.deepcopy(states[at]), at, order)
            assert resumed.run(11) == used[at:], (at, loaded_at, order)


@pytest.mark.parametrize("placed", [cosine, robust])
@pytest.mark.parametrize("order", [("optimizer", "it"), ("it", "optimizer")])
def test_a_rate_set_by_hand_after_a_load_is_used_and_goes_down_from_there(placed, order):
    source = Drive(PLACES["alone"], placed)
    source.run(3)
    drive = Drive(PLACES["alone"], placed)
    drive.load(source.save(), 3, order)
    drive.optimizer.param_groups[0]["lr"] = 0.5
    used = [rate for rate, _ in drive.run(11)]
    factors = [1 + torch.tensor(step * torch.pi / TOTAL, dtype=torch.float64).cos().item() for step in range(3, 11)]
    assert used == pytest.approx([0.5 * factor / factors[0] for factor in factors])


def test_a_rate_set_by_hand_survives_saving():
    drive = Drive(PLACES["alone"], robust)
    drive.run(3)
    drive.optimizer.param_groups[0]["lr"] = 0.5
    state = drive.save()
    rest = drive.run(8)
    assert rest[0][0] == 0.5
    for order in (("optimizer", "it"), ("it", "optimizer")):
        resumed = Drive(PLACES["alone"], robust)
        resumed.load(state, 3, order)
        assert resumed.run(8) == rest


def test_a_group_that_is_added_while_the_schedule_waits_is_on_its_curve_from_its_turn_on():
    drive = Drive(PLACES["second in SequentialLR"], robust)
    drive.run(2)
    drive.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0, "weight_decay": 0.5})
    drive.run(4)
    assert rates(drive.optimizer) == [LR, 4.0]
    drive.run(7)
    assert rates(drive.optimizer)[1] == pytest.approx(4.0 * rates(drive.optimizer)[0] / LR)
    assert decays(drive.optimizer) == [DECAY, 0.5]


def test_a_schedule_made_anew_begins_at_the_base_rate_and_not_where_the_old_one_ended():
    drive = Drive(PLACES["alone"], robust)
    drive.run(TOTAL)
    assert rates(drive.optimizer)[0] == pytest.approx(0.0, abs=1e-12)
    drive.schedulers.clear()
    RobustSchedule(drive.optimizer, TOTAL)
    assert (rates(drive.optimizer), decays(drive.optimizer)) == ([LR], [DECAY])


def test_a_schedule_on_a_loaded_optimizer_begins_at_its_base_rate_and_can_still_give_way_to_what_was_loaded():
    source = Drive(PLACES["before SWALR"], robust)
    source.run(8)
    swa_rate, state = rates(source.optimizer), source.save()
    optimizer = make(RAdaBeliefW, [(LR, DECAY)])
    optimizer.load_state_dict(state["optimizer"])
    schedule = RobustSchedule(optimizer, TOTAL)
    assert rates(optimizer) == [LR]
    schedule.load_state_dict(state["first"])
    assert rates(optimizer) == swa_rate


def test_a_state_of_an_older_version_puts_the_rates_on_the_curve():
    source = Drive(PLACES["alone"], robust)
    source.run(5)
    state = source.save()["it"]
    del state["on_curve"]
    drive = Drive(PLACES["alone"], robust)
    drive.load({"it": state}, 5, ["it"])
    assert rates(drive.optimizer) == rates(source.optimizer)


class AsWrittenBefore:
    """What 0.4.4 saved of a schedule."""

    def __init__(self, schedule):
        self.schedule, self.last_epoch = schedule, schedule.last_epoch

    def state_dict(self):
        return {key: value for key, value in self.schedule.state_dict().items() if key != "on_curve"}


@pytest.mark.parametrize(("by_hand", "old"), [(None, False), (None, True), (0.7, False)])
def test_a_distributed_checkpoint_brings_the_rate_back_also_one_of_an_older_version(tmp_path, by_hand, old):
    def build():
        model = torch.nn.Linear(2, 1)
        optimizer = RAdaBeliefW(model.parameters(), lr=LR)
        return model, optimizer, RobustSchedule(optimizer, TOTAL)

    model, optimizer, schedule = build()
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if by_hand is not None:
        optimizer.param_groups[0]["lr"] = by_hand
    fsdp.save(tmp_path / "it", model, optimizer, AsWrittenBefore(schedule) if old else schedule)
    other, its_optimizer, its_schedule = build()
    fsdp.load(tmp_path / "it", other, its_optimizer, its_schedule)
    for _ in range(2):
        assert rates(its_optimizer) == rates(optimizer)
        schedule.step()
        its_schedule.step()
