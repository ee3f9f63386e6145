"""The engines: what each one does to optimizers, schedules and checkpoints, one file or folder per engine."""

from typing import Any

from robust_dist.engines.accelerate import is_copy
from robust_dist.engines.deepspeed import register
from robust_dist.schedule.hooks import tell

__all__ = ["OWN", "register"]

# Modules of this folder that define ENGINES, a tuple of records.
OWN = ("ddp", "fsdp", "deepspeed")


def _whole_shape(parameter: Any) -> tuple[int, ...] | None:
    """The unsharded shape of a parameter sharded by FSDP1 or ZeRO-3; () for FSDP1, where it is unknown."""
    if hasattr(parameter, "_fsdp_flattened"):
        return ()
    return tuple(parameter.ds_shape) if hasattr(parameter, "ds_shape") else None


tell(repeats_call=is_copy, whole_shape=_whole_shape)
