"""torchvision's calls with our draws: any structure in, the same structure out, a draw for every sample."""

import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from robust_dist.augment import TrivialAugment, random_keys, tables
from tests.augment.reference import pictures

tv_tensors = pytest.importorskip("torchvision.tv_tensors")
torchvision_v2 = pytest.importorskip("torchvision.transforms.v2")
F = torchvision_v2.functional
v2 = pytest.importorskip("robust_dist.augment.v2")
SIZE = (20, 26)
TRIVIAL = TrivialAugment()


def noise(*lead, channels=3):
    return pictures("noise", (max(1, torch.Size(lead).numel()), channels, *SIZE)).view(*lead, channels, *SIZE)


def plan_of_seed(seed, batch):
    torch.manual_seed(seed)
    return TRIVIAL.plan(random_keys(batch))


def seed_of(op, batch=1):
    """A seed whose first sample gets this operation."""
    return next(seed for seed in range(1000) if plan_of_seed(seed, batch).op[0] == tables.OP[op])


def seeded(transform, seed, *inputs):
    torch.manual_seed(seed)
    return transform(*inputs)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_of_a_batch_gets_its_own_draw_and_trivial_augments_pixels(lead, channels):
    images = noise(*lead, channels=channels)
    flat = images.reshape(-1, channels, *SIZE)
    for seed in range(5):
        expected = TRIVIAL.apply(flat, plan_of_seed(seed, len(flat)))
        assert torch.equal(seeded(v2.TrivialAugmentWide(), seed, images), expected.view(images.shape))


def test_one_image_gets_torchvisions_pixels():
    image = noise()
    for op in ("Posterize", "Equalize", "AutoContrast"):
        seed = seed_of(op)
        magnitude = int(plan_of_seed(seed, 1).magnitude_bin)
        theirs = {
            "Posterize": lambda b=magnitude: F.posterize(image, tables.posterize_bits(31)[b]),
            "Equalize": lambda: F.equalize(image),
            "AutoContrast": lambda: F.autocontrast(image),
        }[op]()
        assert torch.equal(seeded(v2.TrivialAugmentWide(), seed, image), theirs)


def test_all_frames_of_a_video_get_one_draw():
    videos = tv_tensors.Video(noise(3, 4))
    ours = seeded(v2.TrivialAugmentWide(), 0, videos)
    assert type(ours) is tv_tensors.Video
    each = v2.TrivialAugmentWide()
    for frame in range(4):
        assert torch.equal(ours[:, frame], seeded(each, 0, videos.as_subclass(torch.Tensor)[:, frame]))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_pil_image_comes_back_as_one(mode, channels):
    image = noise(channels=channels)
    ours = seeded(v2.TrivialAugmentWide(), 3, F.to_pil_image(image))
    assert ours.mode == mode
    assert torch.equal(F.pil_to_tensor(ours), seeded(v2.TrivialAugmentWide(), 3, image))


def sample_with(image, *, boxes=1):
    box = [tv_tensors.BoundingBoxes([[3, 4, 9, 12]], format="XYWH", canvas_size=SIZE) for _ in range(boxes)]
    mask = torch.randint(0, 9, (*image.shape[:-3], *SIZE), dtype=torch.uint8)
    return {"image": image, "target": [tv_tensors.Mask(mask), box], "name": "a", "label": torch.tensor(3)}


@pytest.mark.parametrize("batch", [None, 5])
def test_any_structure_comes_back_with_its_types_and_masks_and_boxes_follow(batch):
    lead = () if batch is None else (batch,)
    sample = sample_with(tv_tensors.Image(noise(*lead)), boxes=batch or 2)
    seed = seed_of("Rotate", batch or 1)
    ours, plan = seeded(v2.TrivialAugmentWide(), seed, sample), plan_of_seed(seed, batch or 1)
    assert list(ours) == list(sample)
    assert ours["label"] is sample["label"]
    mask, boxes = ours["target"]
    assert [type(x) for x in (ours["image"], mask, *boxes)] == [
        tv_tensors.Image,
        tv_tensors.Mask,
        *[tv_tensors.BoundingBoxes] * len(boxes),
    ]
    assert torch.equal(ours["image"], TRIVIAL.apply(sample["image"].view(-1, 3, *SIZE), plan).view(ours["image"].shape))
    whole = tables.rotations(31)[int(plan.magnitude_bin[0])] * (-1 if plan.negative[0] else 1)
    first = sample["target"][0] if batch is None else sample["target"][0][0]
    assert torch.equal(mask if batch is None else mask[0], F.rotate(tv_tensors.Mask(first), whole))
    torch.testing.assert_close(boxes[0], F.rotate(sample["target"][1][0], whole), rtol=0, atol=1)


