"""Counted operations equal those on paper, and a device's peak is its data sheet's."""

import pytest
import torch
from torch import nn

from robust_dist.measure.dispatch import training_flops
from robust_dist.measure.gpus import peak_tflops
from robust_dist.models import build_model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8, bias=False)

    def forward(self, images):
        tokens = self.project(images.flatten(1, 2)).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum((1, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.second(self.first(images.flatten(1)))


@pytest.mark.parametrize(
    ("model", "shape", "products"),
    [
        # The images need no gradient, so the first layer's backward pass has one product and not two.
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4)), (3, 2, 2), 2 * 12 * 5 + 3 * 5 * 4),
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()), (3, 5, 5), 2 * 9 * 27 * 4),
        # 16 tokens of width 8: the projection, then two products of attention, each with two more backward.
        (Attention(), (1, 16, 8), 2 * 16 * 8 * 8 + 3 * 2 * 16 * 16 * 8),
        (Tied(), (1, 2, 4), 2 * 64 + 3 * 64),
    ],
)
def test_counted_operations_are_those_on_paper(model, shape, products):
    assert training_flops(model, shape) == 2 * products


def test_counting_leaves_model_and_random_numbers_as_they_were():
    model = build_model("resnet8", 10).train()
    model.stage1.eval() if hasattr(model, "stage1") else next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    training_flops(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(drawn)


@pytest.mark.parametrize(
    ("name", "mixed", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "no", 156),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-PCIE-32GB", "no", 14),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("AMD Instinct MI250X", "bf16", 191.5),
        # Neighbours in name alone, and a part of a device.
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp8", None),
    ],
)
def test_a_known_device_has_its_data_sheet_s_peak_and_any_other_none(name, mixed, tflops):
    assert peak_tflops(name, mixed) == tflops
