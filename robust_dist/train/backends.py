"""The backends of a run's optimizer and augmentation: shown, noted, and the same on every rank."""

from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator

from robust_dist.augment import RobustAugment
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import agree
from robust_dist.schedule import base_optimizer
from robust_dist.train.recipe import Recipe

_NAMES = {"fused_triton": "fused (Triton)", "fused_cpu": "fused (C)", "single": "single-tensor"}


@dataclass(frozen=True)
class Backends:
    """The backends of a run, by the names that its first line and `environment.json` give them.

    Attributes:
        optimizer: Of RAdaBeliefW: "fused (Triton)", "fused (C)", "foreach" or "single-tensor"; None for another
            optimizer, and under an engine that fills the param groups for a step alone.
        augmentation: "triton", "native", "torch" or "torch.compile".
    """

    optimizer: str | None
    augmentation: str


def backends_of(recipe: Recipe, accelerator: Accelerator, optimizer: Any, augment: RobustAugment) -> Backends:
    """The backends that this run takes, the same on every rank.

    Args:
        recipe: All settings.
        accelerator: The engine, after `prepare`.
        optimizer: What the engine made of the optimizer.
        augment: The training pipeline.

    Raises:
        ValueError: On every rank, where ranks take different ones: backends round differently, so that whole
            weights, which each rank steps for itself, would drift apart.
    """
    compiled = recipe.augment.compile
    found = Backends(
        optimizer_backend(optimizer), "torch.compile" if compiled else augment.backend_for(accelerator.device)
    )
    agree(
        asdict(found),
        "the ranks would take different backends, which round differently; make every rank able to take the same (see "
        "robust-dist doctor on each host), or set optimizer.options.fused=false for all",
    )
    return found


def optimizer_backend(optimizer: Any) -> str | None:
    """The backend that steps RAdaBeliefW; see `Backends.optimizer`."""
    inner = base_optimizer(optimizer)
    name = inner.backend_in_use() if isinstance(inner, RAdaBeliefW) else None
    return None if name is None else _NAMES.get(name, name)
