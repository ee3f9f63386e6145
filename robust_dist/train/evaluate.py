"""Evaluation that counts every sample once, whatever the world size."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_dist.augment import RobustAugment
from robust_dist.data import ImageSet, evaluation_batches


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        accuracy: Share of the samples whose class was named first.
        samples: How many were counted, over all ranks.
        loss: Mean cross-entropy.
    """

    accuracy: float
    samples: int
    loss: float


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of the floating-point buffers (BatchNorm's statistics), in one collective a dtype."""
    if _world_size() == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        dist.all_reduce(flat)
        flat /= _world_size()
        for buffer, mean in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
            buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    image_set: ImageSet,
    augment: RobustAugment,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Score:
    """Score `model` on a whole data set, shared between the ranks.

    The model is left in the mode it was in. No rank makes a forward pass more than it has batches for, so
    `model` must be one whose forward needs no other rank (an unwrapped module).

    Args:
        model: Classifier that takes normalised images [B, C, H, W] and gives logits [B, num_classes].
        image_set: uint8 images and labels, the same on all ranks.
        augment: Its `normalize` prepares the images.
        batch_size: Images at a time and rank.
        rank: This rank.
        world_size: How many ranks share the work.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=image_set.images.device)
    for images, labels in evaluation_batches(image_set, batch_size, rank, world_size):
        totals += _count(model(augment.normalize(images)), labels)
    model.train(training)
    if world_size > 1:
        dist.all_reduce(totals)
    correct, samples, loss = totals.tolist()
    return Score(correct / samples, int(samples), loss / samples)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[correct, samples, summed loss] of one batch, float64."""
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([correct.double(), correct.new_full((), len(labels)).double(), loss.double()])
