"""A model's parameters without their memory, and the units in which `fully_shard` gathers them under Accelerate."""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from robust_dist.engines.fsdp.engine import unit_modules
from robust_dist.models import build_model

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: Its dotted name.
        shape: Its shape.
    """

    name: str
    shape: Shape

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Attributes:
        name: The module's name; "" is the whole model.
        parameters: Those that no inner unit has.
        stays: Whether they stay gathered from the forward to the backward pass.
    """

    name: str
    parameters: tuple[Parameter, ...]
    stays: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Shapes:
    """A model's trained parameters and its buffers.

    Attributes:
        parameters: In the model's order.
        units: What FSDP2 gathers at a time, the whole model's rest last.
        float_buffers: Elements of floating-point buffers (BatchNorm's statistics).
        buffer_bytes: Of all buffers.
    """

    parameters: tuple[Parameter, ...]
    units: tuple[Unit, ...]
    float_buffers: int
    buffer_bytes: int

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)


def build_on_meta(name: str, num_classes: int, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """`build_model` on the meta device: shapes without memory.

    Raises:
        ValueError: As `build_model`, or the model's constructor needs real numbers.
    """
    if TorchVersion(torch.__version__) < "2.7":
        # Else an initialiser imports it, which fails on the meta device.
        importlib.import_module("torch._dynamo")
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, in_channels=in_channels, **options)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--model={name!r} cannot be built without its memory (torch's meta device): {error}"
        ) from error


def read_shapes(model: nn.Module) -> Shapes:
    """Parameters that are trained, units and buffers of a model on any device."""
    trained = _trained(model)
    buffers = list(model.buffers())
    return Shapes(
        tuple(trained.values()),
        tuple(_units(model, trained)),
        sum(buffer.numel() for buffer in buffers if buffer.is_floating_point()),
        sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    )


def _trained(model: nn.Module) -> dict[Tensor, Parameter]:
    return {p: Parameter(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad}


def _units(model: nn.Module, trained: dict[Tensor, Parameter]) -> list[Unit]:
    names = {module: name for name, module in model.named_modules()}
    left, units = dict(trained), []
    for module, reshards in unit_modules(model):
        own = tuple(left.pop(p) for p in list(module.parameters()) if p in left)
        if own:
            units.append(Unit(names[module], own, not reshards))
    return units
