"""Models of torchvision and timm by their names."""

from types import ModuleType
from typing import Any

from torch import nn

from robust_dist.extras import require
from robust_dist.models.cifar_resnet import init_conv

TIMM_PREFIX = "timm/"
# These two return tuples in training, and warn, unless told otherwise.
SINGLE_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def torchvision_names() -> list[str]:
    """Torchvision's classifiers; raises ImportError where torchvision is missing."""
    models = torchvision_models()
    return models.list_models(module=models)


def build_torchvision(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Torchvision's model `name`, without weights.

    Raises:
        ValueError: in_channels other than 3, which is all that torchvision's models take.
    """
    if in_channels != 3:
        raise ValueError(f"torchvision's {name} takes in_channels=3, not {in_channels}; timm/{name} may take others")
    merged = {**SINGLE_OUTPUT.get(name, {}), **options}
    return torchvision_models().get_model(name, weights=None, num_classes=num_classes, **merged)


def build_cifar_stem(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Torchvision's ResNet `name` with a stem for 32x32 images: a 3x3 convolution of stride 1 and no max-pooling."""
    model: Any = build_torchvision(name, num_classes, **options)
    model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    init_conv(model.conv1)
    return model


def timm_names() -> list[str]:
    """Timm's models with the prefix timm/; raises ImportError where timm is missing."""
    return [TIMM_PREFIX + name for name in timm_module().list_models()]


def build_timm(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Timm's model `name` (without the prefix), without weights.

    Raises:
        ImportError: timm is not installed.
    """
    return timm_module().create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)


def torchvision_models() -> ModuleType:
    """torchvision.models; raises ImportError where torchvision is missing."""
    return require("torchvision.models", extra="train", purpose="a model of torchvision")


def timm_module() -> ModuleType:
    """The package timm; raises ImportError where it is missing."""
    return require("timm", extra="bench", purpose="a model of timm")
