"""Under Accelerate a measured rate needs no call of the program: it is that of one process without an engine."""

import pytest
import torch

from tests.engines import fed
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

pytest.importorskip("accelerate")


def assert_reference(found, wanted, name=None, rel=1e-6):
    rates, outputs = found
    assert rates == pytest.approx(wanted[0], rel=rel), name
    torch.testing.assert_close(outputs, wanted[1], rtol=rel, atol=rel / 100, msg=name)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_ordinary_loop_under_accelerate_measures_the_rate_of_one_process(world, tmp_path):
    wanted, less = fed.reference(), fed.reference(entropy=0.125)
    assert wanted[0] != pytest.approx(less[0], rel=1e-3)
    for found, own_losses in run_ranks(fed.under_accelerate, world, str(tmp_path)):
        for name, one in found.items():
            assert_reference(one, wanted, name)
        for one in own_losses:
            assert_reference(one, less, "own losses")


@needs_torch_2_7
def test_an_ordinary_loop_under_accelerates_fsdp_measures_it_too():
    wanted = fed.reference()
    for found in run_ranks(fed.under_fsdp, 2):
        for name, one in found.items():
            assert_reference(one, wanted, name, rel=1e-4 if name == "fsdp1" else 1e-6)


def test_an_ordinary_loop_under_accelerates_deepspeed_measures_it_too():
    wanted = fed.reference()
    for found in run_ranks(fed.under_zero, 2):
        for name, one in found.items():
            assert_reference(one, wanted, name, rel=1e-4)
