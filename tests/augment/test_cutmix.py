"""CutMix: boxes as its authors draw them, shares that are exact, partners that are whom they should be."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from robust_dist.augment import CutMix, sample_keys, validate_labels
from robust_dist.augment.cutmix import beta_share, beta_table
from robust_dist.augment.keys import Stream, randint, uniform
from tests.augment.chance import assert_flat

MODES = ["batch", "elem"]


def name_tags(batch, height, width):
    """Images whose every pixel is the sample's number."""
    return torch.arange(batch).view(-1, 1, 1, 1).expand(batch, 3, height, width).to(torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [2, 7, 64])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (13, 30)])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_lam_is_exactly_the_share_of_pixels_that_stay_and_the_rest_is_the_partners(mode, batch, size, alpha):
    module, images, labels = CutMix(64, mode=mode, alpha=alpha), name_tags(batch, *size), torch.arange(batch)
    for epoch in range(5):
        plan = module.plan(sample_keys(0, epoch, range(batch)), *size)
        mixed, (own, other, lam) = module.mix(images, labels, plan)
        assert torch.equal(own, labels)
        assert torch.equal(other, plan.partner)
        for i in range(batch):
            x1, y1, x2, y2 = plan.box[i].tolist()
            expected = images[i].clone()
            expected[:, y1:y2, x1:x2] = float(plan.partner[i])
            assert torch.equal(mixed[i], expected)
            if plan.partner[i] != i:
                assert lam[i] == (mixed[i, 0] == i).double().mean().float()
        soft = module.apply(images, labels, plan)[1]
        assert torch.equal(soft.sum(1), torch.ones(batch))
        assert torch.equal(soft.gather(1, labels[:, None])[:, 0] >= lam, torch.ones(batch, dtype=torch.bool))


@pytest.mark.parametrize(("side", "share"), [(32, 0.299), (224, 0.318)])
def test_boxes_cover_what_the_papers_clipped_boxes_cover(side, share):
    plan = CutMix(10, mode="elem").plan(sample_keys(3, 0, range(400_000)), side, side)
    assert abs(float((1 - plan.lam).double().mean()) - share) < 0.0015
    assert not plan.lam.eq(0).any()


def test_a_box_is_empty_as_often_as_the_papers():
    plan = CutMix(10, mode="elem").plan(sample_keys(3, 0, range(400_000)), 32, 32)
    empty = float(plan.lam.eq(1).double().mean())
    assert abs(empty - 0.0040) < 0.0005


def authors_box(share, x, y, height, width):
    """The authors' rand_bbox for a box of this share of the image and this centre, clipped."""
    side = math.sqrt(share)
    half_x, half_y = int(width * side) // 2, int(height * side) // 2
    return [max(x - half_x, 0), max(y - half_y, 0), min(x + half_x, width), min(y + half_y, height)]


@pytest.mark.parametrize("size", [(13, 30), (32, 32), (1, 1), (224, 3)])
def test_boxes_are_the_authors_for_the_same_draws(size):
    keys = sample_keys(3, 0, range(2000))
    plan = CutMix(10, mode="elem").plan(keys, *size)
    draws = zip(
        uniform(keys, Stream.CUTMIX_SHARE).tolist(),
        randint(keys, Stream.CUTMIX_X, size[1]).tolist(),
        randint(keys, Stream.CUTMIX_Y, size[0]).tolist(),
        strict=True,
    )
    assert plan.box.tolist() == [authors_box(*draw, *size) for draw in draws]


@pytest.mark.parametrize("batch", [2, 3, 8, 17, 512])
@pytest.mark.parametrize("block", [2, 8, 1000])
def test_in_mode_elem_a_partner_is_another_sample_of_the_own_block(batch, block):
    plan = CutMix(10, mode="elem", block=block).plan(sample_keys(0, 0, range(batch)), 8, 8)
    here = torch.arange(batch)
    assert torch.equal(plan.partner // block, here // block)
    alone = here // block * block == batch - 1
    assert torch.equal(plan.partner == here, alone)


def test_in_mode_elem_every_other_sample_of_the_block_is_equally_likely():
    plan = CutMix(10, mode="elem", block=8).plan(sample_keys(0, 0, range(160_000)), 8, 8)
    here = torch.arange(160_000)
    assert_flat(here % 8 * 7 + (plan.partner - here) % 8 - 1, 56)


def test_in_mode_elem_pairs_do_not_depend_on_the_world_size():
    module = CutMix(10, mode="elem", block=4)
    images, labels = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8), torch.randint(0, 10, (32,))
    keys = sample_keys(1, 4, torch.randperm(1000)[:32])
    whole = module(images, labels, keys)
    for world in (2, 4, 8):
        parts = [module(*p) for p in zip(images.chunk(world), labels.chunk(world), keys.chunk(world), strict=True)]
        for one, many in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(many), one)


