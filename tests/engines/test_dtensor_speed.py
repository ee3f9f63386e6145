"""A step on DTensor parameters costs what it costs on their local tensors: DTensor's dispatcher is not in it."""

import sys
import warnings
from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_dist.bench import dtensor
from robust_dist.optim import RAdaBeliefW
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

pytestmark = needs_torch_2_7


class Dispatched(TorchDispatchMode):
    """Names of the operations that are called, and of those that are given a DTensor."""

    def __init__(self):
        super().__init__()
        self.all, self.on_dtensors = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all.append(str(func))
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs))):
            self.on_dtensors.append(str(func))
        return func(*args, **(kwargs or {}))


def _dispatched(make):
    """What the eighth step dispatches, and what the ninth, after a load: all operations, those on DTensors."""
    params = dtensor._sharded(8)
    optimizer = make(params)
    for _ in range(7):
        optimizer.step()
    found = []
    for _ in range(2):
        with Dispatched() as seen:
            optimizer.step()
        found.append((seen.all, seen.on_dtensors))
        optimizer.load_state_dict(optimizer.state_dict())
    return found


def _calls(step):
    """How many functions, Python's and C's, Python calls in a step."""
    events = Counter()
    sys.setprofile(lambda frame, event, arg: events.update([event]))
    try:
        step()
    finally:
        sys.setprofile(None)
    return events["call"] + events["c_call"]


def _calls_that_dtensors_add(make):
    """Calls of a step on 20 and on 80 DTensors, less those of a step on their local tensors."""
    added = []
    for tensors in (20, 80):
        sharded = dtensor._sharded(tensors)
        steps = make(sharded).step, make(dtensor._plain(sharded)).step
        for step in steps * 8:
            step()
        # The fewest of three: the garbage collector may call in a step too.
        on_dtensors, on_plain = (min(_calls(step) for _ in range(3)) for step in steps)
        added.append(on_dtensors - on_plain)
    return added


def _measured(rounds):
    warnings.simplefilter("ignore")
    return dtensor.measure(tensors=100, rounds=rounds, repeats=3)


def _on_two_ranks():
    both = RAdaBeliefW, torch.optim.AdamW
    return _measured(2), [_dispatched(one) for one in both], [_calls_that_dtensors_add(one) for one in both]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_on_two_ranks, dtensor.WORLD)


def test_no_operation_of_a_step_goes_through_dtensors_dispatcher(ranks):
    for _, (ours, theirs), _ in ranks:
        for everything, on_dtensors in ours:
            assert len(everything) > 5
            assert on_dtensors == []
        # The same count sees AdamW's.
        assert theirs[0][1]


def test_what_dtensors_add_to_a_step_is_no_call_for_each_of_them(ranks):
    for *_, (ours, theirs) in ranks:
        assert ours[0] == ours[1]
        # The same count sees AdamW's.
        assert theirs[1] > 3 * theirs[0] > 0


def test_the_ratio_is_that_of_the_slowest_rank(ranks):
    for row, other in zip(*(rows for rows, *_ in ranks), strict=True):
        assert row.optimizer == other.optimizer
        assert row.ratio == other.ratio > 0


@pytest.mark.slow
def test_dtensors_slow_a_step_down_less_than_torchs():
    """Of the machine, too, and so not in the default run; what is counted above is not."""
    rows = {row.optimizer: row for row in run_ranks(_measured, dtensor.WORLD, 15)[0]}
    assert rows["RAdaBeliefW"].ratio < rows["torch AdamW foreach"].ratio


def test_the_table_has_a_line_for_each_optimizer():
    lines = [line for line in dtensor.bench_dtensor(rounds=1, tensors=4).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [
        "| RAdaBeliefW",
        "| torch AdamW foreach",
        "| torch AdamW fused",
    ]


def test_wrong_arguments_are_errors_that_name_them():
    with pytest.raises(ValueError, match="rounds=0 is below 1"):
        dtensor.bench_dtensor(rounds=0)
    with pytest.raises(ValueError, match=r"tensors must be an even number above 0 .* got 3"):
        dtensor.bench_dtensor(tensors=3)
