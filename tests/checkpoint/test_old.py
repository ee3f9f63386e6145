"""Checkpoints written by 0.4.4 (tests/checkpoint/old) resume as they would have under 0.4.4."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from robust_dist.checkpoint import CheckpointStore, convert, load_state, read
from robust_dist.engines import fsdp
from tests.checkpoint.old.write import STEPS, TOTAL, build, train

OLD = Path(__file__).with_name("old") / "0.4.4"


def assert_ends_as_then(model, optimizer, schedule):
    assert schedule.state_dict()["last_epoch"] == STEPS
    train(model, optimizer, schedule, range(STEPS, TOTAL))
    for name, value in torch.load(OLD / "end.pt", weights_only=True).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_a_folder_of_fsdp_save_goes_on_as_it_would_have(tmp_path):
    shutil.copytree(OLD / "fsdp", tmp_path / "old")
    model, optimizer, schedule = build()
    fsdp.load(tmp_path / "old", model, optimizer, schedule)
    assert_ends_as_then(model, optimizer, schedule)


@pytest.mark.parametrize("form", ["as it is", "converted"])
def test_a_run_s_checkpoint_goes_on_as_it_would_have(tmp_path, accelerator, form):
    shutil.copytree(OLD / "run", tmp_path / "old")
    found, rejected = CheckpointStore(tmp_path / "old").newest()
    assert (found.step, rejected, found.metadata["engine"]) == (STEPS, [], "ddp")
    path = found.path
    if form == "converted":
        path = tmp_path / "new"
        convert(found.path, path, "ddp", 1)
    model, optimizer, schedule = accelerator.prepare(*build())
    load_state(accelerator, path)
    assert_ends_as_then(model, optimizer, schedule)


def test_both_hold_the_same_state(tmp_path):
    one, other = read(OLD / "fsdp"), read(OLD / "run" / f"step-{STEPS:08d}")
    assert one.optimizer.keys() == other.optimizer.keys() == {*one.model}
    for name, entry in one.optimizer.items():
        assert torch.equal(one.model[name], other.model[name])
        assert all(torch.equal(entry[key], other.optimizer[name][key]) for key in entry)
