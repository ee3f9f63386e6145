"""Hooks of a possibly wrapped optimizer that keep no schedule alive, and the engines' answers to the schedule."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_in_charge: "weakref.WeakKeyDictionary[Optimizer, tuple[weakref.ref[Any], Callable[[], Any]]]"
_in_charge = weakref.WeakKeyDictionary()
Shape = tuple[int, ...]
_repeats: list[Callable[[], bool]] = []
_shapes: list[Callable[[Any], Shape | None]] = []


def base_optimizer(optimizer: Any) -> Optimizer:
    """The innermost torch optimizer of a chain of wrappers, whose `step()` changes the parameters.

    Engines' wrappers keep the wrapped optimizer as `.optimizer`; some are torch optimizers themselves, but their hooks
    are never called.

    Raises:
        TypeError: There is no torch optimizer at the end of the chain.
    """
    inner = optimizer
    while hasattr(inner, "optimizer") and hasattr(inner.optimizer, "param_groups"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which is neither a torch.optim.Optimizer nor a wrapper with "
            "one as .optimizer"
        )
    return inner


class Scheduled(Protocol):
    """The interface called by `attach`."""

    def _before_step(self) -> None: ...

    def _after_load(self) -> None: ...


def in_charge(optimizer: Optimizer) -> Any:
    """The switch that controls this optimizer's weight decay: the last to call `take_charge`, or None."""
    charge = _in_charge.get(optimizer)
    return None if charge is None else charge[0]()


def take_charge(optimizer: Optimizer, owner: Scheduled) -> None:
    """`attach`, and control the weight decay from now on; the previous owner is no longer called."""
    before = _in_charge.get(optimizer)
    if before is not None:
        before[1]()
    _in_charge[optimizer] = weakref.ref(owner), attach(optimizer, owner)


def attach(optimizer: Optimizer, owner: Scheduled) -> Callable[[], Any]:
    """Call `owner._before_step()` before each `optimizer.step()` and `owner._after_load()` after each load.

    A compiled step does not call `_before_step`, which would be traced into the graph. Returns a function that removes
    the hooks, as does the end of the owner.
    """
    reference = weakref.ref(owner)

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        alive = reference()
        if alive is not None:
            alive._before_step()

    def after_load(optimizer: Optimizer) -> None:
        alive = reference()
        if alive is not None:
            alive._after_load()

    handles = optimizer.register_step_pre_hook(before_step), optimizer.register_load_state_dict_post_hook(after_load)
    end = weakref.finalize(owner, _remove, *handles)
    end.atexit = False
    return end


def _remove(*handles: RemovableHandle) -> None:
    for handle in handles:
        handle.remove()


def tell(
    *, repeats_call: Callable[[], bool] | None = None, whole_shape: Callable[[Any], Shape | None] | None = None
) -> None:
    """Register an engine's answers.

    Args:
        repeats_call: Returns whether the current call of a scheduler's `step()` repeats one that its caller has already
            made.
        whole_shape: Returns the unsharded shape of a parameter whose own shape depends on the rank, () if ranks cannot
            know it; None for any other parameter.
    """
    if repeats_call is not None:
        _repeats.append(repeats_call)
    if whole_shape is not None:
        _shapes.append(whole_shape)


def is_repeated_call() -> bool:
    """Whether the current call of a scheduler's `step()` repeats another one."""
    return any(repeats() for repeats in _repeats)


def shape_on_every_rank(parameter: Any) -> Shape:
    """A parameter's shape, equal on all ranks; () if they cannot know it, or not yet."""
    if is_lazy(parameter):
        return ()
    found = (shape_of(parameter) for shape_of in _shapes)
    return next((shape for shape in found if shape is not None), tuple(parameter.shape))
