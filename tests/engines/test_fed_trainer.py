"""Trainer with an optimizer that averages its weights and measures its rate: what it trains, evaluates and saves."""

import pytest
import torch
from torch import nn

from robust_dist.engines.transformers import RobustTrainerCallback
from robust_dist.optim import RAdaBeliefW
from tests.engines import fed_trainer
from tests.engines.trainer_ranks import TOTAL, Classifier, forget_accelerate, make_trainer
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def assert_reference(found, wanted):
    (rates, losses, end), (their_rates, averages) = found, wanted
    assert rates == pytest.approx(their_rates, rel=1e-5)
    assert {3, 6} <= losses.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(averages[step][0], rel=1e-5)
    torch.testing.assert_close(end, averages[TOTAL][1], **TOLERANCE)


@pytest.mark.parametrize("world", [1, 2])
def test_trainer_measures_evaluates_and_saves_what_a_plain_loop_does_and_resumes_bit_for_bit(world, tmp_path):
    wanted, smooth = fed_trainer.reference(), fed_trainer.reference(fed_trainer.SMOOTHING)
    for found, smoothed, saved, (best, end, of_best) in run_ranks(fed_trainer.everything, world, str(tmp_path)):
        for one in found.values():
            assert_reference(one, wanted)
        assert_reference(smoothed, smooth)
        assert saved[0] == pytest.approx(wanted[0], rel=1e-5)
        torch.testing.assert_close(saved[1], wanted[1][fed_trainer.EVERY][1], **TOLERANCE)
        torch.testing.assert_close(saved[2], wanted[1][TOTAL][1], **TOLERANCE)
        step = int(best.rpartition("-")[2])
        assert step < TOTAL
        torch.testing.assert_close(of_best, wanted[1][step][1], **TOLERANCE)
        assert all(map(torch.equal, end, of_best))


@needs_torch_2_7
def test_trainer_does_so_under_fsdp2(tmp_path):
    for found in run_ranks(fed_trainer.under_fsdp2, 2, str(tmp_path)):
        assert_reference(found, fed_trainer.reference())


def test_trainer_does_so_under_zero_2_and_3(tmp_path):
    wanted = fed_trainer.reference()
    for found in run_ranks(fed_trainer.under_zero, 2, str(tmp_path), timeout=300.0):
        for one in found.values():
            assert_reference(one, wanted)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    forget_accelerate()


def trainer_with(folder, schedule, **more):
    forget_accelerate()
    return make_trainer(
        folder, RobustTrainerCallback(), schedule=schedule, cls=fed_trainer.Measuring, save_strategy="no", **more
    )[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reduce_lr_on_plateau"])
def test_a_schedule_that_lowers_the_rate_is_an_error_with_averaging(schedule, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 3} if schedule == "reduce_lr_on_plateau" else {}
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{schedule}' lowers the learning rate.*'constant'"):
        trainer_with(tmp_path, schedule, **more).train()


class Guarded(RAdaBeliefW):
    def __init__(self, parameters, **settings):
        super().__init__(parameters, rate_guard=1.0, **settings)


@pytest.mark.parametrize(("schedule", "more"), [("linear", {}), ("constant_with_warmup", {"warmup_steps": 2})])
def test_a_schedule_is_an_error_with_an_optimizer_that_takes_no_rate(schedule, more, tmp_path):
    forget_accelerate()
    settings = {"schedule": schedule, "cls": Guarded, "save_strategy": "no", **more}
    trainer = make_trainer(tmp_path, RobustTrainerCallback(), **settings)[0]
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{schedule}' sets .*rate_guard=1 takes none: set"):
        trainer.train()


@pytest.mark.filterwarnings("always::UserWarning")
def test_batch_normalisation_whose_statistics_are_not_the_averages_is_a_warning(tmp_path, monkeypatch):
    init = Classifier.__init__

    def with_batch_norm(self):
        init(self)
        self.body.append(nn.BatchNorm1d(3))

    monkeypatch.setattr(Classifier, "__init__", with_batch_norm)
    with pytest.warns(UserWarning, match="batch normalisation keeps the statistics of the trained weights"):
        trainer_with(tmp_path, "constant").train()
