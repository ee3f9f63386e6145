"""Writes the checkpoints of this folder with an older version: `PYTHONPATH=ITS_ROOT python write.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from robust_dist import RAdaBeliefW, RobustSchedule, param_groups
from robust_dist.checkpoint import CheckpointStore, note_parameters
from robust_dist.engines import fsdp

STEPS, TOTAL = 4, 8


def build() -> tuple[nn.Module, RAdaBeliefW, RobustSchedule]:
    """A model of three layers, its optimizer in two groups, and the schedule of a short run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = RAdaBeliefW(param_groups(model, 0.1), lr=0.05)
    return model, optimizer, RobustSchedule(optimizer, TOTAL)


def train(model: nn.Module, optimizer: RAdaBeliefW, schedule: RobustSchedule, steps: range) -> None:
    """Some steps, each on a batch of its own."""
    for step in steps:
        images = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main(folder: Path) -> None:
    """A folder of engines.fsdp.save, one of a run under DDP, and the weights at the run's end."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(*build())
    train(model, optimizer, schedule, range(STEPS))
    fsdp.save(folder / "fsdp", model, optimizer, schedule)
    store = CheckpointStore(folder / "run")
    partial = store.begin(STEPS)
    accelerator.save_state(str(partial))
    note_parameters(partial, model, optimizer)
    store.commit(STEPS, {"engine": "ddp", "num_processes": 1, "loss_sums": [0.5], "recipe": {"name": "old"}})
    train(model, optimizer, schedule, range(STEPS, TOTAL))
    torch.save(model.state_dict(), folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