def test_in_mode_batch_all_share_one_box_and_the_partners_are_a_permutation():
    plan = CutMix(10).plan(sample_keys(0, 0, range(100)), 32, 32)
    assert torch.equal(plan.box, plan.box[:1].expand(100, 4))
    assert torch.equal(plan.partner.sort().values, torch.arange(100))


def test_in_mode_elem_boxes_differ():
    assert CutMix(10, mode="elem").plan(sample_keys(0, 0, range(100)), 32, 32).box.unique(dim=0).shape[0] > 90


@pytest.mark.parametrize("mode", MODES)
def test_p_is_the_share_of_mixed_batches_or_samples(mode):
    module = CutMix(10, mode=mode, p=0.3)
    keys = sample_keys(0, 0, range(5_000))
    groups = keys.view(-1, 1) if mode == "batch" else [keys]
    boxes = torch.cat([module.plan(k, 100, 100).box for k in groups])
    assert abs(float((boxes[:, 2] > 0).double().mean()) - 0.3) < 0.03


@pytest.mark.parametrize("mode", MODES)
def test_p_zero_is_the_identity(mode):
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    mixed, targets = CutMix(10, mode=mode, p=0)(images, labels)
    assert torch.equal(mixed, images)
    assert torch.equal(targets, one_hot(labels, 10).float())


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_is_the_identity(mode):
    images = torch.rand(1, 3, 8, 8)
    for epoch in range(5):
        mixed, targets = CutMix(10, mode=mode)(images, torch.tensor([3]), sample_keys(0, epoch, [0]))
        assert torch.equal(mixed, images)
        assert torch.equal(targets, one_hot(torch.tensor([3]), 10).float())


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_stays_empty(mode):
    mixed, targets = CutMix(10, mode=mode)(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert mixed.shape == (0, 3, 8, 8)
    assert targets.shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_dtype_and_channel_count_mixes_alike_and_keeps_channels_last(dtype, channels):
    images = torch.randint(0, 256, (8, channels, 9, 11), dtype=torch.uint8).to(dtype)
    labels, module = torch.arange(8), CutMix(8, mode="elem")
    plan = module.plan(sample_keys(0, 1, range(8)), 9, 11)
    mixed, targets = module.apply(images, labels, plan)
    assert mixed.dtype == dtype
    assert torch.equal(mixed.double(), module.apply(images.double(), labels, plan)[0])
    last = module.apply(images.contiguous(memory_format=torch.channels_last), labels, plan)[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, mixed)
    assert targets.dtype == torch.float32


def test_pixels_that_are_not_numbers_stay_where_they_are():
    images = torch.zeros(8, 1, 16, 16)
    images[0] = float("nan")
    plan = CutMix(8).plan(sample_keys(0, 1, range(8)), 16, 16)
    mixed = CutMix(8).apply(images, torch.arange(8), plan)[0]
    here = torch.cat([mixed[i].isnan().float().mean()[None] for i in range(8)])
    expected = torch.where(torch.arange(8) == 0, plan.lam, 0.0) + torch.where(plan.partner == 0, 1 - plan.lam, 0.0)
    torch.testing.assert_close(here, expected)


def test_the_soft_targets_loss_equals_the_weighted_loss_of_the_triple():
    module, logits = CutMix(10, mode="elem"), torch.randn(32, 10, dtype=torch.float64)
    images, labels = torch.rand(32, 3, 16, 16), torch.randint(0, 10, (32,))
    plan = module.plan(sample_keys(0, 0, range(32)), 16, 16)
    _, (a, b, lam) = module.mix(images, labels, plan)
    hard = lam * cross_entropy(logits, a, reduction="none") + (1 - lam) * cross_entropy(logits, b, reduction="none")
    soft = cross_entropy(logits, module.apply(images, labels, plan)[1].double())
    torch.testing.assert_close(soft, hard.mean())


def test_images_given_in_are_not_changed():
    images = torch.rand(8, 3, 8, 8)
    before = images.clone()
    CutMix(10, mode="elem")(images, torch.arange(8))
    assert torch.equal(images, before)


def test_gradients_flow_to_the_pixels_that_were_used():
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    mixed, _ = CutMix(4, mode="elem")(images, torch.arange(4), sample_keys(0, 0, range(4)))
    mixed.sum().backward()
    assert images.grad.sum() == mixed.numel()


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 2.0, 5.0, 50.0, 1000.0])
def test_beta_draws_have_the_distributions_mean_and_variance(alpha):
    share = beta_share((torch.arange(2**19, dtype=torch.float64) + 0.5) / 2**19, beta_table(alpha))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(share.mean()) - 0.5) < 1e-6
    assert abs(float(share.var()) - variance) < 1e-3 * variance


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [
        (0.5, lambda x: 2 / torch.pi * x.sqrt().asin()),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
    ],
)
def test_beta_quantiles_are_those_of_the_distribution(alpha, distribution):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    torch.testing.assert_close(distribution(beta_share(u, beta_table(alpha))), u, rtol=1e-4, atol=1e-9)


