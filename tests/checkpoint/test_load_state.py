"""Reading a checkpoint to resume runs no code, and a damaged random state is an error."""

import os
import random
import zipfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.swa_utils import AveragedModel

from robust_dist import RAdaBeliefW
from robust_dist.checkpoint import CheckpointError, load_state


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def saved(tmp_path):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    average = AveragedModel(model)
    accelerator.prepare(model, RAdaBeliefW(model.parameters()))
    accelerator.register_for_checkpointing(average)
    folder = tmp_path / "saved"
    accelerator.save_state(str(folder))
    return accelerator, folder, average


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_random_states_and_the_moving_average_come_back(saved):
    accelerator, folder, average = saved
    load_state(accelerator, folder)
    first, weight = draws(), average.module.weight.detach().clone()
    with torch.no_grad():
        average.module.weight.zero_()
    load_state(accelerator, folder)
    assert draws() == first
    assert torch.equal(average.module.weight, weight)


def test_a_random_state_that_the_other_numpy_wrote_is_read(saved):
    accelerator, folder, _ = saved
    load_state(accelerator, folder)
    first, path = draws(), folder / "random_states_0.pkl"
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    (pickled,) = (name for name in parts if name.endswith("/data.pkl"))
    ours, others = sorted((b"numpy._core.", b"numpy.core."), key=parts[pickled].count, reverse=True)
    assert ours in parts[pickled]
    parts[pickled] = parts[pickled].replace(ours, others)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    load_state(accelerator, folder)
    assert draws() == first


@pytest.mark.parametrize("damage", ["cut", "keys", "evil"])
def test_a_random_state_that_cannot_be_read_is_an_error(saved, tmp_path, damage):
    accelerator, folder, _ = saved
    path = folder / "random_states_0.pkl"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        torch.save({"step": 0} if damage == "keys" else Evil(tmp_path / "made"), path)
    with pytest.raises(CheckpointError, match=r"random_states_0\.pkl: the random state cannot be read"):
        load_state(accelerator, folder)
    assert not (tmp_path / "made").exists()


def test_a_rank_that_is_new_has_no_random_state(saved):
    accelerator, folder, _ = saved
    (folder / "random_states_0.pkl").unlink()
    load_state(accelerator, folder)


def test_a_registered_object_s_file_is_not_unpickled(saved, tmp_path):
    accelerator, folder, _ = saved
    torch.save({"module.weight": Evil(tmp_path / "made")}, folder / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl: torn, or not a file of tensors"):
        load_state(accelerator, folder)
    assert not (tmp_path / "made").exists()
