"""A step on DTensor parameters costs what it costs on their local tensors: DTensor's dispatcher is not in it."""

import warnings

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_dist.bench import dtensor
from robust_dist.optim import RAdaBeliefW
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="needs torch 2.7")


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


def _on_two_ranks():
    warnings.simplefilter("ignore")
    rows = dtensor.measure(tensors=100, rounds=15, repeats=3)
    return {row.optimizer: row for row in rows}, _dispatched(RAdaBeliefW), _dispatched(torch.optim.AdamW)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_on_two_ranks, dtensor.WORLD)


def test_no_operation_of_a_step_goes_through_dtensors_dispatcher(ranks):
    for _, ours, theirs in ranks:
        for everything, on_dtensors in ours:
            assert len(everything) > 5
            assert on_dtensors == []
        # The same count sees AdamW's.
        assert theirs[0][1]


def test_a_step_on_dtensors_is_nearly_as_fast_as_on_their_local_tensors(ranks):
    for rows, *_ in ranks:
        # Of the fastest rounds: others' work on the machine is in the slower ones.
        ratios = {name: row.dtensor.low / row.plain.low for name, row in rows.items()}
        assert ratios["RAdaBeliefW"] <= 1.5
        assert ratios["RAdaBeliefW"] < ratios["torch AdamW foreach"]


def test_the_table_has_a_line_for_each_optimizer(capsys):
    dtensor.main(["--rounds", "1", "--tensors", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [
        "| RAdaBeliefW",
        "| torch AdamW foreach",
        "| torch AdamW fused",
    ]


def test_wrong_arguments_are_errors_that_name_them():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        dtensor.bench_dtensor(rounds=0)
    with pytest.raises(ValueError, match=r"tensors must be an even number above 0 .* got 3"):
        dtensor.bench_dtensor(tensors=3)
