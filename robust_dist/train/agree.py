"""Errors and decisions that every rank shares, so that no rank waits for one that has given up."""

import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from robust_dist.private import hidden
from robust_dist.train.recipe import Recipe, flatten, recipe_dict

T = TypeVar("T")
_ORIGIN = "_robust_dist_origin"


@dataclass(frozen=True)
class Origin:
    """The origin of an error that every rank raises.

    Attributes:
        rank: The lowest rank that raised it by itself.
        host: Its machine.
        traceback: Its traceback there.
    """

    rank: int
    host: str
    traceback: str


def raise_everywhere(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every rank what any rank brought; the lowest rank's error where several did.

    `origin_of` tells from which rank it came.
    """
    mine = None if error is None else (_portable(error), _origin(accelerator.process_index, error))
    found = [mine] if accelerator.num_processes == 1 else gather_object([mine])
    first = next((pair for pair in found if pair is not None), None)
    if first is not None:
        raised, origin = first
        setattr(raised, _ORIGIN, origin)
        raise raised


def origin_of(error: BaseException) -> Origin | None:
    """The origin of an error that every rank raises; None for an error of this rank alone."""
    return getattr(error, _ORIGIN, None)


def _origin(rank: int, error: Exception) -> Origin:
    return Origin(
        rank, socket.gethostname(), "".join(traceback.format_exception(type(error), error, error.__traceback__))
    )


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it would not survive the way to the other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def attempt(accelerator: Accelerator, action: Callable[[], T], *, here: bool = True) -> T | None:
    """Call `action` on the ranks where `here` is true; if it fails on one of them, every rank raises its error.

    Args:
        accelerator: The run's accelerator.
        action: The call that may fail.
        here: Whether this rank makes it.

    Returns:
        The action's value, or None where it was not called.
    """
    value: T | None = None
    error: Exception | None = None
    if here:
        try:
            value = action()
        except Exception as caught:
            error = caught
    raise_everywhere(accelerator, error)
    return value


def from_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Call `action` on the main process and give its value, or its error, to every rank."""
    box = [attempt(accelerator, action, here=accelerator.is_main_process)]
    if accelerator.num_processes > 1:
        broadcast_object_list(box)
    return cast(T, box[0])


def check_ranks_agree(accelerator: Accelerator, recipe: Recipe) -> None:
    """Compare the recipe between the ranks.

    Raises:
        ValueError: On every rank, with each differing setting and its value on each rank.
    """
    problem = "the ranks were started with different settings; start all with the same"
    check_same(accelerator, flatten(hidden(recipe_dict(recipe))), problem)


def check_same(accelerator: Accelerator, ours: dict[str, Any], problem: str) -> None:
    """Compare values by name between the ranks.

    Raises:
        ValueError: On every rank: `problem`, and each name that differs with its value on each rank.
    """
    ranks = [ours] if accelerator.num_processes == 1 else gather_object([ours])
    names = sorted(set().union(*ranks))
    lines = [
        f"{name}: " + ", ".join(f"rank {rank}: {values.get(name)!r}" for rank, values in enumerate(ranks))
        for name in names
        if any(values.get(name) != ours.get(name) for values in ranks)
    ]
    if lines:
        raise ValueError(f"{problem}:\n  " + "\n  ".join(lines))
