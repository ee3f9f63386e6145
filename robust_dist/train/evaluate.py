"""Evaluation that counts every sample once, whatever the world size, of the weights and statistics that count."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_dist.augment import RobustAugment
from robust_dist.data.batches import even_cuts
from robust_dist.data.loader import Loader
from robust_dist.data.sets import EvalBatch, LabelledSet
from robust_dist.ranks.talk import world_size
from robust_dist.schedule import base_optimizer
from robust_dist.train.watchdog import tick

# With a momentum of 0.1, half a percent of batch normalisation's former statistics is left after so many.
STATISTICS_STEPS = 50


@dataclass(frozen=True)
class Score:
    """The result of an evaluation.

    Attributes:
        accuracy: Share of samples whose class has the largest logit.
        samples: How many were counted, over all ranks.
        loss: Mean cross-entropy.
    """

    accuracy: float
    samples: int
    loss: float


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of the floating-point buffers (BatchNorm's statistics), in one collective a dtype."""
    if world_size() == 1:
        return
    for same in _buffers_by_dtype(model):
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        dist.all_reduce(flat)
        _copy_back(flat / world_size(), same)


def _buffers_by_dtype(model: nn.Module) -> list[list[Tensor]]:
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    dtypes = sorted({buffer.dtype for buffer in buffers}, key=str)
    return [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]


def _copy_back(flat: Tensor, buffers: list[Tensor]) -> None:
    values = flat.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [value.view_as(buffer) for buffer, value in zip(buffers, values, strict=True)])


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the first rank's floating-point buffers, as DDP does, in one collective a dtype."""
    if world_size() == 1:
        return
    for same in _buffers_by_dtype(model):
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        dist.broadcast(flat, src=0)
        _copy_back(flat, same)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    image_set: LabelledSet,
    augment: RobustAugment,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype | None = None,
) -> Score:
    """Score `model` on a whole data set, shared between the ranks.

    The model is left in the mode it was in. Every rank makes the same number of forward passes, because a sharded
    model's need the other ranks; a rank that has run out repeats an image and does not count it.

    Args:
        model: Classifier that takes normalised images [B, C, H, W] and gives logits [B, num_classes].
        image_set: The same on all ranks; what it cannot read is not counted.
        augment: Its `normalize` prepares the images.
        batch_size: Images at a time and rank.
        rank: This rank.
        world_size: How many ranks share the work.
        dtype: Cast the images to it; None leaves them as `augment` makes them.

    Returns:
        The score; accuracy and loss are nan where no image could be read.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=image_set.device)
    shares = even_cuts(len(image_set), world_size)
    batches = image_set.eval_batches(*shares[rank], batch_size)
    longest = max(stop - start for start, stop in shares)
    for _ in range(-(-longest // batch_size)):
        tick("a batch of evaluation")
        batch = next(batches, None)
        logits = model(augment.normalize(image_set.filler() if batch is None else batch.images).to(dtype))
        if batch is not None:
            totals += count_batch(logits, batch)
    model.train(training)
    if world_size > 1:
        dist.all_reduce(totals)
    return score_of(totals)


def score_of(totals: Tensor) -> Score:
    """The score of the sum of what `count_batch` gave."""
    correct, samples, loss = totals.tolist()
    counted = samples or math.nan
    return Score(correct / counted, int(samples), loss / counted)


def count_batch(logits: Tensor, batch: EvalBatch) -> Tensor:
    """[correct, samples, summed loss] of one batch, float64."""
    labels = batch.labels
    if batch.good is not None:
        logits, labels = logits[batch.good], labels[batch.good]
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([correct.double(), correct.new_full((), len(labels)).double(), loss.double()])


def use_averaged_weights(
    optimizer: Any, model: nn.Module, loader: Loader, epoch: int, prepare: Callable[..., torch.Tensor]
) -> None:
    """Make a schedule-free optimizer's average the model's weights, until the next `optimizer.train()`; not for others.

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
