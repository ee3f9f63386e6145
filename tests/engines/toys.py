"""A model with two decay groups, and the numbers that each of its optimizer steps must use."""

import math

import torch
from torch import nn

LR, DECAY = 0.05, 0.1


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def groups_of(model):
    """Weights with decay, biases without."""
    split = {True: [], False: []}
    for parameter in model.parameters():
        split[parameter.ndim > 1].append(parameter)
    return [{"params": split[True], "weight_decay": DECAY}, {"params": split[False], "weight_decay": 0.0}]


def batch(step, size=8):
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 6, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


def wanted(step, total, off_at=0.75):
    """(decay of both groups, rate of both groups) of optimizer step `step`."""
    lr = LR * (1 + math.cos(math.pi * min(step, total) / total)) / 2
    return [0.0 if step >= off_at * total else DECAY, 0.0], [lr, lr]


def used(optimizer):
    groups = optimizer.param_groups
    return [float(g["weight_decay"]) for g in groups], [float(g["lr"]) for g in groups]


def same(mine, theirs):
    """Equal decays, and equal rates within rounding."""
    return mine[0] == theirs[0] and all(abs(a - b) < 1e-12 for a, b in zip(mine[1], theirs[1], strict=True))
