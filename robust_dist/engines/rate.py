"""What `rate_guard` needs from an engine: the loss, the gradients before clipping, and the number of copies."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from robust_dist.engines.engine import EngineError
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import world_size
from robust_dist.schedule import base_optimizer


class Feed:
    """Observes an `Accelerator`'s calls for its optimizer's `rate_guard`.

    `backward(loss)` observes the loss divided by the number of micro-batches. `unscale_gradients`, the first step of
    Accelerate's clipping, observes the gradients. Both are ignored if the program calls `observe` or
    `observe_gradients` itself. With several prepared optimizers a loss cannot be assigned to one of them, and nothing
    is observed.

    Args:
        accelerator: The `Accelerator`; two of its methods are replaced on this instance.

    Attributes:
        divergence: Subtracts the entropy of the targets from the last computed loss; None if there is none.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.divergence: Callable[[Tensor], Tensor] | None = None
        self._backward, self._unscale = accelerator.backward, accelerator.unscale_gradients
        accelerator.backward, accelerator.unscale_gradients = self.backward, self.unscale_gradients

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Observe the loss, then call Accelerate's method."""
        optimizer = self._measuring()
        if optimizer is not None and loss.numel() == 1:
            known = loss.detach() if self.divergence is None else self.divergence(loss.detach())
            # Trainer passes this for a loss that is already divided, under an engine that would divide it.
            divided = kwargs.get("scale_wrt_gas") is False
            optimizer.observe(known / (1 if divided else self.accelerator.gradient_accumulation_steps), automatic=True)
        self._backward(loss, **kwargs)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Call Accelerate's method, then observe the gradients."""
        self._unscale(optimizer)
        measuring = self._measuring()
        if measuring is not None and self.accelerator.sync_gradients:
            measuring.observe_gradients(automatic=True)

    def _measuring(self) -> Any:
        """The only optimizer, if it has `rate_guard`."""
        prepared = {id(base): base for base in map(base_optimizer, self.accelerator._optimizers)}
        only = next(iter(prepared.values())) if len(prepared) == 1 else None
        return only if measures(only) else None


def measures(optimizer: Any) -> bool:
    """Whether it is a RAdaBeliefW with `rate_guard`; the loop that knows other optimizers feeds them."""
    return isinstance(optimizer, RAdaBeliefW) and optimizer.measures_rate


def feed(accelerator: Any) -> Feed:
    """The accelerator's Feed, created if there is none."""
    made = getattr(accelerator.backward, "__self__", None)
    return made if isinstance(made, Feed) else Feed(accelerator)


def tell_copies(model: nn.Module, optimizer: Any) -> None:
    """Tell an optimizer with `rate_guard` how many ranks hold each shard of FSDP1; no effect under other engines.

    Raises:
        EngineError: FSDP1 wraps parts of the model in different ways.
    """
    if not measures(optimizer):
        return
    wrapped: list[Any] = [module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]
    found = {1 if m.sharding_strategy.name == "NO_SHARD" else m.process_group.size() for m in wrapped}
    if len(found) > 1:
        raise EngineError(
            f"rate_guard needs the same sharding for the whole model, FSDP1 shards parts of it over {sorted(found)} "
            "ranks; give all FullyShardedDataParallel modules the same sharding_strategy and process_group"
        )
    for shards in found:
        optimizer.measure_over(copies=world_size() // shards)
