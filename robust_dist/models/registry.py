"""Classifiers by name: our own for small images, torchvision's, timm's."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from robust_dist.models.cifar_resnet import CifarResNet
from robust_dist.models.peers import (
    TIMM_PREFIX,
    build_cifar_stem,
    build_timm,
    build_torchvision,
    timm_names,
    torchvision_names,
)
from robust_dist.validate import whole_number

Builder = Callable[..., nn.Module]
FAMILIES = "ours: {ours}; torchvision's classifiers by their names (resnet18); timm's as timm/NAME"


@dataclass(frozen=True)
class ModelInfo:
    """A model of ours.

    Attributes:
        description: what it is, and where from.
        num_parameters: with 10 classes and 3 channels.
        builder: called as builder(num_classes=..., in_channels=..., **options).
    """

    description: str
    num_parameters: int
    builder: Builder


def _cifar(depth: int, num_parameters: int) -> ModelInfo:
    description = f"ResNet-{depth} for 32x32 images, 16/32/64 channels, shortcuts of option A (He et al. 2016)"
    return ModelInfo(description, num_parameters, partial(CifarResNet, (depth - 2) // 6))


def _stem(name: str, num_parameters: int) -> ModelInfo:
    description = f"torchvision's {name} with a CIFAR stem: 3x3 convolution of stride 1, no max-pooling"
    return ModelInfo(description, num_parameters, partial(build_cifar_stem, name))


MODELS: dict[str, ModelInfo] = {
    "resnet8": _cifar(8, 75_290),
    "resnet20": _cifar(20, 269_722),
    "resnet32": _cifar(32, 464_154),
    "resnet44": _cifar(44, 658_586),
    "resnet56": _cifar(56, 853_018),
    "resnet110": _cifar(110, 1_727_962),
    "resnet18_cifar": _stem("resnet18", 11_173_962),
    "resnet34_cifar": _stem("resnet34", 21_282_122),
}


def model_names() -> list[str]:
    """Every name that `build_model` takes on this machine: ours, then torchvision's and timm's where installed."""
    return [*MODELS, *_installed(torchvision_names), *_installed(timm_names)]


def build_model(name: str, num_classes: int, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a classifier, float32 on the CPU, with fresh weights from torch's default generator.

    Args:
        name: a key of `MODELS`; else a classifier of torchvision by its name; else timm/NAME.
        num_classes: outputs.
        in_channels: channels of the images.
        **options: handed to torchvision's or timm's builder (for example dropout); the CIFAR ResNets
            take stem_stride.

    Returns:
        A module from [B, in_channels, H, W] to logits [B, num_classes].

    Raises:
        ValueError: unknown name (lists close matches), num_classes or in_channels below 1, or an option that the model
            does not know.
        ImportError: torchvision or timm is needed and not installed.
    """
    _check_counts(num_classes=num_classes, in_channels=in_channels)
    builder = _builder(name)
    try:
        return builder(num_classes=num_classes, in_channels=in_channels, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"model {name!r} does not take the options {options}: {_plain(error)}") from error


def _plain(error: TypeError) -> str:
    """What the error says of an argument, without the name of a function that the user has not called."""
    return re.sub(r"^\S+\(\) ", "it ", str(error)).replace("keyword argument", "option")


def _builder(name: str) -> Builder:
    if name in MODELS:
        return MODELS[name].builder
    if name.startswith(TIMM_PREFIX):
        return _known(name, timm_names(), partial(build_timm, name.removeprefix(TIMM_PREFIX)))
    return _known(name, [*MODELS, *torchvision_names()], partial(build_torchvision, name))


def _known(name: str, names: list[str], builder: Builder) -> Builder:
    if name in names:
        return builder
    close = get_close_matches(name, names, n=3)
    guess = f" Close: {', '.join(close)}." if close else ""
    raise ValueError(f"unknown model {name!r}.{guess} There are {FAMILIES.format(ours=', '.join(MODELS))}.")


def _installed(names: Callable[[], list[str]]) -> list[str]:
    try:
        return names()
    except ImportError:
        return []


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        whole_number(name, value, 1)
