"""A training state that belongs to no engine and no world size: what conversion reads into and writes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robust_dist.engines.engine import UNNOTED


@dataclass
class TrainingState:
    """Everything a run needs to go on, whole and on the CPU.

    Attributes:
        model: Every entry of the model's `state_dict` by its name without wrappers' prefixes: parameters (the
            float32 master where the engine kept one) and buffers.
        optimizer: For each parameter that has state: name -> {"step": 0-d float32, "exp_avg": shape of the
            parameter, "exp_avg_sq": the same}.
        groups: The optimizer's param groups, with parameter names in "params", in the optimizer's order.
        schedule: `state_dict()` of the schedule, or None.
        engine: The kind of checkpoint it was read from: "ddp", "fsdp", "zero0" ... "zero3".
        world_size: How many ranks wrote it; None where nothing tells.
        extra: JSON values to carry over (the run's recipe, its step); "objects" are the model's entries that are no
            parameters or buffers, by name: what its modules' `get_extra_state` gave.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any] | None = None
    engine: str = UNNOTED
    world_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The model's whole `state_dict`, extra state too."""
        return {**self.model, **self.extra.get("objects", {})}


def split_objects(module: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's `state_dict` as (tensors, what torch calls extra state and other entries that are no tensors)."""
    objects = {n: v for n, v in module.items() if not isinstance(v, Tensor) or n.rpartition(".")[2] == "_extra_state"}
    return {name: value for name, value in module.items() if name not in objects}, objects
