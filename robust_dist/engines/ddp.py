"""DDP, and a single process: every rank holds everything, and the first one writes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_dist.engines.engine import Engine
from robust_dist.engines.variant import Variant

if TYPE_CHECKING:
    from robust_dist.checkpoint.training_state import TrainingState


@dataclass(frozen=True, kw_only=True)
class DDP(Engine):
    """One process, or `DistributedDataParallel` on several."""

    kind: str = "ddp"
    broadcasts_buffers: bool = True
    names_parameters: bool = False

    def runs(self, accelerator: Any) -> bool:
        """Whether Accelerate runs one process or wraps the model in DDP."""
        return accelerator.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU")

    def write(self, state: "TrainingState", folder: Path, world_size: int, *, whole: bool = False) -> list[str]:
        """Write `model.safetensors`, `optimizer.bin` and `pytorch_model.bin`."""
        from robust_dist.checkpoint.plain import write_ddp

        write_ddp(state, folder)
        return []


ENGINES = (DDP(variants=(Variant(name="DDP", file="ddp"),)),)