def test_empty_batches_and_images_without_objects_pass():
    empty = torch.zeros(0, 3, *SIZE, dtype=torch.uint8)
    assert v2.TrivialAugmentWide()(empty).shape == empty.shape
    images, targets = v2.CutMix(num_classes=4)(empty, torch.zeros(0, dtype=torch.int64))
    assert images.shape == empty.shape
    assert targets.shape == (0, 4)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=SIZE)
    none = (tv_tensors.Mask(torch.zeros(0, *SIZE, dtype=torch.bool)), boxes)
    for op in ("Rotate", "Equalize"):
        _, mask, ours = seeded(v2.TrivialAugmentWide(), seed_of(op), tv_tensors.Image(noise()), *none)
        assert mask.shape == (0, *SIZE)
        assert ours.shape == (0, 4)


def test_colours_leave_masks_and_boxes_alone():
    sample = sample_with(tv_tensors.Image(noise()))
    ours = seeded(v2.TrivialAugmentWide(), seed_of("Equalize"), sample)
    assert torch.equal(ours["target"][0], sample["target"][0])
    assert torch.equal(ours["target"][1][0], sample["target"][1][0])


def test_fills_are_chosen_by_type_and_in_the_images_units():
    image = torch.full((3, *SIZE), 50, dtype=torch.uint8)
    mask, seed = tv_tensors.Mask(torch.zeros(SIZE, dtype=torch.uint8)), seed_of("Rotate")
    fill = {tv_tensors.Image: (10, 20, 30), tv_tensors.Mask: 255, "others": 200}
    ours, follows = seeded(v2.TrivialAugmentWide(fill=fill), seed, tv_tensors.Image(image), mask)
    assert {tuple(p) for p in ours.flatten(1).t().tolist()} == {(50, 50, 50), (10, 20, 30)}
    assert set(follows.unique().tolist()) == {0, 255}
    assert torch.equal(follows == 255, ours[0] == 10)
    assert set(seeded(v2.TrivialAugmentWide(fill=fill), seed, image).unique().tolist()) == {50, 200}
    floating = seeded(v2.TrivialAugmentWide(fill=0.2), seed, image / 255)
    assert set((floating * 255).round().unique().tolist()) == {50, 51}


@pytest.mark.parametrize(
    "fill", [[123.675, 116.28, 103.53], 123.5, [0.5, 1.5, 2.5], [7.4], [np.float32(9.6)], {"others": 9.6}, None]
)
def test_a_fill_between_two_levels_is_rounded_as_torchvision_does(fill):
    image, seed = noise(), seed_of("Rotate")
    plan = plan_of_seed(seed, 1)
    angle = tables.rotations(31)[int(plan.magnitude_bin)] * (-1 if plan.negative else 1)
    plain = fill["others"] if isinstance(fill, dict) else fill
    theirs = F.rotate(image, angle, fill=list(map(float, plain)) if isinstance(plain, list) else plain)
    assert torch.equal(seeded(v2.TrivialAugmentWide(fill=fill), seed, image), theirs)


def test_a_fill_above_1_of_a_floating_image_is_refused_in_its_own_units():
    with pytest.raises(ValueError, match=r"fill of floating-point images must be in \[0, 1\].*got 255$"):
        v2.TrivialAugmentWide(fill=255)(torch.rand(3, *SIZE))


@pytest.mark.parametrize("interpolation", ["bilinear", 2, torchvision_v2.InterpolationMode.BILINEAR])
def test_bilinear_may_be_named_as_torchvision_names_it(interpolation):
    image, seed = noise(), seed_of("Rotate")
    expected = TrivialAugment(interpolation="bilinear").apply(image.unsqueeze(0), plan_of_seed(seed, 1))
    assert torch.equal(seeded(v2.TrivialAugmentWide(interpolation=interpolation), seed, image), expected.squeeze(0))


