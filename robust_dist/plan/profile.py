"""A model without its memory: parameters, the units that FSDP2 gathers, and what a training pass needs besides."""

import importlib
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import FlopCounterMode

from robust_dist.engines.fsdp.engine import unit_modules
from robust_dist.engines.variant import Variant
from robust_dist.measure.dispatch import FakeTensorMode, LiveBytes
from robust_dist.models import build_model
from robust_dist.plan.question import Question
from robust_dist.train.step import summed_loss

Shape = tuple[int, ...]
# BatchNorm refuses single values, so never 1; two sizes tell what grows with the batch from what does not.
_BATCHES = (2, 4)


@dataclass(frozen=True)
class Parameter:
    """A parameter's dotted name and shape."""

    name: str
    shape: Shape

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        name: The module's name; "" is the whole model.
        parameters: Those that belong to no inner unit.
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
        units: What FSDP2 gathers at a time, the rest of the model last.
        float_buffers: Elements of floating-point buffers (BatchNorm's statistics).
        buffer_bytes: Bytes of all buffers.
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
        # Otherwise an initialiser imports it, which fails on the meta device.
        importlib.import_module("torch._dynamo")
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, in_channels=in_channels, **options)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--model={name!r} cannot be built without its memory (torch's meta device): {error}"
        ) from error


def shapes_of(question: Question) -> Shapes:
    """`read_shapes` of a job's model."""
    options = {"in_channels": question.in_channels, **question.options}
    return read_shapes(build_on_meta(question.model, question.num_classes, **options))


def read_shapes(model: nn.Module) -> Shapes:
    """Parameters that are trained, units and buffers of a model on any device."""
    named = model.named_parameters()
    trained: dict[Tensor, Parameter] = {p: Parameter(name, tuple(p.shape)) for name, p in named if p.requires_grad}
    buffers = list(model.buffers())
    return Shapes(
        tuple(trained.values()),
        tuple(_units(model, trained)),
        sum(buffer.numel() for buffer in buffers if buffer.is_floating_point()),
        sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    )


def _units(model: nn.Module, trained: dict[Tensor, Parameter]) -> list[Unit]:
    names = {module: name for name, module in model.named_modules()}
    left, units = dict(trained), []
    for module, reshards in unit_modules(model):
        own = tuple(left.pop(p) for p in list(module.parameters()) if p in left)
        if own:
            units.append(Unit(names[module], own, not reshards))
    return units


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass at one batch size.

    Attributes:
        live: Most bytes alive beside parameters and finished gradients, for each number of finished gradients.
        born: Elements of finished gradients, for each entry of `live`.
        flops: Floating-point operations.
    """

    live: tuple[int, ...]
    born: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class Profile:
    """Passes as a function of the micro batch."""

    small: Pass
    large: Pass

    def live(self, batch: int, bytes_per_born: float = 0.0) -> float:
        """Most bytes alive at a time, gradients counted with `bytes_per_born` an element as they are finished."""
        rows = zip(self.small.live, self.large.live, self.small.born, strict=True)
        return max(_line(a, b, batch) + bytes_per_born * born for a, b, born in rows)

    def live_between(self, batch: int, born: int, born_after: int) -> float:
        """Most bytes alive while the finished gradients grow from `born` to `born_after` elements."""
        rows = zip(self.small.live, self.large.live, self.small.born, strict=True)
        return max((_line(a, b, batch) for a, b, done in rows if born <= done < born_after), default=0.0)

    def flops(self, batch: int) -> float:
        """Operations of one forward and backward pass."""
        return _line(self.small.flops, self.large.flops, batch)


def _line(small: float, large: float, batch: int) -> float:
    slope = (large - small) / (_BATCHES[1] - _BATCHES[0])
    return max(small + slope * (batch - _BATCHES[0]), 0.0)


def profile(
    name: str,
    num_classes: int,
    image_size: int,
    *,
    in_channels: int = 3,
    weights: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    options: dict[str, Any] | None = None,
) -> Profile:
    """Run a model's forward and backward pass at two batch sizes on fake tensors of the CPU.

    Args:
        name: A name of `build_model`.
        num_classes: Outputs.
        image_size: Height and width, pixels.
        in_channels: Channels.
        weights: dtype of parameters, floating-point buffers and images (which sharding engines cast).
        autocast: dtype of autocast; None: off.
        options: Arguments of the model's constructor.

    Raises:
        ValueError: The model cannot be run at this size.
    """
    passes = []
    for batch in _BATCHES:
        model = build_on_meta(name, num_classes, in_channels=in_channels, **(options or {}))
        try:
            passes.append(_run(model, (batch, in_channels, image_size, image_size), weights, autocast))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"--model={name!r} does not run on {in_channels}x{image_size}x{image_size} images: {error}; "
                "--image-size and --in-channels must be what it takes"
            ) from error
    return Profile(*passes)


def profile_for(variant: Variant, question: Question) -> Profile:
    """The profile in the dtypes that a variant computes in, measured once."""
    weights, autocast = variant.dtypes(question.dtype)
    asked: dict[str, Any] = {name: getattr(question, name) for name in ("num_classes", "image_size", "in_channels")}
    asked |= {"weights": weights, "autocast": autocast, "options": question.options}
    key = f"{question.model} {asked}"
    if key not in _profiles:
        _profiles[key] = profile(question.model, **asked)
    return _profiles[key]


_profiles: dict[str, Profile] = {}


def _run(model: nn.Module, shape: tuple[int, ...], weights: torch.dtype, autocast: torch.dtype | None) -> Pass:
    with FakeTensorMode():
        _fake(model, weights)
        tracker, counter = LiveBytes(), FlopCounterMode(display=False)
        tracker.ignore([*model.parameters(), *model.buffers()])
        casting = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        marks = _Marks(model, tracker)
        with counter, tracker:
            images = torch.empty(shape, dtype=weights)
            with casting:
                logits = model(images)
            loss = summed_loss(logits, torch.empty_like(logits.float()), None, 0.0)
            del logits
            loss.backward()
            marks.note()
    return Pass(tuple(marks.live), tuple(marks.born), counter.get_total_flops())


class _Marks:
    """The peak between every two finished gradients; a finished gradient is dropped, so it is not counted."""

    def __init__(self, model: nn.Module, tracker: LiveBytes) -> None:
        self.tracker, self.live, self.born, self.done = tracker, list[int](), list[int](), 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.finished)

    def note(self) -> None:
        self.live.append(self.tracker.peak)
        self.born.append(self.done)
        self.tracker.restart()

    def finished(self, parameter: Tensor) -> None:
        self.note()
        self.done += parameter.numel()
        parameter.grad = None


def _fake(model: nn.Module, weights: torch.dtype) -> None:
    """Replace the model's meta tensors by fake ones of the CPU, which has kernels for all that a GPU has."""
    made: dict[Tensor, Tensor] = {}

    def fake(old: Tensor) -> Tensor:
        if old not in made:
            new = torch.empty_strided(old.size(), old.stride(), dtype=weights if old.is_floating_point() else old.dtype)
            made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[old]

    for module in model.modules():
        named = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        for name, old in [*named, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            setattr(module, name, fake(old))
