"""Masks move as the images of their keys do, with values that were there before or the fill."""

import dataclasses

import pytest
import torch

from robust_dist.augment import (
    CutMix,
    RandomCrop,
    RandomHorizontalFlip,
    RobustAugment,
    TrivialAugment,
    augment_masks,
    follow,
    sample_keys,
)
from tests.augment.reference import CELLS, pictures, plan_of, torchvision_op

SIZE = (20, 26)


def make(**settings):
    return RobustAugment(10, SIZE, (0.5,) * 3, (0.25,) * 3, **settings)


def classes(batch, dtype=torch.uint8):
    """Masks [B, H, W] of large patches of 20 classes."""
    patches = torch.randint(0, 20, (batch, 5, 7), generator=torch.Generator().manual_seed(0))
    return patches.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : SIZE[0], : SIZE[1]].contiguous().to(dtype)


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("size", [(1, 24, 24), (2, 17, 30)])
def test_every_warp_of_every_bin_and_sign_equals_torchvisions_on_masks(size, fill):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    maps = pictures("noise", (len(CELLS), *size)) % 20
    ours = follow.warp_masks(TrivialAugment(), maps, plan_of(CELLS), fill)
    for one, before, cell in zip(ours, maps, CELLS, strict=True):
        if 1 <= cell[0] <= 5:
            assert torch.equal(one, torchvision_op(tv_tensors.Mask(before), *cell, fill=fill)), cell
        else:
            assert torch.equal(one, before), cell


