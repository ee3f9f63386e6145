"""What a rank of Accelerate sees of one epoch; imported by the ranks."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from robust_dist.augment import Indexed, RobustAugment, sample_keys
from tests.augment.reference import pictures

SAMPLES = 64


def samples():
    """64 images and their labels."""
    return pictures("noise", (SAMPLES, 3, 8, 8)), torch.arange(SAMPLES) % 10


def build():
    """The module that augments them."""
    return RobustAugment(10, 8, (0.5,) * 3, (0.25,) * 3)


def epoch_of_a_rank(batch_size):
    """Indices, images and targets that this rank's loader and augmentation give, in order."""
    from accelerate import Accelerator

    accelerator, augment = Accelerator(cpu=True), build()
    loader = accelerator.prepare(DataLoader(Indexed(TensorDataset(*samples())), batch_size=batch_size))
    seen = []
    for images, labels, indices in loader:
        seen.append((indices, *augment(images, labels, sample_keys(5, 1, indices))))
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]
