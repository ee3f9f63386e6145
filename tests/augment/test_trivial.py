"""TrivialAugment gives torchvision's pixels, for every operation, bin, sign and size."""

import dataclasses

import pytest
import torch

from robust_dist.augment import TrivialAugment, sample_keys, tables
from tests.augment.chance import assert_flat
from tests.augment.reference import CELLS, pictures, plan_of, torchvision_op

pytest.importorskip("torchvision")
KINDS = ["noise", "smooth", "grey", "low contrast", "constant", "two levels"]


def is_torchvisions(ours, image, cell):
    """Equal, but for the last values of Contrast: there torch's loop rounds some sums twice, against its own rule."""
    theirs = torchvision_op(image, *cell)
    if tables.OPS[cell[0]] != "Contrast":
        return torch.equal(ours, theirs)
    whole = max(ours.numel() - 32, 0)
    (ours, last), (theirs, their_last) = ((t.flatten()[:whole], t.flatten()[whole:]) for t in (ours, theirs))
    return torch.equal(ours, theirs) and bool((last.int() - their_last.int()).abs().le(1).all())


def assert_equals_torchvision(images, cells, static=True):
    module, plan = TrivialAugment(), plan_of(cells)
    before, ours = images.clone(), module.apply(images, plan)
    wrong = [
        (tables.OPS[cell[0]], *cell[1:])
        for image, out, cell in zip(images, ours, cells, strict=True)
        if not is_torchvisions(out, image, cell)
    ]
    assert wrong == []
    assert torch.equal(images, before)
    if static:
        assert torch.equal(module._levels(images, plan, grouped=False), ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 32, 32), (1, 33, 47)])
def test_every_operation_bin_and_sign_in_one_batch_equals_torchvision(size, kind):
    assert_equals_torchvision(pictures(kind, (len(CELLS), *size)), CELLS)


@pytest.mark.parametrize("size", [(3, 33, 47), (1, 32, 32), (3, 7, 65), (3, 64, 64)])
def test_every_operation_bin_and_sign_equals_torchvision_at_other_sizes(size):
    assert_equals_torchvision(pictures("noise", (len(CELLS), *size)), CELLS)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 9), (3, 3), (8, 8), (16, 16), (17, 15)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_equal_torchvision(size, channels):
    assert_equals_torchvision(pictures("noise", (len(CELLS), channels, *size)), CELLS)


def test_224_pixels_equal_torchvision():
    cells = [(op, b, (op + b) % 2) for op in range(14) for b in (1, 16, 23, 30)]
    assert_equals_torchvision(pictures("noise", (len(cells), 3, 224, 224)), cells, static=False)


@pytest.mark.parametrize("height", [208, 224, 237])
def test_every_warp_of_a_tall_narrow_image_equals_torchvision(height):
    cells = [cell for cell in CELLS if 1 <= cell[0] <= 5]
    assert_equals_torchvision(pictures("noise", (len(cells), 1, height, 96)), cells, static=False)


def test_frozen_magnitudes_equal_torchvisions_on_a_processor_with_vectors():
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("torch.linspace gives other last bits without AVX2")
    assert torch.equal(torch.tensor(tables.wide_magnitudes(31)), torch.linspace(0, 0.99, 31))
    assert tables.translations(31) == [int(t) for t in torch.linspace(0, 32, 31)]
    assert tables.rotations(31) == torch.linspace(0, 135, 31).tolist()
    assert tables.posterize_bits(31) == (8 - (torch.arange(31) / (30 / 6))).round().int().tolist()
    levels = torch.arange(256)
    for threshold, m in zip(tables.solarize_thresholds(31), torch.linspace(1, 0, 31), strict=True):
        assert torch.equal(levels >= threshold, levels >= 255.0 * float(m))
    assert tables.translations(31)[15] == 15


@pytest.mark.parametrize("num_bins", [2, 5, 10, 16, 30, 32, 61])
def test_other_numbers_of_bins_run_from_nothing_to_the_widest(num_bins):
    assert tables.wide_magnitudes(num_bins)[0] == 0
    assert tables.wide_magnitudes(num_bins)[-1] == tables.wide_magnitudes(31)[-1]
    assert (tables.translations(num_bins)[0], tables.translations(num_bins)[-1]) == (0, 32)
    assert (tables.rotations(num_bins)[0], tables.rotations(num_bins)[-1]) == (0, 135)
    assert (tables.posterize_bits(num_bins)[0], tables.posterize_bits(num_bins)[-1]) == (8, 2)
    assert (tables.solarize_thresholds(num_bins)[0], tables.solarize_thresholds(num_bins)[-1]) == (255, 0)
    near = torch.linspace(0, 0.99, num_bins)
    torch.testing.assert_close(torch.tensor(tables.wide_magnitudes(num_bins)), near, rtol=2e-7, atol=0)
    module = TrivialAugment(num_bins=num_bins)
    plan = module.plan(sample_keys(0, 0, range(4000)))
    assert plan.magnitude_bin.unique().tolist() == list(range(num_bins))
    assert module(pictures("noise", (8, 3, 8, 8))).shape == (8, 3, 8, 8)


