"""RobustAugment is its stages in order, and the same for any batch, rank and memory format."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import one_hot

from robust_dist.augment import RobustAugment, sample_keys
from tests.augment.reference import pictures

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def make(**settings):
    return RobustAugment(10, settings.pop("size", (12, 16)), MEAN, STD, **settings)


def batch(size=32, seed=0):
    keys = sample_keys(seed, 0, range(size))
    return pictures("noise", (size, 3, 12, 16), seed), torch.arange(size) % 10, keys


def scaled(levels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (levels.float() / 255 - mean) / std


def test_the_pipeline_is_crop_flip_trivial_cutmix_then_normalise():
    module, (images, labels, keys) = make(), batch()
    levels = module.trivial(module.flip(module.crop(images, keys), keys), keys)
    mixed, targets = module.cutmix(levels, labels, keys)
    out = module(images, labels, keys)
    assert torch.equal(out[0], scaled(mixed))
    assert torch.equal(out[1], targets)


@pytest.mark.parametrize("off", ["crop", "flip", "trivial", "cutmix"])
def test_each_stage_can_be_off(off):
    images, labels, keys = batch()
    module = make(**{off: False if off != "crop" else None})
    assert getattr(module, off) is None
    out, targets = module(images, labels, keys)
    assert not torch.equal(out, make()(images, labels, keys)[0])
    if off == "cutmix":
        assert torch.equal(targets, one_hot(labels, 10).float())


def test_with_everything_off_it_normalises():
    images, labels, keys = batch()
    module = make(crop=0, flip=False, trivial=False, cutmix=False)
    assert torch.equal(module(images, labels, keys)[0], scaled(images))


def test_in_eval_it_normalises_and_gives_one_hot_targets():
    images, labels, _ = batch()
    out, targets = make().eval()(images, labels)
    assert torch.equal(out, scaled(images))
    assert torch.equal(targets, one_hot(labels, 10).float())
    assert torch.equal(make().normalize(images), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_come_out_in_the_dtype_and_format_asked_for(dtype, channels_last):
    images, labels, keys = batch()
    out, targets = make(dtype=dtype, channels_last=channels_last)(images, labels, keys)
    assert torch.equal(out, make()(images, labels, keys)[0].to(dtype))
    assert out.dtype == dtype
    assert targets.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("world", [2, 4])
def test_one_two_and_four_ranks_see_the_same_samples(world):
    module, parts = make(), batch(64)
    whole = module(*parts)
    split = [module(*p) for p in zip(*(t.chunk(world) for t in parts), strict=True)]
    for one, many in zip(whole, zip(*split, strict=True), strict=True):
        assert torch.equal(torch.cat(many), one)


def test_without_cutmix_the_order_of_the_batch_does_not_matter():
    module, (images, labels, keys) = make(cutmix=False), batch()
    order = torch.randperm(32)
    assert torch.equal(module(images[order], labels[order], keys[order])[0], module(images, labels, keys)[0][order])


def test_floating_images_on_the_grid_equal_uint8_images():
    images, labels, keys = batch()
    assert torch.equal(make()(images / 255, labels, keys)[0], make()(images, labels, keys)[0])


@pytest.mark.parametrize("size", [0, 1])
def test_an_empty_batch_and_a_batch_of_one_pass(size):
    images, labels, keys = batch(size)
    out, targets = make()(images, labels, keys)
    assert out.shape == (size, 3, 12, 16)
    assert targets.shape == (size, 10)
    assert torch.equal(targets, one_hot(labels, 10).float())


def test_one_channel_passes():
    module = RobustAugment(10, 8, [0.5], [0.2], dtype=torch.bfloat16)
    out, _ = module(pictures("noise", (9, 1, 8, 8)), torch.zeros(9, dtype=torch.int64))
    assert out.shape == (9, 1, 8, 8)


def test_keys_come_from_the_generator_or_torchs_default():
    images, labels, _ = batch()
    one, two = (make()(images, labels, generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(one, two)
    torch.manual_seed(1)
    three = make()(images, labels)[0]
    torch.manual_seed(1)
    assert torch.equal(make()(images, labels)[0], three)


def test_it_keeps_no_state_and_survives_copying_pickling_and_casting():
    module, parts = make(cutmix_alpha=0.3), batch()
    whole = module(*parts)[0]
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), make(cutmix_alpha=0.3).bfloat16()):
        assert torch.equal(other(*parts)[0], whole)


def test_a_function_is_applied_to_every_stage():
    seen = []
    module = make()
    module.apply(seen.append)
    assert set(seen) == {module, module.crop, module.flip, module.trivial, module.cutmix}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"size": (8, 8, 8)}, ValueError, "size must be an int or"),
        ({"size": 0}, ValueError, "size=0 is below 1"),
        ({"crop": -4}, ValueError, "padding=-4 is below 0"),
        ({"fill": (1, 2, 3)}, ValueError, "set crop=None"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a floating-point torch dtype"),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating-point torch dtype"),
        ({"cutmix_mode": "all"}, ValueError, "mode='all' is unknown"),
        ({"cutmix_alpha": -1.0}, ValueError, "alpha=-1.0 is out of range"),
        ({"num_bins": 1}, ValueError, "num_bins=1 is below 2"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, error, words):
    with pytest.raises(error, match=words):
        make(**settings)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5,) * 2, (0.2,) * 2, "mean must have one number for each of 1 or 3 channels"),
        ((0.5,) * 3, (0.2,), "mean and std must have the same length, got 3 and 1"),
        ((0.5,) * 3, (0.2, 0.2, 0.0), "std must be above 0"),
        ((0.5, 0.5, float("nan")), (0.2,) * 3, "mean must be finite"),
    ],
)
def test_wrong_means_and_deviations_are_refused(mean, std, words):
    with pytest.raises(ValueError, match=words):
        RobustAugment(10, 8, mean, std)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (
            torch.zeros(2, 3, 16, 12, dtype=torch.uint8),
            [0, 1],
            ValueError,
            r"shape \[B, 3, 12, 16\], got \[2, 3, 16, 12\]",
        ),
        (torch.zeros(2, 1, 12, 16, dtype=torch.uint8), [0, 1], ValueError, r"shape \[B, 3, 12, 16\]"),
        (torch.zeros(2, 3, 12, 16, dtype=torch.uint8), [0, 10], ValueError, "got 10 at position 1"),
        (torch.zeros(2, 3, 12, 16, dtype=torch.uint8), [0, 1, 2], ValueError, "labels must have shape"),
        (torch.full((2, 3, 12, 16), 1.5), [0, 1], ValueError, r"finite and in \[0, 1\]"),
        (torch.zeros(2, 3, 12, 16, dtype=torch.int32), [0, 1], TypeError, "uint8 or floating"),
    ],
)
def test_wrong_batches_are_refused(images, labels, error, words, training):
    with pytest.raises(error, match=words):
        make().train(training)(images, torch.tensor(labels))
