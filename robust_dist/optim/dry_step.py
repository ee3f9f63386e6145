"""The dry step: an optimizer step with a learning rate of 0, used by engines to create state without training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_dry(optimizer: Optimizer) -> bool:
    """Whether every learning rate is 0: the next step creates state and moves no parameter."""
    return all(float(group["lr"]) == 0.0 for group in optimizer.param_groups if "lr" in group)


@contextmanager
def dry_step(optimizer: Any, params: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Set all learning rates to 0 inside the context; restore them, and the gradients of `params`, at the end.

    Args:
        optimizer: A torch optimizer.
        params: The parameters that get a gradient of zeros inside the context; None leaves all gradients unchanged.
    """
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    held = [] if params is None else [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in held]
    try:
        for param in held:
            param.grad = None
        for param in params or ():
            param.grad = torch.zeros_like(param)
        for group, lr in rates:
            group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
        yield
    finally:
        for group, lr in rates:
            group["lr"] = lr
        for param, grad in zip(held, grads, strict=True):
            param.grad = grad