def test_operations_have_torchvisions_names_in_its_order():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    assert list(v2.TrivialAugmentWide._AUGMENTATION_SPACE) == list(TrivialAugment.OPS)


@pytest.mark.parametrize("seed", [0, 7, 12345])
def test_operation_bin_and_sign_are_uniform_and_independent_with_a_users_seed(seed):
    plan = TrivialAugment().plan(sample_keys(seed, 3, range(300_000)))
    assert_flat((plan.op * 31 + plan.magnitude_bin) * 2 + plan.negative, 868)


def test_a_sample_alone_in_another_order_or_on_another_rank_gives_the_same_pixels():
    module, images = TrivialAugment(), pictures("noise", (48, 3, 20, 24))
    keys = sample_keys(1, 2, range(1000, 1048))
    whole, order = module(images, keys), torch.randperm(48)
    assert torch.equal(module(images[order], keys[order]), whole[order])
    for world in (2, 4):
        parts = [module(i, k) for i, k in zip(images.chunk(world), keys.chunk(world), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    alone = [module(images[i : i + 1], keys[i : i + 1]) for i in range(48)]
    assert torch.equal(torch.cat(alone), whole)


def test_epochs_differ():
    module, images = TrivialAugment(), pictures("noise", (64, 3, 16, 16))
    assert not torch.equal(module(images, sample_keys(0, 0, range(64))), module(images, sample_keys(0, 1, range(64))))


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 512])
def test_any_batch_keeps_shape_and_dtype(batch):
    images = pictures("noise", (batch, 3, 9, 11))
    out = TrivialAugment()(images)
    assert out.shape == images.shape
    assert out.dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_in_channels_last_out(channels):
    module, images = TrivialAugment(), pictures("noise", (40, channels, 12, 10))
    keys = sample_keys(0, 0, range(40))
    last = images.contiguous(memory_format=torch.channels_last)
    out = module(last, keys)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, module(images, keys))
    assert torch.equal(module(images.transpose(2, 3), keys), module(images.transpose(2, 3).contiguous(), keys))


