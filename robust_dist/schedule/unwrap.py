"""From an engine's wrappers to the torch optimizer that does the arithmetic."""

from typing import Any

from torch.optim import Optimizer


def base_optimizer(optimizer: Any) -> Optimizer:
    """The innermost torch optimizer of a chain of wrappers.

    Accelerate's and DeepSpeed's wrappers keep what they wrap as `.optimizer`; some of them are torch optimizers
    themselves, but their hooks never fire.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.

    Returns:
        The optimizer whose `step()` changes the parameters.

    Raises:
        TypeError: There is no torch optimizer at the end of the chain.
    """
    inner = optimizer
    while hasattr(inner, "optimizer") and hasattr(inner.optimizer, "param_groups"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which is neither a torch.optim.Optimizer nor a wrapper that "
            "keeps one as .optimizer"
        )
    return inner
