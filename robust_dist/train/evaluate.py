"""Evaluation that counts every sample once at any world size, with the right weights and statistics."""

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
from robust_dist.train.metrics import LEAST_FOR_TOP5
from robust_dist.train.watchdog import tick

# With a momentum of 0.1, half a percent of batch normalisation's earlier statistics remain after this many steps.
STATISTICS_STEPS = 50


@dataclass(frozen=True)
class Score:
    """The result of an evaluation.

    Attributes:
        accuracy: Fraction of samples whose class has the largest logit.
        samples: Number of samples counted, over all ranks.
        loss: Mean cross-entropy.
        top5: Fraction of samples whose class is among the five largest logits; None for fewer than six classes.
        class_accuracy: Accuracy on each class's samples, in label order; None for a class without samples.
    """

    accuracy: float
    samples: int
    loss: float
    top5: float | None
    class_accuracy: tuple[float | None, ...]

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that have samples (balanced accuracy)."""
        there = [accuracy for accuracy in self.class_accuracy if accuracy is not None]
        return sum(there) / len(there) if there else math.nan


def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of the floating-point buffers (BatchNorm's statistics), in one collective per dtype."""
    _exchange_buffers(model, lambda flat: (dist.all_reduce(flat), flat.div_(world_size())))


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the first rank's floating-point buffers, as DDP does, in one collective per dtype."""
    _exchange_buffers(model, lambda flat: dist.broadcast(flat, src=0))


@torch.no_grad()
def _exchange_buffers(model: nn.Module, exchange: Callable[[Tensor], Any]) -> None:
    if world_size() == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        exchange(flat)
        values = flat.split([buffer.numel() for buffer in same])
        torch._foreach_copy_(same, [value.view_as(buffer) for buffer, value in zip(same, values, strict=True)])


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
    """Score a classifier on a whole data set, shared between the ranks; the model's mode is left unchanged.

    Every rank makes the same number of forward passes, because a sharded model's need the other ranks; a rank that has
    run out repeats an image without counting it. Unreadable images are not counted.

    Args:
        model: From normalised images [B, C, H, W] to logits [B, num_classes].
        image_set: The same on all ranks.
        augment: Its `normalize` prepares the images.
        batch_size: Images at a time on each rank.
        rank: This rank.
        world_size: Ranks that share the work.
        dtype: Dtype of the images; None leaves them as `augment` returns them.

    Returns:
        The score; accuracy and loss are NaN if no image could be read.
    """
    training = model.training
    model.eval()
    totals = no_totals(len(image_set.classes), image_set.device)
    shares = even_cuts(len(image_set), world_size)
    batches = image_set.eval_batches(*shares[rank], batch_size)
    longest = max(stop - start for start, stop in shares)
    for _ in range(-(-longest // batch_size)):
        tick("a batch of evaluation")
        batch = next(batches, None)
        logits = model(augment.normalize(image_set.filler() if batch is None else batch.images).to(dtype))
        if batch is not None:
            totals += count_batch(logits, batch, len(image_set.classes))
    model.train(training)
    if world_size > 1:
        dist.all_reduce(totals)
    return score_of(totals)


def no_totals(num_classes: int, device: torch.device) -> Tensor:
    """Initial totals, to which `count_batch` of each batch is added: zeros, float64."""
    return torch.zeros(4 + 2 * num_classes, dtype=torch.float64, device=device)


def score_of(totals: Tensor) -> Score:
    """The score from the sum of `count_batch` results."""
    correct, samples, loss, top5, *by_class = totals.tolist()
    counted = samples or math.nan
    num_classes = len(by_class) // 2
    pairs = zip(by_class[:num_classes], by_class[num_classes:], strict=True)
    return Score(
        accuracy=correct / counted,
        samples=int(samples),
        loss=loss / counted,
        top5=top5 / counted if num_classes >= LEAST_FOR_TOP5 else None,
        class_accuracy=tuple(right / of if of else None for right, of in pairs),
    )


def count_batch(logits: Tensor, batch: EvalBatch, num_classes: int) -> Tensor:
    """One batch's contribution to the totals, without waiting for the device.

    Args:
        logits: [B, at least num_classes].
        batch: The images that gave them.
        num_classes: Number of classes in the data.

    Returns:
        Float64: correct, samples, summed loss, correct among the five largest logits, then correct and samples of each
        class. All but the loss are whole numbers, so their sums are exact.
    """
    labels = batch.labels
    if batch.good is not None:
        logits, labels = logits[batch.good], labels[batch.good]
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    right = logits.argmax(1) == labels
    correct, top5 = right.sum(), (label_ranks(logits, labels) < 5).sum()
    sums = torch.stack([correct.double(), correct.new_full((), len(labels)).double(), loss.double(), top5.double()])
    by_class = sums.new_zeros(2, num_classes)
    by_class.index_add_(1, labels, torch.stack([right, torch.ones_like(right)]).double())
    return torch.cat([sums, by_class.flatten()])


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of classes ranked before each sample's own, int64 [B].

    Equal logits rank in class order, as in `argmax`; NaN counts as the largest.
    """
    logits = torch.where(logits.isnan(), math.inf, logits)
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def use_averaged_weights(
    optimizer: Any, model: nn.Module, loader: Loader, epoch: int, prepare: Callable[..., torch.Tensor]
) -> None:
    """Make a schedule-free optimizer's average the model's weights, until the next `optimizer.train()`.

    Batch normalisation's statistics are recomputed from the epoch's first training batches, each turned into the
    model's input by `prepare`; the existing ones belong to the trained weights.
    """
    base: Any = base_optimizer(optimizer)
    if not (callable(getattr(base, "eval", None)) and getattr(base, "averages_weights", True)):
        return
    # Accelerate's wrapper of another wrapper forwards it only from some release on.
    base.eval()
    batches = chain.from_iterable(loader.epoch(epoch) for _ in count())
    with torch.no_grad():
        for parts in islice(batches, STATISTICS_STEPS):
            tick("collecting the statistics of batch normalisation")
            for batch in parts:
                model(prepare(batch))
    # Bad images were counted during training.
    loader.take_bad()
