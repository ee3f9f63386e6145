"""What `rate_guard` needs from an engine: the loss, unclipped gradients, the copies of each shard, constant rates."""

import copy
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from robust_dist.engines.engine import EngineError
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.rate import all_ignore_rate
from robust_dist.ranks.talk import world_size
from robust_dist.schedule import RobustSchedule, base_optimizer

# How many of a scheduler's steps are looked at.
_LOOKS = 64


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


def idle_schedule(optimizer: Any, scheduler: Any) -> str | None:
    """The name of a scheduler of rates over an optimizer that takes none, or None; `scheduler` may be wrapped.

    One whose rates cannot be told from here passes; the optimizer warns of it when they have changed.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not all_ignore_rate(optimizer.param_groups):
        return None
    own = (one for one in _schedulers(inner) if base_optimizer(one.optimizer) is optimizer)
    return next((type(one).__name__ for one in own if _changes(one)), None)


def _schedulers(scheduler: Any) -> Iterator[LRScheduler]:
    """The scheduler itself, or those inside a SequentialLR or ChainedScheduler."""
    held = getattr(scheduler, "_schedulers", None)
    if held is None and isinstance(scheduler, LRScheduler):
        yield scheduler
    for one in held or ():
        yield from _schedulers(one)


def _changes(scheduler: Any) -> bool:
    """Whether a scheduler is known to set another rate than its base rates and 0."""
    if isinstance(scheduler, RobustSchedule):
        return scheduler.curve.changes
    if isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "base_lrs"):
        return isinstance(scheduler, ReduceLROnPlateau)
    look, base = copy.copy(scheduler), list(map(float, scheduler.base_lrs))
    groups = [dict(group, lr=rate) for group, rate in zip(scheduler.optimizer.param_groups, base, strict=False)]
    # Asked for its next rates it neither counts nor writes where the run would see it.
    look.optimizer = SimpleNamespace(param_groups=groups)
    for look.last_epoch in range(1, _LOOKS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rates = list(map(float, look.get_lr()))
        except Exception:  # a function of the user's may end with the run
            return False
        if any(rate not in (0.0, own) for rate, own in zip(rates, base, strict=False)):
            return True
        for group, rate in zip(groups, rates, strict=False):
            group["lr"] = rate
    return False
