"""Facts about engines that the schedule needs; `robust_dist.engines` registers them when it is imported."""

from collections.abc import Callable
from typing import Any

from torch.nn.parameter import is_lazy

Shape = tuple[int, ...]

_repeats: list[Callable[[], bool]] = []
_shapes: list[Callable[[Any], Shape | None]] = []


def tell(
    *, repeats_call: Callable[[], bool] | None = None, whole_shape: Callable[[Any], Shape | None] | None = None
) -> None:
    """Add an engine's answers.

    Args:
        repeats_call: Whether the call of a scheduler's `step()` under way repeats one that its caller made already.
        whole_shape: The shape of a parameter whose own shape depends on the rank, () where ranks cannot know it; None
            for any other parameter.
    """
    if repeats_call is not None:
        _repeats.append(repeats_call)
    if whole_shape is not None:
        _shapes.append(whole_shape)


def is_repeated_call() -> bool:
    """Whether the call of a scheduler's `step()` under way is not one of its own."""
    return any(repeats() for repeats in _repeats)


def shape_on_every_rank(parameter: Any) -> Shape:
    """A parameter's shape as all ranks see it; () where they cannot know it, or not yet."""
    if is_lazy(parameter):
        return ()
    found = (shape_of(parameter) for shape_of in _shapes)
    return next((shape for shape in found if shape is not None), tuple(parameter.shape))
