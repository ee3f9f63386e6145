"""Faults that other augmentation libraries have or had, each looked for here; the other files look for the rest."""

import random

import numpy as np
import pytest
import torch

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, sample_keys
from tests.augment.reference import pictures, plan_of

SIDE = 16


def make(**settings):
    return RobustAugment(settings.pop("classes", 10), SIDE, (0.5,) * 3, (0.25,) * 3, **settings)


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_with_keys_no_generator_moves_and_without_only_torchs(mode):
    images, labels, keys = pictures("noise", (8, 3, SIDE, SIDE)), torch.arange(8), sample_keys(0, 0, range(8))
    before = states()
    make(cutmix_mode=mode, cutmix_alpha=0.4)(images, labels, keys)
    assert states() == before
    make(cutmix_mode=mode)(images, labels, generator=torch.Generator().manual_seed(1))
    assert states() == before
    make(cutmix_mode=mode)(images, labels)
    assert states()[1:] == before[1:]
    assert states()[0] != before[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_numbers_above_256_survive_images_of_half_precision(dtype):
    labels = torch.arange(744, 1000)
    images, keys = pictures("noise", (256, 3, SIDE, SIDE)), sample_keys(0, 0, range(256))
    out, targets = make(classes=1000, dtype=dtype, block=256)(images, labels, keys)
    assert out.dtype == dtype
    assert targets.dtype == torch.float32
    plan = make(classes=1000, block=256).cutmix.plan(keys, SIDE, SIDE)
    assert torch.equal(targets.gather(1, labels.unsqueeze(1)).squeeze(1), plan.lam)
    assert torch.equal(targets[:, :744], torch.zeros(256, 744))


@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("batch", [2, 7, 32])
def test_levels_of_8_bits_share_labels_as_exactly_as_floating_ones(mode, batch):
    tags = torch.arange(batch, dtype=torch.uint8).view(-1, 1, 1, 1).expand(batch, 1, 30, 30).contiguous()
    for epoch in range(5):
        mixed, targets = CutMix(batch, mode=mode)(tags, torch.arange(batch), sample_keys(0, epoch, range(batch)))
        counts = torch.stack([(mixed == i).sum((1, 2, 3)) for i in range(batch)], 1)
        torch.testing.assert_close(targets, counts / 900, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(24, 24), (9, 14)])
def test_boxes_reach_every_edge_and_favour_no_side(size):
    height, width = size
    boxes = CutMix(10, mode="elem").plan(sample_keys(3, 0, range(200_000)), *size).box
    cover = torch.zeros(height + 1, width + 1, dtype=torch.float64)
    x1, y1, x2, y2 = boxes.unbind(1)
    for y, x, sign in ((y1, x1, 1), (y2, x2, 1), (y1, x2, -1), (y2, x1, -1)):
        cover.index_put_((y, x), torch.tensor(float(sign), dtype=torch.float64), accumulate=True)
    share = cover.cumsum(0).cumsum(1)[:-1, :-1] / len(boxes)
    assert share.min() > 0.05
    # A box of centre c starts at c - half and ends before c + half: its mirror image lies a pixel further.
    inner = share[:-1, :-1]
    for mirrored in (inner.flip(0), inner.flip(1)):
        assert (inner - mirrored).abs().max() < 0.006
    assert (x1 == 0).any()
    assert (x2 == width).any()
    assert (y1 == 0).any()
    assert (y2 == height).any()


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_p_counts_once_in_the_pipeline(p):
    keys = sample_keys(0, 0, range(20_000))
    targets = RobustAugment(2, 16, [0.5], [0.2], cutmix_p=p, trivial=False, crop=None)(
        torch.zeros(20_000, 1, 16, 16, dtype=torch.uint8), torch.arange(20_000) % 2, keys
    )[1]
    mixed_with_the_other_class = float((targets.amax(1) < 1).double().mean())
    whole = RobustAugment(2, 16, [0.5], [0.2], trivial=False, crop=None)
    always = float((whole.cutmix.plan(keys, 16, 16).lam < 1).double().mean()) * 4 / 7
    assert abs(mixed_with_the_other_class - p * always) < 0.015


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("magnitude_bin", "pixels"), [(3, 3), (30, 32)])
def test_a_shift_by_whole_pixels_is_exact_in_half_precision_at_224_pixels(dtype, magnitude_bin, pixels):
    images = (pictures("noise", (1, 1, 224, 224)) // 4 / 255).to(dtype)
    grid = (images.float() * 255).round() / 255
    out = TrivialAugment().apply(images, plan_of([(3, magnitude_bin, 0)]))
    assert torch.equal(out[..., pixels:], grid[..., :-pixels].to(dtype))
    assert out[..., :pixels].eq(0).all()


@pytest.mark.parametrize("op", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_both_signs_of_a_magnitude_do_opposite_things(op):
    images = pictures("smooth", (1, 3, SIDE, SIDE)).expand(3, -1, -1, -1)
    plus, minus, none = TrivialAugment().apply(images, plan_of([(op, 5, 0), (op, 5, 1), (op, 0, 1)]))
    assert torch.equal(none, images[0])
    assert not torch.equal(plus, none)
    assert not torch.equal(minus, none)
    assert not torch.equal(plus, minus)


def test_ranks_of_one_seed_see_different_draws_and_together_those_of_one_process():
    plan = TrivialAugment().plan
    whole = plan(sample_keys(7, 0, range(64))).op
    ranks = [plan(sample_keys(7, 0, range(rank, 64, 4))).op for rank in range(4)]
    assert torch.equal(torch.stack(ranks, 1).flatten(), whole)
    assert len({tuple(ops.tolist()) for ops in ranks}) == 4


def test_torchs_default_dtype_changes_no_pixel():
    images, labels, keys = (
        pictures("noise", (256, 3, SIDE, SIDE)),
        torch.arange(256) % 10,
        sample_keys(0, 0, range(256)),
    )
    expected = make(cutmix_alpha=0.4)(images, labels, keys)
    torch.set_default_dtype(torch.float64)
    try:
        ours = make(cutmix_alpha=0.4)(images, labels, keys)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_run_taken_up_in_the_middle_of_an_epoch_augments_as_if_never_left():
    images, labels, augment = pictures("noise", (64, 3, SIDE, SIDE)), torch.arange(64) % 10, make()
    batches = [range(start, start + 16) for start in range(0, 64, 16)]
    whole = [augment(images[b], labels[b], sample_keys(2, 9, b))[0] for b in map(list, batches)]
    torch.manual_seed(123)
    again = [make()(images[b], labels[b], sample_keys(2, 9, b))[0] for b in map(list, batches[2:])]
    for one, other in zip(whole[2:], again, strict=True):
        assert torch.equal(one, other)