def test_beta_quantiles_rise_and_stay_in_the_unit_interval():
    u = torch.cat([torch.zeros(1), torch.logspace(-16, 0, 10_000, dtype=torch.float64)])[:-1]
    for alpha in (0.01, 0.3, 7.0, 1e4):
        share = beta_share(u.double(), beta_table(alpha))
        assert (share.diff() >= 0).all()
        assert share.min() >= 0
        assert share.max() <= 1


def test_a_small_alpha_mixes_almost_nothing_or_almost_all():
    plan = CutMix(10, mode="elem", alpha=0.1).plan(sample_keys(0, 0, range(20_000)), 32, 32)
    assert ((plan.lam > 0.9) | (plan.lam < 0.75)).double().mean() > 0.9
    plan = CutMix(10, mode="elem", alpha=100.0).plan(sample_keys(0, 0, range(20_000)), 1001, 1001)
    assert plan.lam.min() > 0.3


@pytest.mark.parametrize("labels", [[0, 10], [-1, 3], [0, 255]])
def test_labels_outside_the_classes_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, num_classes\) = \[0, 10\)"):
        CutMix(10)(torch.zeros(2, 3, 8, 8), torch.tensor(labels))


def test_validate_labels_names_the_first_wrong_one_and_its_place():
    validate_labels(torch.arange(10), 10)
    validate_labels(torch.zeros(0, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="got 17 at position 3"):
        validate_labels(torch.tensor([1, 2, 3, 17, 18]), 10)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.zeros(2), TypeError, "labels must be integer class numbers, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), TypeError, "labels must be integer class numbers"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"labels must have shape \[2\]"),
        (torch.zeros(2, 10, dtype=torch.int64), ValueError, r"labels must have shape \[2\]"),
    ],
)
def test_wrong_labels_are_refused(labels, error, words):
    with pytest.raises(error, match=words):
        CutMix(10)(torch.zeros(2, 3, 8, 8), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype_give_the_same_targets(dtype):
    labels, images = torch.arange(8), torch.rand(8, 3, 8, 8)
    keys = sample_keys(0, 0, range(8))
    assert torch.equal(CutMix(8)(images, labels.to(dtype), keys)[1], CutMix(8)(images, labels, keys)[1])


def test_a_partner_outside_the_batch_is_refused():
    module = CutMix(10)
    plan = module.plan(sample_keys(0, 0, range(2)), 8, 8)
    wrong = dataclasses.replace(plan, partner=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"plan.partner must lie in \[0, 2\)"):
        module.apply(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), wrong)
    short = dataclasses.replace(plan, box=plan.box[:1])
    with pytest.raises(ValueError, match=r"plan.box must have shape \[2, 4\]"):
        module.apply(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), short)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_classes": 0}, ValueError, "num_classes=0 is below 1"),
        ({"num_classes": 10.0}, TypeError, "num_classes=10.0 is a float"),
        ({"alpha": 0}, ValueError, "alpha=0 is out of range; it must be above 0"),
        ({"alpha": float("inf")}, ValueError, "alpha=inf is out of range; it must be a finite number"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan is out of range"),
        ({"p": 1.5}, ValueError, "p=1.5 is out of range; it must be a finite number >= 0 and <= 1"),
        ({"p": "1"}, TypeError, "p='1' is a str"),
        ({"mode": "pair"}, ValueError, "mode='pair' is unknown; it must be one of 'batch', 'elem'"),
        ({"block": 0}, ValueError, "block=0 is below 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, error, words):
    with pytest.raises(error, match=words):
        CutMix(**{"num_classes": 10, **settings})
