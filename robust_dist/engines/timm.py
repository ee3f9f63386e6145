"""timm: RAdaBeliefW as a name for `timm.optim.create_optimizer_v2`."""

from typing import Any

# timm exports the class of its registry, but not the registry.
from timm.optim._optim_factory import OptimInfo, default_registry

from robust_dist.optim import RAdaBeliefW

__all__ = ["NAME", "register"]

NAME = "radabeliefw"


def register() -> None:
    """Register RAdaBeliefW for `timm.optim.create_optimizer_v2(model, "radabeliefw", ...)` and `--opt radabeliefw`.

    timm's param groups still apply: no decay on biases and norms (`filter_bias_and_bn`), and `layer_decay`. The latter
    writes an `lr_scale` into the groups, which only timm's schedulers apply; here each group's `lr` is scaled when the
    optimizer is created, and `lr_scale` is removed, so that the layers' rates work with any scheduler, or none. (timm's
    schedulers then do not scale their `lr_min` and `warmup_lr_init`.) timm's `weight_decay` is 0 unless given.

    With `rate_guard`, call `optimizer.observe(loss)` before each step; rate_guard=1 ignores `lr`, so `layer_decay`
    raises ValueError.
    """
    # timm's annotation requires a class, but its registry accepts any callable.
    make: Any = _scaled
    if NAME not in default_registry.list_optimizers(NAME):
        default_registry.register(OptimInfo(NAME, make, "AdamW + RAdam + AdaBelief", has_betas=True))


def _scaled(params: Any, **settings: Any) -> RAdaBeliefW:
    optimizer = RAdaBeliefW(params, **settings)
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            if group["lr_scale"] != 1.0 and group.get("rate_guard") == 1.0:
                raise ValueError(
                    "layer_decay sets learning rates per layer, and rate_guard=1 ignores learning rates; set "
                    "rate_guard above 1, or leave layer_decay out"
                )
            group["lr"] = group["lr"] * group.pop("lr_scale")
    return optimizer
