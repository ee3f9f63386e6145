"""A batch of a set on the device: gathered by the pipeline, or on first access, with the same values."""

import pytest
import torch

from robust_dist import RobustAugment
from robust_dist.augment.keys import sample_keys
from robust_dist.data import Batch, DeviceLoader, ImageSet

N = 37


@pytest.fixture(scope="module")
def noise():
    images = torch.randint(0, 256, (N, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(N) % 5, tuple("abcde"), "noise")


def batches(noise):
    return [batch for (batch,) in DeviceLoader(noise, batch_size=16, seed=3, block=4).epoch(1)]


def test_images_and_labels_are_the_set_s_at_the_indices(noise):
    for batch in batches(noise):
        assert torch.equal(batch.images, noise.images[batch.indices])
        assert torch.equal(batch.labels, noise.labels[batch.indices])
        assert torch.equal(batch.keys, sample_keys(3, 1, batch.indices))


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_what_the_pipeline_gathers_is_what_it_makes_of_the_gathered_batch_bit_for_bit(noise, mode):
    pipeline = RobustAugment(5, 9, (0.5,) * 3, (0.2,) * 3, crop=2, cutmix_mode=mode, block=4)
    for batch in batches(noise):
        own = Batch(batch.images, batch.labels, batch.indices, batch.keys, batch.global_size)
        for fused, plain in zip(batch.augmented(pipeline), own.augmented(pipeline), strict=True):
            assert torch.equal(fused, plain)


def test_augmenting_copies_no_image_before_the_pipeline_does(noise):
    def pipeline(images, labels, keys, *, index):
        assert images is noise.images
        assert labels is noise.labels
        return index, keys

    (batch, *_) = batches(noise)
    assert batch.augmented(pipeline) == (batch.indices, batch.keys)
    assert not {"images", "labels"} & vars(batch).keys()
    assert batch.images is batch.images


def test_a_batch_is_as_long_as_it_has_samples(noise):
    (batch, *_) = batches(noise)
    assert len(batch) == len(batch.indices) == len(batch.images) == len(batch.labels)
    assert (batch.global_size, batch.weights) == (16, None)


def test_a_compiled_pipeline_gathers_too_without_a_graph_break(noise):
    pipeline = RobustAugment(5, 9, (0.5,) * 3, (0.2,) * 3, crop=2, block=4, backend="torch")
    compiled = torch.compile(pipeline, fullgraph=True, backend="eager")
    for batch in batches(noise):
        for fused, plain in zip(batch.augmented(compiled), batch.augmented(pipeline), strict=True):
            assert torch.equal(fused, plain)
