"""DCP as in torch 2.6, where no keyword says that this process is alone; and folders that contain code."""

import os
import pickle

import pytest
import torch

from robust_dist.checkpoint import CheckpointError, dcp
from robust_dist.checkpoint.dcp import read_metadata
from robust_dist.checkpoint.training_state import TrainingState


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


class Evil:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("evil", [print, pickle.loads, torch.load, os.PathLike, eval, torch.nn.Linear])
def test_a_dcp_folder_that_names_a_function_is_refused(tmp_path, evil):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*names"):
        read_metadata(tmp_path)


def test_no_code_of_a_dcp_folder_is_run_by_whoever_reads_it(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(made)))
    with pytest.raises(CheckpointError, match=r"mkdir, which does not belong in a checkpoint"):
        dcp.load_flat(folder)
    assert not made.exists()
    value = tmp_path / "value"
    value.mkdir()
    dcp.save_into(value, {"x": Evil(made)}, alone=True)
    with pytest.raises(CheckpointError, match="plain values"):
        dcp.load_flat(value)
    with pytest.raises(CheckpointError, match="Weights only"):
        dcp.load_into(value, {"x": 0}, alone=True)
    assert not made.exists()


def test_a_dcp_folder_that_names_files_outside_is_refused(tmp_path):
    dcp.save_into(tmp_path, {"x": torch.ones(2)}, alone=True)
    metadata = read_metadata(tmp_path)
    for entry in metadata.storage_data.values():
        entry.relative_path = "../elsewhere.distcp"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_metadata(tmp_path)
