"""DCP as torch 2.6 has it, where no keyword says that this process is alone."""

import pytest
import torch

from robust_dist.checkpoint import dcp
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.engines import fsdp


def save_of_2_6(content, *, storage_writer=None, planner=None):
    raise AssertionError("takes the other ranks in")


def load_of_2_6(content, *, storage_reader=None, planner=None):
    raise AssertionError("takes the other ranks in")


@pytest.mark.parametrize("old", [False, True])
def test_one_process_writes_and_reads_whatever_ranks_there_are(tmp_path, monkeypatch, old):
    if old:
        monkeypatch.setattr(dcp, "save", save_of_2_6)
        monkeypatch.setattr(dcp, "load", load_of_2_6)
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"weight": {"step": torch.tensor(3.0), "exp_avg": weight + 1, "exp_avg_sq": weight + 2}}
    dcp.write_dcp(TrainingState({"weight": weight}, state, [{"params": ["weight"], "lr": 0.1}]), tmp_path)
    assert torch.equal(dcp.load_flat(tmp_path / dcp.MODEL_FOLDER)["model.weight"], weight)
    optimizer = dcp.load_flat(tmp_path / dcp.OPTIMIZER_FOLDER)
    assert torch.equal(optimizer["optimizer.state.weight.exp_avg_sq"], weight + 2)


def test_the_keyword_is_given_to_functions_that_have_it():
    assert fsdp._alone(lambda state, no_dist=False: None, None) == {"no_dist": True}
    assert fsdp._alone(save_of_2_6, None) == {}
