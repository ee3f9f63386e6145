"""The report lists a checkpoint's contents, and says whether it is complete."""

import re

import pytest
import torch
from torch import nn

from robust_dist.checkpoint import CheckpointError, CheckpointStore, convert, inspect, note_parameters
from robust_dist.cli import main
from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.schedule import RobustSchedule

TOTAL = 8


def save(folder, steps, *, dtype=torch.float32):
    """A DDP folder after some steps of a run with decay during 6 of 8 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).to(dtype)
    optimizer = RAdaBeliefW(param_groups(model, 0.25), lr=0.5)
    schedule = RobustSchedule(optimizer, TOTAL)
    for _ in range(steps):
        model(torch.randn(5, 3, dtype=dtype)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(schedule.state_dict(), folder / "scheduler.bin")
    note_parameters(folder, model, optimizer)
    return folder


def line(report, name):
    return re.search(rf"^ *{name}: +(.*)$", report, re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("steps", "decay", "value"),
    [
        (2, "weight decay on, off from step 6 of 8 (off_at 0.75)", "0.25"),
        (7, "weight decay off since step 6 of 8", "0"),
    ],
)
def test_step_schedule_and_groups_before_and_after_the_switch(tmp_path, steps, decay, value):
    report = inspect(save(tmp_path / "here", steps))
    assert line(report, "whole") == "yes"
    assert line(report, "layout") == "Accelerate folder (DDP)"
    assert line(report, "engine") == "ddp"
    assert line(report, "step") == f"{steps} (by the optimizer's state)"
    assert line(report, "schedule") == f"step {steps}; {decay}"
    assert line(report, "group 0") == f"2 parameters (28 elements), lr {_lr(steps)}, weight_decay {value}"
    assert line(report, "group 1").startswith("4 parameters (16 elements), ")


def _lr(steps):
    return f"{0.5 * (1 + torch.cos(torch.tensor(torch.pi * steps / TOTAL, dtype=torch.float64)).item()) / 2:.6g}"


def test_dtypes_and_bytes_of_parameters_and_state(tmp_path):
    report = inspect(save(tmp_path / "half", 1, dtype=torch.bfloat16))
    assert line(report, "model") == "9 tensors, bfloat16 104 bytes, int64 8 bytes"
    assert line(report, "exp_avg") == "6 tensors, float32 176 bytes"
    assert line(report, "exp_avg_sq") == "6 tensors, float32 176 bytes"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("to", "world", "layout"),
    [
        ("ddp", 3, "Accelerate folder (DDP)"),
        ("fsdp", 3, "Accelerate folder (FSDP, sharded state dict)"),
        ("zero2", 3, "DeepSpeed folder"),
    ],
)
def test_layout_engine_and_ranks_of_each_engine(tmp_path, to, world, layout):
    convert(save(tmp_path / "from", 2), tmp_path / "to", to, world)
    report = inspect(tmp_path / "to")
    found = [line(report, name) for name in ("layout", "engine", "world size", "whole")]
    assert found == [layout, to, str(world), "yes"]
    assert line(report, "group 0").startswith("2 parameters (28 elements), ")
    assert "step 2; weight decay on" in line(report, "schedule")


def test_parts_of_a_folder_and_files_are_told_apart(tmp_path):
    folder = save(tmp_path / "from", 2)
    convert(folder, tmp_path / "full", "fsdp", 2, full_state_dict=True)
    assert line(inspect(tmp_path / "full"), "layout") == "Accelerate folder (FSDP, full state dict)"
    parts = {"model": "pytorch_model", "optimizer": "optimizer"}
    torch.save({key: torch.load(folder / f"{file}.bin") for key, file in parts.items()}, tmp_path / "from" / "file.pt")
    report = inspect(tmp_path / "from" / "file.pt")
    assert line(report, "layout") == "file of torch.save"
    assert line(report, "schedule") == "none saved"
    assert line(report, "world size") == "not recorded"


def test_parameters_without_names_are_counted_all_the_same(tmp_path):
    folder = save(tmp_path / "nameless", 2)
    (folder / "parameters.json").unlink()
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(dict(reversed(weights.items())), folder / "pytorch_model.bin")
    report = inspect(folder)
    assert line(report, "group 0").startswith("2 parameters, lr ")
    assert "note_parameters" in line(report, "names")


@pytest.fixture
def run_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    save(store.begin(2), 2)
    recipe = {"model": {"name": "resnet56"}, "data": {"name": "digits"}, "epochs": 4, "seed": 3}
    return store.commit(2, {"recipe": recipe, "num_processes": 2, "loss_sums": [1.0, 2.0]}).path


def test_a_runs_checkpoint_names_its_recipe_and_ranks(run_checkpoint):
    report = inspect(run_checkpoint)
    assert line(report, "layout") == "Accelerate folder (DDP), with manifest.json"
    assert line(report, "world size") == "2"
    assert line(report, "step") == "2 (optimizer's state: 2)"
    assert line(report, "recipe") == "model resnet56, data digits, epochs 4, seed 3"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "optimizer.bin", "parameters.json"])
def test_a_torn_checkpoint_is_reported_with_its_file_and_status_1(run_checkpoint, file, capsys):
    (run_checkpoint / file).write_bytes(b"torn")
    assert main(["inspect", str(run_checkpoint)]) == 1
    assert line(capsys.readouterr().out, "whole").startswith(f"no: {run_checkpoint / file}: missing, short or changed")


def test_a_torn_folder_without_a_manifest_is_reported_too(tmp_path, capsys):
    folder = save(tmp_path / "torn", 2)
    assert main(["inspect", str(folder)]) == 0
    (folder / "optimizer.bin").write_bytes((folder / "optimizer.bin").read_bytes()[:-50])
    assert main(["inspect", str(folder)]) == 1
    assert "optimizer.bin: torn" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_an_error(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        inspect(tmp_path)
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
