"""The course that every engine runs: 8 steps, two decay groups, clipping, accumulation, the switch in the middle."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.schedule import RobustSchedule

TOTAL, OFF_AT, ACCUMULATION, BATCH = 8, 0.5, 2, 24
LR, DECAY, CLIP = 0.05, 0.1, 0.6
SWITCH = 4
# Steps whose checkpoints are kept: before the switch and after it.
SAVED = (2, 6)
TOLERANCE = 1e-6


class Net(nn.Module):
    """Rows of 10, 3 and 1: uneven shards on 3 ranks, empty ones on 4, tensor-parallel halves on 2."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 3)
        self.norm = nn.LayerNorm(3)
        self.gate = nn.Linear(3, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.down(torch.tanh(self.up(x))))
        return y * torch.sigmoid(self.gate(y))


def groups_of(model: nn.Module) -> list[dict]:
    """Weights with decay; biases and the norm without."""
    return param_groups(model, DECAY)


def optimizer_of(model: nn.Module) -> RAdaBeliefW:
    return RAdaBeliefW(groups_of(model), lr=LR)


def schedule_of(optimizer) -> RobustSchedule:
    return RobustSchedule(optimizer, TOTAL, weight_decay_off_at=OFF_AT)


def part(step: int, index: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's images [n, 6] and labels [n] of one accumulated part of a step's global batch."""
    generator = torch.Generator().manual_seed(step)
    images = 2 * torch.randn(BATCH, 6, generator=generator)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return images[index::ACCUMULATION][rank::world], labels[index::ACCUMULATION][rank::world]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over this rank's samples; engines average over ranks, and parts are averaged by the course."""
    return nn.functional.cross_entropy(logits.float(), labels)


def wanted(step: int) -> tuple[list[float], list[float]]:
    """(decay of each group, rate of each group) that optimizer step `step`, from 0, must use."""
    lr = LR * (1 + math.cos(math.pi * min(step, TOTAL) / TOTAL)) / 2
    return [0.0 if step >= SWITCH else DECAY, 0.0], [lr, lr]


def assert_settings(param_groups_now: list[dict], step: int) -> None:
    """The groups are all there, each with the decay and the rate of the step that comes next."""
    decays, rates = wanted(step)
    found = [float(g["weight_decay"]) for g in param_groups_now]
    assert found == decays, f"step {step}: weight decay {found}, not {decays}"
    found = [float(g["lr"]) for g in param_groups_now]
    assert all(abs(a - b) < 1e-9 for a, b in zip(found, rates, strict=True)), f"step {step}: lr {found}, not {rates}"


@dataclass
class Track:
    """One process's run: parameters (float32, by name) before each step and after the last, and the clipping."""

    parameters: list[dict[str, Tensor]]
    clipped: int


@functools.cache
def reference(dtype: torch.dtype = torch.float32) -> Track:
    """The course in one process without an engine."""
    model = Net(dtype)
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    track = Track([named(model)], 0)
    for step in range(TOTAL):
        assert_settings(optimizer.param_groups, step)
        for index in range(ACCUMULATION):
            images, labels = part(step, index)
            (loss_of(model(images.to(dtype)), labels) / ACCUMULATION).backward()
        track.clipped += bool(nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        track.parameters.append(named(model))
    assert 0 < track.clipped < TOTAL
    return track


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def assert_on_track(found: dict[str, Tensor], step: int, tolerance: float = TOLERANCE) -> None:
    """Whole parameters after `step` steps are those of one process."""
    expected = reference().parameters[step]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].float() - value).abs().max().item()
        assert error <= tolerance, f"after {step} steps {name} is off by {error:.2e}"


def drive(
    train_part: Callable[[Tensor, Tensor, bool], None],
    finish_step: Callable[[], None],
    settings: Callable[[], list[dict]],
    whole: Callable[[], dict[str, Tensor]],
    *,
    first: int = 0,
    last: int = TOTAL,
    rank: int = 0,
    world: int = 1,
    tolerance: float = TOLERANCE,
) -> dict[str, Tensor]:
    """Run an engine over steps [first, last) and hold it to the track; returns the last parameters, whole.

    Args:
        train_part: Forward and backward of one accumulated part: images, labels, whether it is the step's last.
            It divides its mean loss by ACCUMULATION where the engine does not.
        finish_step: Clips to CLIP, steps the optimizer and the schedule, zeroes the gradients.
        settings: The param groups that the next step will use.
        whole: Every parameter, gathered, by its clean name.
    """
    for step in range(first, last):
        assert_settings(settings(), step)
        for index in range(ACCUMULATION):
            train_part(*part(step, index, rank, world), index == ACCUMULATION - 1)
        finish_step()
        assert_on_track(whole(), step + 1, tolerance)
    return whole()
