"""FSDP1, FSDP2 and HSDP: their record, and `check`, `save` and `load` for a plain loop under any of torch's engines."""

from typing import TYPE_CHECKING, Any

from robust_dist.engines.fsdp.engine import ENGINES

if TYPE_CHECKING:
    from robust_dist.engines.fsdp.plain_loop import check, load, save

__all__ = ["ENGINES", "check", "load", "save"]


def __getattr__(name: str) -> Any:
    # Programs that only use the record need not import torch's distributed checkpoint, which takes seconds.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robust_dist.engines.fsdp import plain_loop

    return getattr(plain_loop, name)
