"""Crops equal pad and slice, mirror images equal flip."""

import pytest
import torch
from torch.nn.functional import pad

from robust_dist.augment import CropPlan, FlipPlan, RandomCrop, RandomHorizontalFlip, sample_keys
from tests.augment.chance import assert_flat
from tests.augment.reference import pictures


@pytest.mark.parametrize("fill", [0, 77])
@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_a_crop_is_a_window_of_the_padded_image(padding, fill, dtype):
    images = pictures("noise", (32, 3, 7, 10)).to(dtype)
    module = RandomCrop(padding, fill=fill)
    plan = module.plan(sample_keys(0, 0, range(32)))
    padded = pad(images, (padding,) * 4, value=fill)
    windows = [
        padded[i, :, top : top + 7, left : left + 10]
        for i, (top, left) in enumerate(zip(plan.top.tolist(), plan.left.tolist(), strict=True))
    ]
    assert torch.equal(module.apply(images, plan), torch.stack(windows))


def test_every_place_of_the_window_is_equally_likely():
    plan = RandomCrop(4).plan(sample_keys(7, 0, range(100_000)))
    assert_flat(plan.top * 9 + plan.left, 81)


def test_the_middle_window_is_the_image():
    images, middle = pictures("noise", (3, 3, 8, 8)), torch.full((3,), 4)
    assert torch.equal(RandomCrop(4).apply(images, CropPlan(top=middle, left=middle)), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_chosen_images_are_mirrored_and_the_others_stay(dtype):
    images = pictures("noise", (4, 3, 5, 6)).to(dtype)
    out = RandomHorizontalFlip().apply(images, FlipPlan(flip=torch.tensor([True, False, False, True])))
    assert torch.equal(out, torch.stack([images[0].flip(-1), images[1], images[2], images[3].flip(-1)]))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_p_is_the_share_of_mirrored_images(p):
    share = RandomHorizontalFlip(p).plan(sample_keys(0, 0, range(40_000))).flip.double().mean()
    assert abs(float(share) - p) < 5 * (p * (1 - p) / 40_000) ** 0.5 + 1e-12


@pytest.mark.parametrize("module", [RandomCrop(2), RandomHorizontalFlip()], ids=["crop", "flip"])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_order_batch_and_memory_format_do_not_matter(module, batch):
    images, keys = pictures("noise", (batch, 3, 6, 9)), sample_keys(0, 0, range(batch))
    before, whole, order = images.clone(), module(images, keys), torch.randperm(batch)
    assert torch.equal(module(images[order], keys[order]), whole[order])
    assert torch.equal(images, before)
    last = module(images.contiguous(memory_format=torch.channels_last), keys)
    assert batch == 0 or last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, whole)
    assert module(images).shape == images.shape


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RandomCrop(-1), ValueError, "padding=-1 is below 0"),
        (lambda: RandomCrop(1.5), TypeError, "padding=1.5 is a float: it must be a whole number"),
        (lambda: RandomCrop(4, fill=(1, 2, 3)), TypeError, "fill must be one number"),
        (lambda: RandomHorizontalFlip(1.1), ValueError, "p=1.1 is out of range"),
        (lambda: RandomCrop()(torch.zeros(3, 8, 8)), ValueError, "NCHW"),
        (lambda: RandomHorizontalFlip()(torch.zeros(1, 3, 8, 8).long()), TypeError, "uint8 or floating"),
    ],
)
def test_wrong_settings_and_images_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("module", [RandomCrop(), RandomHorizontalFlip()], ids=["crop", "flip"])
def test_a_function_is_still_applied_to_every_module(module):
    seen = []
    assert module.apply(seen.append) is module
    assert seen == [module]
