"""model.channels_last: weights that an engine may shard are contiguous, yet convolutions run in channels_last."""

from pathlib import Path

import pytest
import torch
from torch import nn

from robust_dist.train.build import build_classifier
from robust_dist.train.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "cifar10_resnet34.yaml"


def last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("sharded", [False, True])
def test_images_alone_keep_every_convolution_in_channels_last(sharded):
    recipe = load_recipe(str(RECIPE))
    assert recipe.model.channels_last
    recipe.model.name = "resnet8"
    model = build_classifier(recipe, 10, 3, contiguous=sharded)
    wide = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert [last(p) for p in wide] == [not sharded] * len(wide)
    assert all(p.is_contiguous() for p in model.parameters()) == sharded
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, images, out: seen.append((last(images[0]), last(out))))
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert seen == [(True, True)] * 7
