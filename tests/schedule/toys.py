"""Small optimizers and the loop that the tests of this room share."""

import math

import torch
from torch import nn

BASES = [(0.1, 0.02), (0.01, 0.0), (0.03, 0.5)]


def make(cls=torch.optim.AdamW, bases=BASES, tensors=False):
    """An optimizer with one parameter in each (lr, weight_decay) group."""
    torch.manual_seed(0)
    number = torch.tensor if tensors else float
    groups = [
        {"params": [nn.Parameter(torch.randn(3))], "lr": number(lr), "weight_decay": number(decay)}
        for lr, decay in bases
    ]
    return cls(groups, lr=0.1)


def decays(optimizer):
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def train_step(optimizer, *schedules):
    """One step with gradients; returns the decays and the rates it was made with."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    used = decays(optimizer), rates(optimizer)
    optimizer.step()
    for schedule in schedules:
        schedule.step()
    return used


def paper_lr(step, total, eta):
    """PAPER.md, eq. 17."""
    return (1 + math.cos(math.pi * step / total)) * eta / 2


def wanted_decays(step, total, off_at=0.75, bases=BASES):
    return [0.0 if step >= off_at * total else decay for _, decay in bases]
