"""Under bf16 autocast images are written as bfloat16 if that changes no bit of a run."""

import pytest
import torch
from torch import nn

from robust_dist.models import build_model
from robust_dist.train.build import images_dtype
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import ModelConfig, PrecisionConfig
from tests.train.test_options import run_few


class Scaled(nn.Module):
    """Does arithmetic on images before its first layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 3)

    def forward(self, images):
        return self.layer((images * 2).flatten(1))


class Joined(nn.Linear):
    """Casts images in its layer, and also combines them with other tensors."""

    def __init__(self):
        super().__init__(192, 3)

    def forward(self, images):
        return super().forward(images.flatten(1)) + torch.stack([images, images]).mean()


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        (lambda: build_model("resnet8", 10, in_channels=3), 32, torch.bfloat16),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 8, torch.bfloat16),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), 8, torch.float32),
        (Scaled, 8, torch.float32),
        (Joined, 8, torch.float32),
        (lambda: nn.Linear(5, 3), 8, torch.float32),  # does not take such images at all
    ],
)
def test_images_are_bfloat16_where_the_model_only_casts_them(model, size, expected):
    built = model()
    assert images_dtype("bf16", built, 3, size) == expected
    assert built.training
    assert images_dtype("no", built, 3, size) == images_dtype("fp16", built, 3, size) == torch.float32


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_model_of_bfloat16_images_gives_the_bits_of_one_that_casts_them_later(channels_last):
    torch.manual_seed(0)
    model = build_model("resnet8", 10, in_channels=3)
    images = torch.randn(4, 3, 32, 32)
    if channels_last:
        model, images = (one.to(memory_format=torch.channels_last) for one in (model, images))
    found = []
    for given in (images, images.bfloat16()):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(given)
        out.float().square().sum().backward()
        found.append([out, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Seeing(nn.Module):
    """A ResNet that records the dtypes of its training images, and may add 0 to them before its first layer."""

    def __init__(self, adds):
        super().__init__()
        self.net, self.adds, self.seen = build_model("resnet8", 10, stem_stride=2), adds, set()

    def forward(self, images):
        if self.training:
            self.seen.add(images.dtype)
        return self.net(images + 0 if self.adds else images)


def test_a_run_under_bf16_has_the_losses_of_one_whose_images_are_cast_later(tmp_path):
    half, rows = {"batch_size": 32, "precision": PrecisionConfig(mixed="bf16")}, []
    for adds, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        torch.manual_seed(0)
        model = Seeing(adds)
        rows.append(run_few(tmp_path / str(adds), {"model": model}, model=ModelConfig(), **half))
        assert model.seen == {dtype}
    assert list(map(without_measured, rows[0])) == list(map(without_measured, rows[1]))