@pytest.mark.parametrize("settings", [{}, {"cutmix_mode": "batch"}, {"cutmix": False}, {"crop": None}, {"flip": False}])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_masks_move_as_images_of_the_same_keys_do(settings, interpolation):
    augment, keys, maps = (
        make(fill=7, interpolation=interpolation, **settings),
        sample_keys(3, 1, range(64)),
        classes(64),
    )
    expected = maps.unsqueeze(1)
    for stage in (augment.crop, augment.flip):
        expected = expected if stage is None else stage(expected, keys)
    plan = augment.trivial.plan(keys)
    warps = torch.where((plan.op >= 1) & (plan.op <= 5), plan.op, 0)
    expected = TrivialAugment(fill=7).apply(expected, dataclasses.replace(plan, op=warps))
    if augment.cutmix is not None:
        expected = augment.cutmix(expected, torch.zeros(64, dtype=torch.int64), keys)[0]
    ours = augment_masks(augment, maps, keys, fill=7)
    assert torch.equal(ours, expected.squeeze(1))
    assert not torch.equal(ours, maps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_every_integer_dtype_moves_alike(dtype):
    augment, keys, maps = make(), sample_keys(0, 0, range(32)), classes(32) % 2
    ours = augment_masks(augment, maps.to(dtype), keys, fill=1)
    assert ours.dtype == dtype
    assert torch.equal(ours.to(torch.uint8), augment_masks(augment, maps, keys, fill=1))


def test_a_fill_below_zero_marks_what_the_loss_ignores():
    augment, keys = make(cutmix=False, trivial=False), sample_keys(0, 0, range(32))
    ours = augment_masks(augment, classes(32, torch.int64) + 1, keys, fill=-100)
    assert set(ours.unique().tolist()) == {-100, *range(1, 21)}


def test_masks_of_several_objects_move_together():
    augment, keys, maps = make(cutmix=False), sample_keys(0, 0, range(16)), classes(48).view(16, 3, *SIZE)
    each = [augment_masks(augment, maps[:, i], keys) for i in range(3)]
    assert torch.equal(augment_masks(augment, maps, keys), torch.stack(each, 1))


@pytest.mark.parametrize("stage", [RandomCrop(3), RandomHorizontalFlip(), CutMix(10, mode="elem")])
def test_a_stage_alone_moves_masks_as_its_images(stage):
    keys, maps = sample_keys(0, 0, range(16)), classes(16)
    labels = (torch.zeros(16, dtype=torch.int64),) if isinstance(stage, CutMix) else ()
    images = stage(maps.unsqueeze(1), *labels, keys)
    assert torch.equal(augment_masks(stage, maps, keys), (images[0] if labels else images).squeeze(1))


def test_compiled_code_without_a_look_at_values_gives_the_same_masks():
    augment, keys, maps = make(), sample_keys(0, 0, range(32)), classes(32)
    expected = augment_masks(augment, maps, keys, fill=255)
    compiled = torch.compile(augment_masks, fullgraph=True, backend="eager")
    assert torch.equal(compiled(augment, maps, keys, fill=255), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_masks_do_not_depend_on_the_world_size(world):
    augment, keys, maps = make(), sample_keys(0, 0, range(32)), classes(32)
    parts = [augment_masks(augment, m, k) for m, k in zip(maps.chunk(world), keys.chunk(world), strict=True)]
    assert torch.equal(torch.cat(parts), augment_masks(augment, maps, keys))


def test_in_eval_masks_stay_and_a_batch_of_none_passes():
    keys, maps = sample_keys(0, 0, range(8)), classes(8)
    assert torch.equal(augment_masks(make().eval(), maps, keys), maps)
    assert augment_masks(make(), maps[:0], keys[:0]).shape == (0, *SIZE)


def test_a_mask_of_torchvision_comes_back_as_one():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    keys, maps = sample_keys(0, 0, range(8)), classes(8)
    ours = augment_masks(make(), tv_tensors.Mask(maps), keys)
    assert type(ours) is tv_tensors.Mask
    assert torch.equal(ours, augment_masks(make(), maps, keys))


def of_class(name, *args, **settings):
    return getattr(pytest.importorskip("torchvision.tv_tensors"), name)(*args, **settings)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"masks": torch.zeros(2, *SIZE)}, TypeError, "masks must be class numbers.*float32: soft masks"),
        ({"masks": torch.zeros(2, 3, *SIZE).long()}, ValueError, "under CutMix, got 3 per sample"),
        ({"masks": torch.zeros(2, 8, 8).long()}, ValueError, r"the images' size \(20, 26\), got \(8, 8\)"),
        ({"masks": torch.zeros(*SIZE).long()}, ValueError, r"shape \[B, H, W\]"),
        ({"masks": torch.zeros(3, *SIZE).long()}, ValueError, "masks must match the samples of the keys, got 3"),
        ({"masks": [[0]]}, TypeError, "masks must be torch.Tensor or tv_tensors.Mask, got list"),
        ({"masks": lambda: of_class("Video", torch.zeros(2, 3, 3, *SIZE))}, TypeError, "got Video"),
        ({"masks": lambda: of_class("Image", torch.zeros(2, 3, *SIZE))}, TypeError, "got Image"),
        ({"fill": 256}, ValueError, r"fill of torch.uint8 masks must be in \[0, 255\], got 256"),
        ({"fill": (0, 0, 0)}, TypeError, "fill of masks must be an integer"),
        ({"keys": torch.zeros(2)}, TypeError, "keys must be torch.int64"),
        ({"augment": torch.nn.Identity()}, TypeError, "augment must be a RobustAugment or one of .*, got Identity"),
    ],
)
def test_what_cannot_follow_is_refused_by_name(change, error, words):
    given = {"augment": make(), "masks": classes(2), "keys": sample_keys(0, 0, range(2)), "fill": 0} | change
    given["masks"] = given["masks"]() if callable(given["masks"]) else given["masks"]
    with pytest.raises(error, match=words):
        augment_masks(given["augment"], given["masks"], given["keys"], fill=given["fill"])


@pytest.mark.gpu
def test_on_a_device_nothing_waits_and_the_masks_are_the_processors():
    augment, keys, maps = make(), sample_keys(0, 0, range(32)), classes(32)
    module, given = make().cuda(), (maps.cuda(), keys.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = augment_masks(module, *given, fill=255)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ours.cpu(), augment_masks(augment, maps, keys, fill=255))
