"""A model's parameters without their memory, and the units in which `fully_shard` gathers them under Accelerate."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from robust_dist.models import build_model

Shape = tuple[int, ...]
# fsdp_min_num_params of configs/accelerate/*fsdp2.yaml and *hsdp.yaml
MIN_UNIT = 1_000_000


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


def unit_modules(model: nn.Module, min_numel: int = MIN_UNIT) -> list[tuple[nn.Module, bool]]:
    """The modules to give to `fully_shard`, in this order, and whether each is resharded after its forward pass.

    As Accelerate's `fsdp2_prepare_model` chooses them for SIZE_BASED_WRAP: inner modules first, each with more than
    `min_numel` elements in all; the last normalisation among the model's children; the model.
    """
    chosen = [m for m in _bottom_up(model)[:-1] if sum(p.numel() for p in m.parameters()) > min_numel]
    norm = [child for child in model.children() if "Norm" in type(child).__name__][-1:]
    tail = [child for child in norm if child not in chosen]
    return [*((module, True) for module in chosen), *((module, False) for module in tail), (model, False)]


def _bottom_up(model: nn.Module) -> list[nn.Module]:
    stack, order = [model], []
    while stack:
        module = stack.pop()
        stack.extend(module.children())
        order.append(module)
    return order[::-1]


def _units(model: nn.Module, trained: dict[Tensor, Parameter]) -> list[Unit]:
    names = {module: name for name, module in model.named_modules()}
    left, units = dict(trained), []
    for module, reshards in unit_modules(model):
        own = tuple(left.pop(p) for p in list(module.parameters()) if p in left)
        if own:
            units.append(Unit(names[module], own, not reshards))
    return units


def padded_rows(shape: Sequence[int], shards: int) -> int:
    """Elements that `fully_shard` stores of a parameter: the largest share of dimension 0 (torch.chunk's)."""
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return -(-rows // shards) * rest


def own_rows(shape: Sequence[int], shards: int, rank: int) -> int:
    """Elements of a parameter that are this rank's; the last ranks may have fewer, or none."""
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    share = -(-rows // shards)
    return max(0, min(share, rows - rank * share)) * rest
