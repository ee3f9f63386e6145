"""Every model in the registry: size, shapes, formats, and the error for a wrong name."""

import sys

import pytest
import torch
from torch import nn

from robust_dist.models import MODELS, build_model, model_names

SMALL = ["resnet8", "resnet20", "resnet18_cifar"]


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_registered_ones(name):
    with torch.device("meta"):
        assert num_parameters(build_model(name, 10)) == MODELS[name].num_parameters


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet56", 0.85), ("resnet18_cifar", 11.2), ("resnet34_cifar", 21.3)]
)
def test_parameter_counts_are_the_published_ones(name, millions):
    assert MODELS[name].num_parameters / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("resnet") and "_" not in n])
def test_depth_counts_the_layers_with_weights(name):
    with torch.device("meta"):
        layers = [m for m in build_model(name, 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_a_single_image_gets_one_row_of_logits(name, in_channels):
    model = build_model(name, 7, in_channels=in_channels).eval()
    logits = model(torch.randn(1, in_channels, 32, 32))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_logits_and_gradients(name):
    torch.manual_seed(0)
    model = build_model(name, 10).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = logits_and_gradient(model, images)
    last = torch.channels_last
    strided = logits_and_gradient(model.to(memory_format=last), images.to(memory_format=last))
    torch.testing.assert_close(strided, plain)


def logits_and_gradient(model, images):
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), [p.grad.contiguous() for p in model.parameters()]


def test_option_a_keeps_channels_last_through_the_shortcut():
    model = build_model("resnet8", 10).to(memory_format=torch.channels_last).eval()
    seen = []
    model.layer3.register_forward_hook(lambda m, args, out: seen.append(out))
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_trains_fp32_parameters(name):
    model = build_model(name, 10)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.to(memory_format=torch.channels_last)(images)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_option_a_takes_every_second_pixel_and_appends_zeros():
    block = build_model("resnet8", 10).layer2[0]
    x = torch.randn(2, 16, 6, 6)
    short = block._shortcut(x)
    assert torch.equal(short[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(short[:, 16:], torch.zeros(2, 16, 3, 3))


def test_a_stem_of_stride_2_halves_the_maps_and_keeps_the_parameters():
    model = build_model("resnet8", 10, in_channels=1, stem_stride=2)
    assert model.layer1(model.conv1(torch.zeros(2, 1, 28, 28))).shape == (2, 16, 14, 14)
    assert num_parameters(model) == num_parameters(build_model("resnet8", 10, in_channels=1))


def test_a_width_is_that_of_the_first_stage_and_an_mlp_names_the_size_it_takes():
    wide = build_model("resnet8", 10, width=32)
    assert [wide.layer1[0].conv2.out_channels, wide.layer3[0].conv2.out_channels] == [32, 128]
    assert build_model("mlp", 7, in_channels=1, side=8, width=5)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"mlp takes images of side=32, got \(2, 3, 28, 28\)"):
        build_model("mlp", 7)(torch.zeros(2, 3, 28, 28))


@pytest.mark.parametrize("stride", [0, -1, 1.5, True])
def test_a_bad_stem_stride_is_named(stride):
    with pytest.raises((TypeError, ValueError), match=r"stem_stride.* must be a whole number in range"):
        build_model("resnet8", 10, stem_stride=stride)


def test_convolutions_are_drawn_with_he_variance():
    torch.manual_seed(0)
    for name in ("resnet56", "resnet18_cifar"):
        for conv in (m for m in build_model(name, 10).modules() if isinstance(m, nn.Conv2d)):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


def test_the_cifar_stem_keeps_the_full_resolution_up_to_the_first_stage():
    model = build_model("resnet18_cifar", 10).eval()
    seen = []
    model.layer1.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]


def test_the_same_seed_gives_the_same_weights():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(build_model("resnet8", 10).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_name_of_torchvision_stays_torchvisions():
    with torch.device("meta"):
        model = build_model("resnet18", 5)
    assert model.conv1.kernel_size == (7, 7)
    assert model.fc.out_features == 5


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_with_auxiliary_heads_return_one_tensor_in_training(name, monkeypatch):
    with torch.device("meta"):
        model = build_model(name, 4, init_weights=False).train()
        assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)


def test_options_reach_torchvision():
    with torch.device("meta"):
        model = build_model("mobilenet_v3_small", 10, dropout=0.5)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5]


@pytest.mark.filterwarnings("ignore")
def test_timm_builds_by_prefix():
    pytest.importorskip("timm")
    model = build_model("timm/resnet10t", 6, in_channels=1, drop_rate=0.2).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 6)


@pytest.mark.parametrize("name", ["resnet65", "resnet18_cifr", "timm/resnet10x", "nothing_like_it"])
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_name_says_what_there_is(name):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=rf"unknown model '{name}'.*There are ours: resnet8.*torchvision.*timm/NAME"):
        build_model(name, 10)


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"Close: .*resnet18_cifar"):
        build_model("resnet18_cifr", 10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 0}, "num_classes=0 is below 1"),
        ({"num_classes": 10, "in_channels": 0}, "in_channels=0 is below 1"),
        ({"num_classes": 10, "dropuot": 0.1}, "'resnet8' does not take the options.*dropuot"),
    ],
)
def test_bad_settings_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        build_model("resnet8", **options)


def test_torchvisions_models_take_three_channels_only():
    with pytest.raises(ValueError, match="resnet18 takes in_channels=3, not 1"):
        build_model("resnet18", 10, in_channels=1)


@pytest.mark.filterwarnings("ignore")
def test_every_registered_name_is_listed():
    names = model_names()
    assert set(MODELS) | {"resnet18", "vit_b_16"} <= set(names)
    assert len(names) == len(set(names))


def test_without_timm_the_error_names_the_command_and_ours_still_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm: pip install 'robust_dist\[bench\]'"):
        build_model("timm/resnet10t", 10)
    assert "resnet8" in model_names()


def test_without_torchvision_our_small_models_still_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert num_parameters(build_model("resnet8", 10)) == MODELS["resnet8"].num_parameters
    with pytest.raises(ImportError, match=r"torchvision: pip install 'robust_dist\[train\]'"):
        build_model("resnet18", 10)
