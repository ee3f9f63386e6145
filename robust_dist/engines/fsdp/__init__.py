"""FSDP1, FSDP2 and HSDP: their record, and `check`, `save` and `load` for a plain loop under any of torch's engines."""

from robust_dist.engines.fsdp.engine import ENGINES
from robust_dist.engines.fsdp.plain_loop import check, load, save

__all__ = ["ENGINES", "check", "load", "save"]
