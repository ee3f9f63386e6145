"""Activations of the plan beside those of a real pass."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_dist.measure.dispatch import LiveBytes
from robust_dist.models import build_model
from robust_dist.optim.foreach import foreach
from robust_dist.optim.settings import DEFAULTS, hyper
from robust_dist.optim.tensors import TensorLists
from robust_dist.plan.choose import step_temporaries, variants
from robust_dist.plan.profile import build_on_meta, profile, profile_for, read_shapes
from robust_dist.plan.question import Question


@pytest.mark.parametrize(
    ("name", "size", "autocast"),
    [("resnet18", 64, None), ("timm/vit_tiny_patch16_224", 224, None), ("resnet20", 32, torch.bfloat16)],
)
def test_live_bytes_are_those_of_a_real_pass(name, size, autocast):
    batch = 3
    model = build_model(name, 10)
    tracker = LiveBytes()
    tracker.ignore([*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with tracker:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(torch.zeros(batch, 3, size, size))
        loss = nn.functional.cross_entropy(logits.float(), torch.rand(batch, 10), reduction="sum")
        del logits
        loss.backward()
    assert profile(name, 10, size, autocast=autocast).live(batch) == pytest.approx(tracker.peak, rel=0.02)


def test_flops_are_torch_s_count_of_both_passes():
    # ResNet-18 has 1.82 GMAC at 224 (He et al. 2016, table 1); the backward pass takes two forward passes more,
    # less one for the images, whose gradient nobody needs.
    found = profile("resnet18", 1000, 224).flops(1)
    assert found == pytest.approx(2 * 3 * 1.82e9, rel=0.03)


def test_options_that_are_lists_are_planned():
    dilated = Question("resnet50", image_size=64, batch_size=8, options={"replace_stride_with_dilation": [0, 0, 1]})
    plain, variant = replace(dilated, options={}), variants()[0]
    assert profile_for(variant, dilated).flops(1) > profile_for(variant, plain).flops(1)
    assert profile_for(variant, dilated) is profile_for(variant, dilated)


def test_the_step_s_temporaries_are_those_of_the_foreach_backend():
    numels = (300_000, 70_000, 5)
    rows = [[torch.empty(n, device="meta") for n in numels] for _ in range(4)]
    batch = TensorLists(*rows, [], 100.0)
    with LiveBytes() as tracker:
        foreach(batch, hyper(DEFAULTS))
    assert tracker.peak == step_temporaries(sum(numels))


def test_units_are_accelerate_s():
    accelerate = pytest.importorskip("accelerate.utils.fsdp_utils")
    model = build_on_meta("resnet18", 10)
    names = {module: name for name, module in model.named_modules()}
    order = accelerate.get_module_children_bottom_up(model)
    large = [names[m] for m in order[:-1] if sum(p.numel() for p in m.parameters()) > 1_000_000]
    shapes = read_shapes(model)
    left = [unit.name for unit in shapes.units if not unit.stays]
    assert left == [name for name in large if name in left]
    if find_final_norm := getattr(accelerate, "_find_final_norm", None):  # Before Accelerate 1.14 it was the root's.
        assert [unit.name for unit in shapes.units if unit.stays] == [names[find_final_norm(model)], ""]
    assert sum(unit.numel for unit in shapes.units) == shapes.numel == sum(p.numel() for p in model.parameters())
