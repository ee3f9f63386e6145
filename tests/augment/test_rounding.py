"""The arithmetic of blends and tables, over all of their cells, with and without a fused addcmul."""

import pytest
import torch

from robust_dist.augment import levels, tables

FUSED = levels._addcmul_is_fused()
SHAPES = {
    "all dense": ((4, 3, 5, 37), (4, 3, 5, 37)),
    "a channel and a number": ((4, 1, 5, 37), (4, 1, 1, 1)),
    "two numbers": ((4, 1, 1, 1), (4, 1, 1, 1)),
    "an image and a number": ((4, 3, 5, 37), (4, 1, 1, 1)),
}


@pytest.fixture(params=["addcmul", "float64"])
def _arithmetic(request, monkeypatch):
    if request.param == "addcmul" and not FUSED:
        pytest.skip("addcmul rounds twice on this processor")
    monkeypatch.setattr(levels, "_addcmul_is_fused", lambda: request.param == "addcmul")


@pytest.mark.usefixtures("_arithmetic")
def test_a_blend_equals_torchs_own_in_every_cell_of_level_grey_and_factor():
    level, grey = torch.arange(256.0).repeat_interleave(256), torch.arange(256.0).repeat(256)
    for f, rest in tables.signed_rows(tables.factor_table(31), tables.OP["Color"]).reshape(-1, 2):
        ours = levels.multiply_add(grey, rest.view(1), level * f)
        assert torch.equal(ours, level.mul(float(f)).add_(grey, alpha=float(rest)))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("_arithmetic")
def test_multiply_add_rounds_once_at_every_place_of_every_layout(shapes):
    a, b = (torch.rand(shape) * 256 for shape in shapes)
    c = torch.rand(4, 3, 5, 37) * 256 - 128
    assert torch.equal(levels.multiply_add(a, b, c), (a.double() * b.double() + c.double()).float())


def test_a_plain_product_and_sum_would_be_wrong():
    level, grey = torch.arange(256.0).repeat_interleave(256), torch.arange(256.0).repeat(256)
    factors = tables.signed_rows(tables.factor_table(31), tables.OP["Color"]).reshape(-1, 2)
    plain = [levels.to_levels(level * f + grey * rest) for f, rest in factors]
    fused = [levels.to_levels(level.mul(float(f)).add_(grey, alpha=float(rest))) for f, rest in factors]
    assert sum(int((p != q).sum()) for p, q in zip(plain, fused, strict=True)) > 100


@pytest.mark.usefixtures("_arithmetic")
def test_luma_equals_torchvisions_on_a_million_colours():
    f = pytest.importorskip("torchvision.transforms.v2.functional")
    colours = torch.randint(0, 256, (1, 3, 1000, 1000), dtype=torch.uint8)
    assert torch.equal(levels.luma(colours).to(torch.uint8), f.rgb_to_grayscale(colours))


def test_autocontrast_equals_torchvisions_for_every_pair_of_darkest_and_lightest():
    f = pytest.importorskip("torchvision.transforms.v2.functional")
    for low in range(256):
        high = torch.arange(low, 256)
        ramps = torch.arange(256).clamp(min=low).expand(len(high), 256).minimum(high.unsqueeze(1))
        images = ramps.to(torch.uint8).view(-1, 1, 1, 256)
        ours = levels.look_up(images, levels.autocontrast_lut(images))
        assert torch.equal(ours, f.autocontrast(images))


@pytest.mark.parametrize("pixels", [255, 256, 511, 1024, 5000])
def test_equalize_equals_torchvisions_for_skewed_histograms(pixels):
    f = pytest.importorskip("torchvision.transforms.v2.functional")
    power = torch.linspace(0.2, 6, 40).view(-1, 1, 1, 1)
    images = (torch.rand(40, 3, 1, pixels) ** power * 255).to(torch.uint8)
    assert torch.equal(levels.look_up(images, levels.equalize_lut(images)), f.equalize(images))


def test_a_quotient_is_rounded_once():
    a, b = torch.randint(0, 256, (10_000,)).float(), torch.rand(10_000) + 0.004
    assert torch.equal(levels.divide(a, b), (a.double() / b.double()).float())