def test_it_stands_in_a_compose_is_torchvisions_class_and_survives_pickling():
    transform = pickle.loads(pickle.dumps(v2.TrivialAugmentWide(num_magnitude_bins=10, fill=3)))
    assert isinstance(transform, torchvision_v2.TrivialAugmentWide)
    assert repr(transform) == repr(torchvision_v2.TrivialAugmentWide(num_magnitude_bins=10, fill=3))
    compose = torchvision_v2.Compose([transform, torchvision_v2.ToDtype(torch.float32, scale=True)])
    image, label = compose((noise(), 3))
    assert image.dtype == torch.float32
    assert label == 3


def test_manual_seed_governs_and_calls_differ():
    images, transform = noise(32), v2.TrivialAugmentWide()
    assert torch.equal(seeded(transform, 1, images), seeded(transform, 1, images))
    assert not torch.equal(transform(images), transform(images))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: v2.TrivialAugmentWide(1), ValueError, "num_bins=1 is below 2"),
        (lambda: v2.TrivialAugmentWide(fill=256), ValueError, r"fill must be in \[0, 255\].*got 256"),
        (lambda: v2.TrivialAugmentWide(fill=float("nan")), ValueError, r"fill must be in \[0, 255\]"),
        (lambda: v2.TrivialAugmentWide(fill=(1, 2)), TypeError, r"one per channel \(1 or 3\), got \(1, 2\)"),
        (lambda: v2.TrivialAugmentWide(fill="black"), TypeError, "fill must be a number, or one per channel"),
        (lambda: v2.TrivialAugmentWide(fill={tv_tensors.Mask: 0.5}), TypeError, "fill of masks must be an integer"),
        (lambda: v2.TrivialAugmentWide(interpolation="bicubic"), ValueError, "interpolation must be"),
        (lambda: v2.TrivialAugmentWide()({"label": 3}), TypeError, "exactly one image, batch or video, got 0"),
        (lambda: v2.TrivialAugmentWide()([tv_tensors.Image(noise())] * 2), TypeError, "exactly one image.*got 2"),
        (lambda: v2.TrivialAugmentWide()(noise().float()), ValueError, r"finite and in \[0, 1\]"),
        (lambda: v2.TrivialAugmentWide()(noise()[0]), ValueError, "at least 3 dimensions"),
        (lambda: v2.TrivialAugmentWide()(F.to_pil_image(noise()).convert("RGBA")), ValueError, "got RGBA: convert"),
        (lambda: v2.TrivialAugmentWide()(noise(), tv_tensors.Mask(torch.zeros(SIZE))), TypeError, "soft masks"),
        (
            lambda: v2.TrivialAugmentWide()(noise(), tv_tensors.Mask(torch.zeros(4, 4).long())),
            ValueError,
            r"masks of these images must have shape \[..., 20, 26\]",
        ),
        (
            lambda: v2.TrivialAugmentWide(fill=(1, 2, 3))(noise(), tv_tensors.Mask(torch.zeros(SIZE).long())),
            TypeError,
            "fill of masks must be an integer",
        ),
        (
            lambda: v2.TrivialAugmentWide()(sample_with(tv_tensors.Image(noise(3)))),
            ValueError,
            "a batch of 3 images needs as many BoundingBoxes, in order, got 1",
        ),
        (
            lambda: v2.TrivialAugmentWide()(
                noise(), tv_tensors.BoundingBoxes([[1, 1, 2, 2]], format="XYXY", canvas_size=(4, 4))
            ),
            ValueError,
            "boxes must have the canvas_size",
        ),
    ],
)
def test_trivial_augment_refuses_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_key_points_are_refused_by_name():
    if not hasattr(tv_tensors, "KeyPoints"):
        pytest.skip("this torchvision has no key points")
    with pytest.raises(TypeError, match="Inputs of type KeyPoints are not supported by TrivialAugmentWide"):
        v2.TrivialAugmentWide()(noise(), tv_tensors.KeyPoints(torch.ones(1, 2), canvas_size=SIZE))