def test_keys_come_from_the_generator_where_none_are_given():
    module, images = TrivialAugment(), pictures("noise", (16, 3, 8, 8))
    one, two = (module(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_images_equal_the_uint8_result_divided_by_255(dtype):
    levels, plan = pictures("noise", (len(CELLS), 3, 16, 18)), plan_of(CELLS)
    images, module = (levels / 255).to(dtype), TrivialAugment()
    rounded = (images.float() * 255).round().to(torch.uint8)
    out = module.apply(images, plan)
    assert out.dtype == dtype
    assert torch.equal(out, (module.apply(rounded, plan).float() / 255).to(dtype))
    if dtype not in (torch.bfloat16,):
        assert torch.equal(rounded, levels)


@pytest.mark.parametrize("value", [-0.01, 1.01, 200.0, float("nan"), float("inf")])
def test_floating_images_outside_zero_to_one_are_refused_on_the_cpu(value):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match=r"finite and in \[0, 1\]"):
        TrivialAugment()(images)


def test_fill_stands_outside_the_image():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    plan = plan_of([(3, 30, 0), (3, 5, 1)])
    whole = TrivialAugment(fill=(1, 2, 3)).apply(images, plan)
    assert torch.equal(whole[0], torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    assert torch.equal(whole[1, :, 0, -5:], torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1).expand(3, 5))
    assert whole[1, :, :, :3].eq(0).all()


@pytest.mark.parametrize("fill", [0, 77, (10, 20, 250)])
def test_fill_equals_torchvisions_with_nearest(fill):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, angles = pictures("noise", (31, 3, 21, 17)), tables.rotations(31)
    ours = TrivialAugment(fill=fill).apply(images, plan_of([(5, b, 0) for b in range(31)]))
    theirs = [v2.functional.rotate(i, a, fill=fill) for i, a in zip(images, angles, strict=True)]
    assert torch.equal(ours, torch.stack(theirs))


def test_bilinear_differs_from_torchvision_by_one_level_on_few_pixels():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, angles = pictures("noise", (31, 3, 40, 36)), tables.rotations(31)
    ours = TrivialAugment(interpolation="bilinear").apply(images, plan_of([(5, b, 0) for b in range(31)]))
    mode = v2.InterpolationMode.BILINEAR
    theirs = torch.stack([v2.functional.rotate(i, a, mode) for i, a in zip(images, angles, strict=True)])
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert difference.double().mean() < 2e-3


def test_a_bilinear_fill_equal_to_the_image_leaves_it_as_it_is():
    images = torch.full((310, 3, 24, 20), 200, dtype=torch.uint8)
    cells = [cell for cell in CELLS if 1 <= cell[0] <= 5]
    assert TrivialAugment(interpolation="bilinear", fill=200).apply(images, plan_of(cells)).eq(200).all()


def test_a_plan_made_by_hand_is_carried_out():
    module, images = TrivialAugment(), pictures("noise", (6, 3, 8, 8))
    plan = module.plan(sample_keys(0, 0, range(6)))
    nothing = dataclasses.replace(plan, op=torch.zeros(6, dtype=torch.int64))
    assert torch.equal(module.apply(images, nothing), images)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"op": torch.full((2,), 14)}, ValueError, r"plan.op must lie in \[0, 14\), got 14"),
        ({"op": torch.tensor([0, -1])}, ValueError, "plan.op must lie in"),
        ({"magnitude_bin": torch.full((2,), 31)}, ValueError, r"plan.magnitude_bin must lie in \[0, 31\)"),
        ({"op": torch.zeros(3, dtype=torch.int64)}, ValueError, r"plan.op must have shape \[2\]"),
        ({"op": torch.zeros(2)}, TypeError, "plan.op must be torch.int64"),
        ({"negative": torch.zeros(2, dtype=torch.int64)}, TypeError, "plan.negative must be torch.bool"),
    ],
)
def test_plans_that_cannot_be_are_refused(change, error, words):
    module, images = TrivialAugment(), pictures("noise", (2, 3, 8, 8))
    plan = dataclasses.replace(module.plan(sample_keys(0, 0, range(2))), **change)
    with pytest.raises(error, match=words):
        module.apply(images, plan)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_bins": 1}, ValueError, "num_bins=1 is below 2"),
        ({"num_bins": 31.0}, TypeError, "num_bins=31.0 is a float"),
        ({"interpolation": "bicubic"}, ValueError, "interpolation='bicubic' is unknown"),
        ({"fill": 256}, ValueError, r"fill must be integer levels in \[0, 255\]"),
        ({"fill": 0.5}, ValueError, "fill must be integer levels"),
        ({"fill": (1, 2)}, TypeError, "fill must be a number, or one per channel"),
        ({"fill": "black"}, TypeError, "fill must be"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, error, words):
    with pytest.raises(error, match=words):
        TrivialAugment(**settings)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "uint8 or floating"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, "must be NCHW"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), ValueError, "1 or 3 channels, got 4"),
    ],
)
def test_wrong_images_are_refused(images, error, words):
    with pytest.raises(error, match=words):
        TrivialAugment()(images)


def test_a_fill_of_three_channels_refuses_grey_images():
    with pytest.raises(ValueError, match="fill has 3 channels"):
        TrivialAugment(fill=(1, 2, 3))(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("keys", "error"), [(torch.zeros(3, dtype=torch.int64), ValueError), (torch.zeros(2, dtype=torch.int32), TypeError)]
)
def test_wrong_keys_are_refused(keys, error):
    with pytest.raises(error, match="keys must"):
        TrivialAugment()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), keys)


def test_casting_the_module_does_not_change_a_pixel():
    module, images, plan = TrivialAugment(), pictures("noise", (len(CELLS), 3, 12, 12)), plan_of(CELLS)
    before = module.apply(images, plan)
    assert torch.equal(module.bfloat16().apply(images, plan), before)
    assert module.state_dict() == {}


def test_a_function_is_still_applied_to_every_module():
    seen = []
    module = TrivialAugment()
    assert module.apply(seen.append) is module
    assert seen == [module]


def test_one_module_serves_images_of_changing_sizes():
    module, cells = TrivialAugment(), [cell for cell in CELLS if 1 <= cell[0] <= 5]
    for size in ((16, 16), (20, 12), (16, 16)):
        images = pictures("noise", (len(cells), 3, *size))
        assert torch.equal(module.apply(images, plan_of(cells)), TrivialAugment().apply(images, plan_of(cells)))
