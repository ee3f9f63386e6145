"""Boxes move as the images of their keys do: as torchvision's, and never back from nothing."""

import pytest
import torch

from robust_dist.augment import (
    RandomCrop,
    RandomHorizontalFlip,
    RobustAugment,
    TrivialAugment,
    augment_boxes,
    augment_masks,
    follow,
    sample_keys,
)
from tests.augment.reference import CELLS, plan_of, torchvision_op

tv_tensors = pytest.importorskip("torchvision.tv_tensors")
F = pytest.importorskip("torchvision.transforms.v2.functional")
SIZE = (30, 40)
FORMATS = ["XYXY", "XYWH", "CXCYWH"]


def make(**settings):
    return RobustAugment(10, SIZE, (0.5,) * 3, (0.25,) * 3, **{"cutmix": False, **settings})


def corners(batch, number=3, seed=0, least=4):
    """Whole boxes [B, N, 4] inside the canvas, at least `least` pixels wide and high."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([SIZE[1], SIZE[0]])
    size = least + torch.rand(batch, number, 2, generator=generator) * (room / 2 - least)
    start = torch.rand(batch, number, 2, generator=generator) * (room - size)
    return torch.cat([start, start + size], 2).floor()


def wrapped(boxes, box_format="XYXY"):
    whole = tv_tensors.BoundingBoxes(boxes.flatten(0, -2), format="XYXY", canvas_size=SIZE)
    return F.convert_bounding_box_format(whole, new_format=box_format)


@pytest.mark.parametrize("box_format", FORMATS)
def test_every_warp_of_every_bin_and_sign_equals_torchvisions(box_format):
    cells = [cell for cell in CELLS if cell[0] <= 5]
    boxes, trivial = corners(len(cells)), TrivialAugment()
    moved = follow.warp_corners(trivial, boxes.double(), plan_of(cells), SIZE)
    settled = follow.settle(boxes.double(), moved, SIZE)
    for one, before, cell in zip(settled, boxes, cells, strict=True):
        theirs = torchvision_op(wrapped(before, box_format), *cell)
        ours = follow.from_corners(one, box_format, torch.float32)
        torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), rtol=0, atol=2e-4)


@pytest.mark.parametrize("box_format", FORMATS)
def test_the_pipeline_moves_boxes_as_torchvisions_crop_flip_and_warp(box_format):
    augment, keys, boxes = make(crop=5), sample_keys(4, 2, range(100)), corners(100)
    crop, flip, trivial = (stage.plan(keys) for stage in (augment.crop, augment.flip, augment.trivial))
    given = follow.from_corners(boxes.double(), box_format, torch.float32)
    ours, keep = augment_boxes(augment, given, keys, box_format=box_format)
    compared = 0
    for i in range(100):
        theirs = F.crop(wrapped(boxes[i], box_format), int(crop.top[i]) - 5, int(crop.left[i]) - 5, *SIZE)
        theirs = F.horizontal_flip(theirs) if flip.flip[i] else theirs
        if 1 <= trivial.op[i] <= 5:
            theirs = torchvision_op(theirs, int(trivial.op[i]), int(trivial.magnitude_bin[i]), int(trivial.negative[i]))
        plain = theirs.as_subclass(torch.Tensor)
        torch.testing.assert_close(ours[i][keep[i]], plain[keep[i]], rtol=0, atol=2e-4)
        compared += int(keep[i].sum())
    assert compared > 200


def test_a_moved_box_holds_the_pixels_of_its_moved_object():
    augment, keys, boxes = make(), sample_keys(0, 0, range(100)), corners(100, 1)
    x, y = torch.arange(SIZE[1]), torch.arange(SIZE[0])
    x1, y1, x2, y2 = boxes.unbind(-1)
    maps = ((x >= x1) & (x < x2)).unsqueeze(1) & ((y >= y1) & (y < y2)).unsqueeze(2)
    moved, (ours, keep) = augment_masks(augment, maps, keys), augment_boxes(augment, boxes, keys)
    for mask, box, kept in zip(moved, ours[:, 0], keep[:, 0], strict=True):
        if not kept:
            assert mask.sum() <= max(SIZE)
            continue
        row, column = mask.nonzero().unbind(1)
        seen = torch.stack([column.min(), row.min(), column.max() + 1, row.max() + 1])
        assert (seen[:2] >= box[:2] - 1).all()
        assert (seen[2:] <= box[2:] + 1).all()


def test_without_area_is_without_area_for_ever_and_keep_is_torchvisions_rule():
    augment, keys = make(crop=20), sample_keys(0, 0, range(200))
    boxes = torch.cat(
        [corners(200, 4, least=1), torch.zeros(200, 1, 4), torch.tensor([[[9.0, 9, 5, 20]]]).expand(200, 1, 4)], 1
    )
    ours, keep = augment_boxes(augment, boxes, keys)
    assert not keep[:, 4:].any()
    assert torch.equal(ours[:, 4:], boxes[:, 4:])
    assert 0.2 < float(keep[:, :4].float().mean()) < 0.95
    for some, kept in zip(ours, keep, strict=True):
        assert torch.equal(F.sanitize_bounding_boxes(wrapped(some))[1], kept)
    cropped = augment_boxes(augment.crop, boxes, keys, canvas_size=SIZE)[0]
    gone = ~(cropped[..., 2:] > cropped[..., :2]).all(-1)
    assert gone[:, :4].any()
    assert not keep[gone].any()


@pytest.mark.parametrize("box_format", FORMATS)
def test_bounding_boxes_of_torchvision_give_what_padded_ones_give(box_format):
    augment, keys, boxes = make(), sample_keys(0, 0, range(6)), corners(6, 4)
    counts = [4, 0, 1, 3, 4, 2]
    given = [wrapped(b[:n], box_format) for b, n in zip(boxes, counts, strict=True)]
    padded, padded_keep = augment_boxes(augment, boxes, keys)
    ours, keep = augment_boxes(augment, given, keys)
    for i, n in enumerate(counts):
        assert type(ours[i]) is tv_tensors.BoundingBoxes
        assert ours[i].format.name == box_format
        assert ours[i].canvas_size == SIZE
        back = F.convert_bounding_box_format(ours[i], new_format="XYXY").as_subclass(torch.Tensor)
        torch.testing.assert_close(back, padded[i, :n], rtol=0, atol=1e-4)
        assert torch.equal(keep[i], padded_keep[i, :n])


def test_no_boxes_and_no_samples_pass():
    keys = sample_keys(0, 0, range(4))
    assert augment_boxes(make(), torch.zeros(4, 0, 4), keys)[0].shape == (4, 0, 4)
    assert augment_boxes(make(), torch.zeros(0, 3, 4), keys[:0])[1].shape == (0, 3)
    assert augment_boxes(make(), [], keys[:0]) == ([], [])


def test_integers_come_back_rounded():
    augment, keys, boxes = make(), sample_keys(0, 0, range(50)), corners(50)
    ours = augment_boxes(augment, boxes.long(), keys)[0]
    assert ours.dtype == torch.int64
    assert torch.equal(ours, augment_boxes(augment, boxes, keys)[0].round().long())


def test_in_eval_boxes_stay_and_keep_still_says_which_are_whole():
    boxes = torch.tensor([[[1.0, 2, 9, 9], [5, 5, 5, 9], [30, 20, 50, 29]]])
    ours, keep = augment_boxes(make().eval(), boxes, sample_keys(0, 0, [0]))
    assert torch.equal(ours, boxes)
    assert keep.tolist() == [[True, False, False]]


@pytest.mark.parametrize("stage", [RandomCrop(3), RandomHorizontalFlip(), TrivialAugment()])
def test_stages_alone_in_turn_are_the_pipeline(stage):
    keys, boxes = sample_keys(0, 0, range(30)), corners(30)
    off = {"crop": 3 if isinstance(stage, RandomCrop) else None, "flip": isinstance(stage, RandomHorizontalFlip)}
    whole = make(trivial=isinstance(stage, TrivialAugment), **off)
    for ours, theirs in zip(
        augment_boxes(stage, boxes, keys, canvas_size=SIZE), augment_boxes(whole, boxes, keys), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_padded_boxes_compile_into_one_graph():
    augment, keys, boxes = make(), sample_keys(0, 0, range(16)), corners(16)
    compiled = torch.compile(augment_boxes, fullgraph=True, backend="eager")
    for ours, eager in zip(compiled(augment, boxes, keys), augment_boxes(augment, boxes, keys), strict=True):
        assert torch.equal(ours, eager)


def rotated(box_format):
    size = 8 if box_format == "XYXYXYXY" else 5
    try:
        return tv_tensors.BoundingBoxes(torch.ones(1, size), format=box_format, canvas_size=SIZE)
    except KeyError:
        pytest.skip("this torchvision has no rotated boxes")


def key_points():
    if not hasattr(tv_tensors, "KeyPoints"):
        pytest.skip("this torchvision has no key points")
    return tv_tensors.KeyPoints(torch.ones(1, 2), canvas_size=SIZE)


@pytest.mark.parametrize(
    ("boxes", "settings", "error", "words"),
    [
        (lambda: torch.zeros(1, 2, 4), {"cutmix": True}, ValueError, "boxes do not support CutMix.*set cutmix=False"),
        (lambda: [rotated("XYWHR")], {}, ValueError, "got XYWHR: rotated boxes are not supported"),
        (lambda: [rotated("XYXYXYXY")], {}, ValueError, "rotated boxes are not supported"),
        (lambda: [key_points()], {}, TypeError, "got KeyPoints"),
        (lambda: [torch.zeros(1, 4)], {}, TypeError, "must be tv_tensors.BoundingBoxes, got Tensor"),
        (lambda: torch.zeros(1, 4), {}, ValueError, r"boxes must have shape \[B, N, 4\]"),
        (lambda: torch.zeros(1, 2, 5), {}, ValueError, r"boxes must have shape \[B, N, 4\]"),
        (lambda: torch.zeros(2, 2, 4), {}, ValueError, "boxes must match the samples of the keys, got 2"),
        (lambda: torch.zeros(1, 2, 4).bool(), {}, TypeError, "boxes must be floating-point or integers"),
        (lambda: [wrapped(torch.zeros(1, 4))], {"size": (8, 8)}, ValueError, r"the canvas_size.*\(8, 8\), \(30, 40\)"),
    ],
)
def test_what_cannot_follow_is_refused_by_name(boxes, settings, error, words):
    augment = RobustAugment(10, settings.get("size", SIZE), [0.5], [0.2], cutmix=settings.get("cutmix", False))
    with pytest.raises(error, match=words):
        augment_boxes(augment, boxes(), sample_keys(0, 0, [0]))


def test_a_stage_needs_the_canvas_and_a_format_must_be_known():
    with pytest.raises(ValueError, match="pass canvas_size"):
        augment_boxes(TrivialAugment(), torch.zeros(1, 2, 4), sample_keys(0, 0, [0]))
    with pytest.raises(ValueError, match="box_format must be one of XYXY, XYWH, CXCYWH, got YXYX"):
        augment_boxes(make(), torch.zeros(1, 2, 4), sample_keys(0, 0, [0]), box_format="YXYX")


@pytest.mark.gpu
def test_on_a_device_nothing_waits_and_the_boxes_are_the_processors():
    augment, keys, boxes = make(), sample_keys(0, 0, range(32)), corners(32)
    module, given = make().cuda(), (boxes.cuda(), keys.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours, keep = augment_boxes(module, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, kept = augment_boxes(augment, boxes, keys)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)
    assert torch.equal(keep.cpu(), kept)