def name_tags(batch, *shape):
    return torch.arange(batch, dtype=torch.uint8).view(-1, *[1] * len(shape)).expand(batch, *shape).contiguous()


@pytest.mark.parametrize("wrap", [torch.Tensor, tv_tensors.Image, tv_tensors.Video])
def test_cutmix_shares_labels_by_the_pixels_of_images_and_masks(wrap):
    shape = (2, 3, *SIZE) if wrap is tv_tensors.Video else (3, *SIZE)
    images = name_tags(16, *shape) if wrap is torch.Tensor else wrap(name_tags(16, *shape))
    batch = {"images": images, "labels": torch.arange(16), "masks": tv_tensors.Mask(name_tags(16, *SIZE)), "id": "b"}
    ours = v2.CutMix(num_classes=16)(batch)
    assert type(ours["images"]) is type(images)
    assert type(ours["masks"]) is tv_tensors.Mask
    pixels = one_hot(ours["masks"].as_subclass(torch.Tensor).long().flatten(1), 16).double().mean(1)
    torch.testing.assert_close(ours["labels"].double(), pixels, rtol=0, atol=1e-6)
    assert torch.equal(ours["images"].as_subclass(torch.Tensor).view(16, -1, *SIZE)[:, 0], ours["masks"])
    assert (ours["labels"] > 0).sum(1).max() == 2
    assert len(ours["labels"].amax(1).unique()) > 4


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_shares_of_classes_are_mixed_as_class_numbers_are(mode):
    images, labels = name_tags(8, 3, *SIZE), torch.arange(8)
    transform = v2.CutMix(num_classes=8, mode=mode)
    hard, soft = seeded(transform, 1, images, labels)[1], seeded(transform, 1, images, one_hot(labels, 8))[1]
    torch.testing.assert_close(soft, hard)
    free = seeded(v2.CutMix(mode=mode), 1, images, one_hot(labels, 8).double() / 1)[1]
    torch.testing.assert_close(free, hard)


def test_it_collates_in_a_loader_and_stands_in_a_compose():
    samples = [(image, label) for label, image in enumerate(noise(8))]
    compose = torchvision_v2.Compose([v2.TrivialAugmentWide(), v2.CutMix(num_classes=8)])
    loader = torch.utils.data.DataLoader(
        samples, 4, collate_fn=lambda rows: compose(torch.utils.data.default_collate(rows))
    )
    for images, targets in loader:
        assert images.shape == (4, 3, *SIZE)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert isinstance(compose.transforms[1], torchvision_v2.CutMix)


MASK = {"images": name_tags(2, 3, *SIZE), "labels": torch.arange(2)}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((F.to_pil_image(noise()), torch.arange(2)), "does not support PIL images"),
        ({**MASK, "masks": tv_tensors.Mask(torch.zeros(2, *SIZE))}, "does not support .* floating-point masks"),
        ({**MASK, "masks": tv_tensors.Mask(torch.zeros(2, 5, *SIZE).long())}, "under CutMix, got 5 per sample"),
        ({**MASK, "masks": tv_tensors.Mask(torch.zeros(3, *SIZE).long())}, "as images, 2, got 3"),
        (
            {**MASK, "boxes": tv_tensors.BoundingBoxes([[1, 1, 2, 2]], format="XYXY", canvas_size=SIZE)},
            "does not support PIL images, bounding boxes",
        ),
        ((name_tags(2, 3, *SIZE), torch.tensor([0, 10])), r"labels must lie in \[0, num_classes\)"),
        ((name_tags(2, 3, *SIZE), torch.tensor([0.0, 1.0])), "must be integer class numbers, got torch.float32"),
        ((name_tags(2, 3, *SIZE), torch.arange(3)), "does not match the batch size of the labels"),
        ((name_tags(1, 2, 3, *SIZE), torch.arange(1)), "Expected a batched input with 4 dims"),
    ],
)
def test_cutmix_refuses_by_name(batch, words):
    with pytest.raises(ValueError, match=words):
        v2.CutMix(num_classes=10)(batch)
