"""Classifiers by name: our own for small images, torchvision's, timm's, and the user's own."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from robust_dist import own_code
from robust_dist.extras import require
from robust_dist.models.cifar_resnet import CifarResNet, init_conv
from robust_dist.models.mlp import MLP
from robust_dist.validate import whole_number

Builder = Callable[..., nn.Module]
FAMILIES = (
    "ours: {ours}; torchvision's classifiers by their names (resnet18); timm's as timm/NAME; yours as MODULE:NAME"
)
_KEY = "model.name"
TIMM_PREFIX = "timm/"
# By default these two return tuples in training, and warn.
SINGLE_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def torchvision_names() -> list[str]:
    """Torchvision's classifiers; raises ImportError if torchvision is missing."""
    models = torchvision_models()
    return models.list_models(module=models)


def build_torchvision(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Torchvision's model `name`, without weights.

    Raises:
        ValueError: in_channels is not 3, the only number that torchvision's models take.
    """
    if in_channels != 3:
        raise ValueError(f"torchvision's {name} takes in_channels=3, not {in_channels}; timm/{name} may take others")
    merged = {**SINGLE_OUTPUT.get(name, {}), **options}
    return torchvision_models().get_model(name, weights=None, num_classes=num_classes, **merged)


def build_cifar_stem(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Torchvision's ResNet `name` with a stem for 32x32 images: a 3x3 convolution of stride 1, no max-pooling."""
    model: Any = build_torchvision(name, num_classes, **options)
    model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    init_conv(model.conv1)
    return model


def timm_names() -> list[str]:
    """Timm's models with the prefix timm/; raises ImportError if timm is missing."""
    return [TIMM_PREFIX + name for name in timm_module().list_models()]


def build_timm(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Timm's model `name` (without the prefix), without weights."""
    return timm_module().create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)


def torchvision_models() -> ModuleType:
    """torchvision.models; raises ImportError if torchvision is missing."""
    return require("torchvision.models", extra="train", purpose="a torchvision model")


def timm_module() -> ModuleType:
    """The package timm; raises ImportError if it is missing."""
    return require("timm", extra="bench", purpose="a timm model")


class OptionsError(ValueError):
    """A model does not take its options.

    Attributes:
        reason: The model's own words.
    """

    def __init__(self, name: str, options: dict[str, Any], reason: str) -> None:
        super().__init__(f"model {name!r} does not take the options {options}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class ModelInfo:
    """One of our own models.

    Attributes:
        description: What it is, and its source.
        num_parameters: With 10 classes and 3 channels.
        builder: Called as builder(num_classes=..., in_channels=..., **options).
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
    "mlp": ModelInfo("two hidden layers of 256 units for 32x32 images, without normalisation", 855_050, MLP),
    "resnet18_cifar": _stem("resnet18", 11_173_962),
    "resnet34_cifar": _stem("resnet34", 21_282_122),
}


def model_names() -> list[str]:
    """Every name that `build_model` accepts here: ours, then torchvision's and timm's if installed."""
    return [*MODELS, *_installed(torchvision_names), *_installed(timm_names)]


def build_model(name: str, num_classes: int, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a classifier, float32 on the CPU, with fresh weights from torch's default generator.

    Args:
        name: A key of `MODELS`, a torchvision classifier, timm/NAME, or `module:Name`, a class or function of the
            user's own (`own_model`).
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        **options: Passed to torchvision's or timm's builder (for example dropout); the CIFAR ResNets take stem_stride
            and width, mlp takes side and width.

    Returns:
        A module from [B, in_channels, H, W] to logits [B, num_classes].

    Raises:
        ValueError: The name is unknown (the message lists close matches), num_classes or in_channels is below 1, or
            (OptionsError) the model does not accept an option.
        ImportError: torchvision or timm is needed but not installed.
    """
    whole_number("num_classes", num_classes, 1)
    whole_number("in_channels", in_channels, 1)
    builder = builder_of(name)
    try:
        return builder(num_classes=num_classes, in_channels=in_channels, **options)
    except own_code.OwnCodeError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        of_options = not isinstance(error, ValueError) or any(re.search(rf"\b{one}\b", str(error)) for one in options)
        if not options or not of_options:
            raise
        raise OptionsError(name, options, _plain(error)) from error


def _plain(error: Exception) -> str:
    """The error without the name of a function that the user did not call."""
    said = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
    return re.sub(r"^\S+\(\) ", "it ", said).replace("keyword argument", "option")


def own_model(name: str) -> Builder:
    """The builder of a model named as `module:Name`.

    The class, or a function that returns a module, is called with the number of classes (as num_classes if it accepts
    that, otherwise as its first argument), with in_channels if it has that parameter, and with the options.

    Raises:
        OwnCodeError: The name cannot be imported (`own_code.load`), or is not such a class or function.
    """
    made = own_code.load(_KEY, name)
    if (
        isinstance(made, nn.Module)
        or not callable(made)
        or (isinstance(made, type) and not issubclass(made, nn.Module))
    ):
        raise own_code.wrong(_KEY, name, made, "a class of torch.nn.Module, or a function that returns one")
    return partial(_build_own, name, made)


def _build_own(name: str, made: Builder, *, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    if own_code.takes(made, "in_channels"):
        options = {"in_channels": in_channels, **options}
    by_name = own_code.takes(made, "num_classes") or (own_code.takes_any(made) and not _needs_one(made))
    model = (
        own_code.call(_KEY, name, made, num_classes=num_classes, **options)
        if by_name
        else own_code.call(_KEY, name, made, num_classes, **options)
    )
    if not isinstance(model, nn.Module):
        raise own_code.OwnCodeError(f"{_KEY}={name!r} returned a {type(model).__name__}; it must be a torch.nn.Module")
    return model


def _needs_one(made: Builder) -> bool:
    """Whether the first argument is required."""
    first = next(iter(inspect.signature(made).parameters.values()))
    return first.default is first.empty and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)


def check_output(key: str, name: str, model: nn.Module, image: tuple[int, ...], num_classes: int) -> None:
    """Reject a model that does not return one logit per class.

    Args:
        key: The setting that gave the model, for messages.
        name: Its value.
        model: On the CPU; its mode is left unchanged.
        image: Channels, height and width of an image.
        num_classes: Expected number of logits.

    Raises:
        ValueError: It returns another shape, or no tensor; or (OwnCodeError) it raises.
    """
    was_training = model.training
    with torch.no_grad():
        found = own_code.call(key, name, model.eval(), torch.zeros(2, *image))
    model.train(was_training)
    shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if shape != [2, num_classes]:
        raise ValueError(f"{key}={name!r} returns {shape} for 2 images, expected [2, {num_classes}]")


def builder_of(name: str) -> Builder:
    """The builder of a model; see `build_model`.

    Raises:
        ValueError: The name is unknown; the message lists close matches.
        ImportError: torchvision or timm is needed but not installed.
    """
    if own_code.is_name(name):
        return own_model(name)
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
