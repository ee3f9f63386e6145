"""Conversion preserves the state of averaging and of a measured rate, to every engine and back."""

import pytest
import torch
from torch import nn

from robust_dist.checkpoint import TrainingState, convert, inspect, read
from robust_dist.checkpoint.plain import write_ddp
from robust_dist.optim import RAdaBeliefW


@pytest.fixture
def saved(tmp_path):
    """A DDP checkpoint of a run with averaging and a measured rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = RAdaBeliefW(model.parameters(), averaging="schedule_free", rate_guard=1.0)
    for _ in range(6):
        loss = model(torch.randn(5, 3)).square().mean()
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()
    groups = [{**state["param_groups"][0], "params": names}]
    entries = {names[number]: entry for number, entry in state["state"].items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    folder = tmp_path / "ddp"
    folder.mkdir()
    found = TrainingState(weights, entries, groups)
    write_ddp(found, folder)
    return folder, found


@pytest.mark.parametrize("engine", ["fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_to_another_engine_and_back(saved, tmp_path, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    folder, wanted = saved
    convert(folder, tmp_path / "there", engine, 2)
    convert(tmp_path / "there", tmp_path / "back", "ddp", 1)
    found = read(tmp_path / "back")
    for name, entry in wanted.optimizer.items():
        assert torch.equal(found.model[name], wanted.model[name])
        for key, value in entry.items():
            assert torch.equal(found.optimizer[name][key], value), (name, key)
    measured = [key for key in wanted.groups[0] if key.startswith("rate_")] + ["train_mode", "averaging"]
    assert {key: found.groups[0][key] for key in measured} == {key: wanted.groups[0][key] for key in measured}


def test_the_report_says_which_rate_was_measured_and_which_weights_are_held(saved):
    folder, state = saved
    optimizer = RAdaBeliefW([nn.Parameter(torch.zeros(1))], averaging="schedule_free", rate_guard=1.0)
    optimizer.load_state_dict({"state": {}, "param_groups": [{**state.groups[0], "params": [0]}]})
    rate = optimizer.measured_rate
    assert rate > 0
    assert f"(26 elements), measured lr {rate:.6g}, weight_decay 0.01, averaging, holds the average\n" in inspect(
        folder
    )
