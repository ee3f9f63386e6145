"""What a schedule-free optimizer asks of the loop: its average is evaluated, not the weights that it trains."""

from collections.abc import Callable
from itertools import chain, count, islice
from typing import Any

import torch
from torch import nn

from robust_dist.data.sets import TrainLoader
from robust_dist.schedule import base_optimizer
from robust_dist.train.watchdog import tick

# With a momentum of 0.1, half a percent of batch normalisation's former statistics is left after so many.
STATISTICS_STEPS = 50


def use_averaged_weights(
    optimizer: Any, model: nn.Module, loader: TrainLoader, epoch: int, prepare: Callable[..., torch.Tensor]
) -> None:
    """Make the optimizer's average the model's weights, until the next `optimizer.train()`; others are left alone.

    Batch normalisation's statistics are those of the weights that were trained, so they are collected anew, from the
    first training batches of the epoch.

    Args:
        optimizer: What the engine made of the optimizer.
        model: What the engine made of the model, in training mode.
        loader: The training batches.
        epoch: The epoch that has just ended.
        prepare: From a batch to the model's input.
    """
    if not callable(getattr(base_optimizer(optimizer), "eval", None)):
        return
    optimizer.eval()
    batches = chain.from_iterable(loader.epoch(epoch) for _ in count())
    with torch.no_grad():
        for parts in islice(batches, STATISTICS_STEPS):
            tick("collecting the statistics of batch normalisation")
            for batch in parts:
                model(prepare(batch))
    # They were counted when they were trained on.
    loader.take_bad()
