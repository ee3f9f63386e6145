"""The memory of a forward and a backward pass beside the weights, measured on fake tensors, which have none."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_dist.engines.variant import Variant
from robust_dist.measure.dispatch import FakeTensorMode, LiveBytes
from robust_dist.plan.question import Question
from robust_dist.plan.shapes import build_on_meta
from robust_dist.train.step import summed_loss

# BatchNorm refuses single values, so never 1; two sizes give what grows with the batch and what does not.
_BATCHES = (2, 4)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass at one batch size.

    Attributes:
        live: Most bytes alive beside parameters and finished gradients, for each number of finished gradients.
        born: Elements of finished gradients, beside `live`.
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
        name: Of `build_model`.
        num_classes: Outputs.
        image_size: Height and width, pixels.
        in_channels: Channels.
        weights: dtype of parameters, floating-point buffers and images (which sharding engines cast).
        autocast: dtype of autocast; None: off.
        options: Of the model's constructor.

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
    """The profile in the dtypes that a variant computes in; asked for again, it is not measured again."""
    weights, autocast = variant.dtypes(question.dtype)
    return _profile_once(
        question.model,
        question.num_classes,
        question.image_size,
        question.in_channels,
        weights,
        autocast,
        tuple(question.options.items()),
    )


@lru_cache
def _profile_once(
    name: str,
    num_classes: int,
    image_size: int,
    in_channels: int,
    weights: torch.dtype,
    autocast: torch.dtype | None,
    options: tuple[tuple[str, Any], ...],
) -> Profile:
    return profile(
        name,
        num_classes,
        image_size,
        in_channels=in_channels,
        weights=weights,
        autocast=autocast,
        options=dict(options),
    )


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
    """The peak between every two finished gradients; a finished gradient is dropped, so that it is not counted."""

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
    """Put fake tensors of the CPU, which has kernels for all that a GPU has, in the place of the meta ones."""
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
