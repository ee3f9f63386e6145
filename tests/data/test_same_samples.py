"""Augmented samples do not depend on ranks, micro-batches and resuming, bit for bit, over whole epochs."""

import pytest
import torch

from robust_dist.augment import RobustAugment
from robust_dist.data import DeviceLoader, ImageSet

N, BATCH, BLOCK, SIZE = 75, 32, 4, 12


@pytest.fixture(scope="module")
def noise():
    images = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImageSet(images, torch.arange(N) % 5, tuple("abcde"), "noise")


def augmented(noise, epoch, world_size=1, accumulation=1):
    """For each global batch (images, targets), the ranks' micro-batches joined in order."""
    augment = RobustAugment(5, SIZE, (0.5,) * 3, (0.25,) * 3, crop=2, cutmix_mode="elem", block=BLOCK)
    options = {"batch_size": BATCH, "seed": 11, "block": BLOCK, "accumulation": accumulation}
    loaders = [DeviceLoader(noise, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
        parts = [augment(batch.images, batch.labels, batch.keys) for rank in step for batch in rank]
        yield tuple(torch.cat(values) for values in zip(*parts, strict=True))


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (1, 2), (1, 3)])
def test_every_cut_sees_the_augmented_samples_of_one_process(noise, world_size, accumulation):
    for epoch in range(2):
        alone = list(augmented(noise, epoch))
        together = list(augmented(noise, epoch, world_size, accumulation))
        assert len(alone) == len(together) == 3
        for one, many in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_epochs_differ(noise):
    first, second = (next(augmented(noise, epoch))[0] for epoch in range(2))
    assert not torch.equal(first, second)
