"""Accelerate's wrapper of schedulers: which of its calls of step() are copies of one call."""

import sys
from types import CodeType, FrameType
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

# Frames between Accelerate's wrapper and the scheduler that it holds: a few schedulers that hold each other.
_MAX_FRAMES = 10


def is_copy() -> bool:
    """Whether the call under way repeats one that Accelerate's AcceleratedScheduler has made in the same `step()`.

    That makes one call per process for one optimizer step, unless split_batches is set or it does not step with the
    optimizer. The first of them is the call, the others are its copies.

    Raises:
        RuntimeError: A scheduler of torch's stands between, and counts each copy.
    """
    wrapper = _accelerates_frame() if "accelerate.scheduler" in sys.modules else None
    if wrapper is None:
        return False
    _check_version(wrapper.f_code)
    number = wrapper.f_locals.get("_")
    if number is None:
        return False
    problem = miscounted(wrapper.f_locals["self"])
    if problem:
        raise RuntimeError(problem)
    return bool(number > 0)


def _check_version(code: CodeType) -> None:
    """The copies are numbered in a local variable of Accelerate's; a version that loops without it is not known."""
    if "range" in code.co_names and "_" not in code.co_varnames:
        raise RuntimeError(
            f"accelerate {sys.modules['accelerate'].__version__} calls schedulers in a way that is not known here; "
            "leave the schedule out of accelerator.prepare, and call its step() once after each optimizer step"
        )


def miscounted(wrapper: Any) -> str | None:
    """The problem of a torch scheduler that counts each of an AcceleratedScheduler's copies of a call, or None.

    Args:
        wrapper: What `Accelerator.prepare` made of a scheduler.

    Returns:
        The message; None where every call is counted once.
    """
    processes = int(sys.modules["accelerate.state"].AcceleratorState().num_processes)
    held = wrapper.scheduler
    if processes == 1 or wrapper.split_batches or not wrapper.step_with_optimizer or not counts_itself(held):
        return None
    name = type(held).__name__
    return (
        f"a RobustSchedule is in a {name}, whose step() Accelerate calls {processes} times for each optimizer step, "
        f"once per process: its milestones and other schedulers run {processes} times too fast. Leave the {name} out "
        "of accelerator.prepare, hand it to accelerator.register_for_checkpointing, and call its step() once after "
        "each optimizer step (under accumulation where accelerator.sync_gradients is true)"
    )


def counts_itself(scheduler: Any) -> bool:
    """Whether a scheduler holds others whose calls it or they count: torch's SequentialLR, and its ChainedScheduler."""
    if isinstance(scheduler, SequentialLR):
        return True
    held: list[LRScheduler] = list(getattr(scheduler, "_schedulers", ()))
    return isinstance(scheduler, ChainedScheduler) and (len(held) > 1 or any(map(counts_itself, held)))


def _accelerates_frame() -> FrameType | None:
    """The frame of the AcceleratedScheduler.step() that makes the call under way."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name == "step" and frame.f_globals.get("__name__") == "accelerate.scheduler":
            return frame
        frame = frame.f_back
    return None
