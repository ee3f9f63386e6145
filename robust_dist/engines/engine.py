"""The record of an engine: everything that the rest of the package asks about it."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robust_dist.extras import load_entry_point

if TYPE_CHECKING:
    from robust_dist.checkpoint.background import Sizes
    from robust_dist.checkpoint.training_state import TrainingState
    from robust_dist.engines.variant import Variant

GROUP = "robust_dist.engines"
# Layers that normalise over a batch: under some engines their weights are cast and their statistics are not.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Engines of checkpoints that do not name theirs: of full checkpoints, and of sharded ones.
UNNOTED, UNNOTED_SHARDS = "ddp", "fsdp"


class EngineError(RuntimeError):
    """The engine does something other than requested; the message says which line to change."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run's settings for its engine.

    Attributes:
        optimizer: The optimizer's name.
        optimizer_params: Its settings by name.
        schedule_params: RobustSchedule's settings by name.
        batch_size: Samples in a global batch.
        accumulation: Number of consecutive micro-batches of a rank in a batch.
        clip_norm: Maximum norm of the gradient; None does not clip.
    """

    optimizer: str
    optimizer_params: dict[str, Any]
    schedule_params: dict[str, Any]
    batch_size: int
    accumulation: int
    clip_norm: float | None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to train on several ranks; the defaults are those of an engine without sharding, like DDP.

    Attributes:
        kind: Its name in a checkpoint's metadata and in `robust-dist convert --to`.
        shards_weights: Between steps no rank holds the full weights.
        forward_is_collective: A forward pass waits for the other ranks, so all of them must run it.
        steps_whole_parameters: The optimizer's parameters are unsharded, with the model's shapes.
        trains_any_memory_format: Weights need not be contiguous.
        casts_weights: Under mixed precision a forward pass uses weights of the lower dtype.
        autocasts: Under mixed precision a forward pass runs under torch.autocast.
        steps_in_backward: `accelerator.backward` also clips the gradients and steps.
        broadcasts_buffers: Before a forward pass every rank gets the first rank's buffers.
        names_parameters: The optimizer's files name its parameters; otherwise their names are written to another file.
        loads_on_any_ranks: A checkpoint loads with another number of ranks without conversion.
        has_full_state_dict: Its checkpoints can also be full ones, written by the first rank.
        trains_once: A process can train only one run under it.
        extra: The extra of this package that an engine's files need; None if training needs it anyway.
        variants: Its ways of launching that `robust-dist plan` compares, the simplest first; not inherited.
    """

    kind: str
    shards_weights: bool = False
    forward_is_collective: bool = False
    steps_whole_parameters: bool = True
    trains_any_memory_format: bool = True
    casts_weights: bool = False
    autocasts: bool = True
    steps_in_backward: bool = False
    broadcasts_buffers: bool = False
    names_parameters: bool = True
    loads_on_any_ranks: bool = True
    has_full_state_dict: bool = False
    trains_once: bool = False
    extra: str | None = None
    variants: tuple["Variant", ...] = ()

    def runs(self, accelerator: Any) -> bool:
        """Whether an `Accelerator` trains under this engine; every engine implements it."""
        raise NotImplementedError

    def title(self, accelerator: Any) -> str:
        """The engine's name in a message to the user."""
        return self.kind

    def fit(self, accelerator: Any, settings: RunSettings) -> None:
        """Complete the engine's own configuration from the run's settings, before `prepare`.

        Raises:
            ValueError: The two contradict each other, or the engine does not support the settings.
        """

    def prepare(self, accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any) -> tuple[Any, Any, Any]:
        """The unsharded model, its optimizer and RobustSchedule, prepared by this engine."""
        prepared: tuple[Any, Any, Any] = accelerator.prepare(model, optimizer, schedule)
        return prepared

    def casts_batch_norm(self, accelerator: Any) -> bool:
        """Whether mixed precision casts the weights of batch normalisation but leaves its statistics in float32."""
        return False

    def input_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype to which images must be cast before the model; None if the engine casts them."""
        return None

    def saves_whole(self, accelerator: Any) -> bool:
        """Whether this run's checkpoints have the form of `has_full_state_dict`."""
        return False

    def save(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Write the state of all prepared objects, on every rank; `options` are those of `accelerator.save_state`."""
        accelerator.save_state(str(folder), **options)

    def load(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Load what `save` or `write` wrote, on every rank; `options` are those of `accelerator.load_state`."""
        accelerator.load_state(str(folder), **options)

    def write(self, state: "TrainingState", folder: Path, world_size: int, *, whole: bool = False) -> list[str]:
        """Write a converted state into an empty folder for `accelerator.load_state` on `world_size` ranks.

        `whole` writes the form of `has_full_state_dict`. Returns notes for the user on what could not be converted
        unchanged.
        """
        raise NotImplementedError

    def saved_bytes(self, sizes: "Sizes", rank: int, world_size: int, *, whole: bool = False) -> int:
        """Bytes of weights and optimizer state, without buffers, that a rank writes; `whole` as in `write`."""
        return sizes.elements * (sizes.bytes_each + sizes.moments) if rank == 0 else 0


@cache
def engines() -> tuple[Engine, ...]:
    """All records: those of other distributions' entry points in the group "robust_dist.engines", then our own.

    Raises:
        EngineError: Two have the same kind, or an entry point cannot be loaded or is not a record.
    """
    found = [load_entry_point(point, Engine, EngineError) for point in entry_points(group=GROUP)]
    own = import_module("robust_dist.engines")
    for name in own.OWN:
        found += import_module(f"{own.__name__}.{name}").ENGINES
    twice = sorted({engine.kind for engine in found if sum(other.kind == engine.kind for other in found) > 1})
    if twice:
        raise EngineError(f"several engines have the kind {', '.join(twice)}; give each its own")
    return tuple(found)


def kinds() -> list[str]:
    """The kinds of all engines."""
    return sorted(engine.kind for engine in engines())


def engine_named(kind: str) -> Engine:
    """The record of a kind; raises ValueError if there is none."""
    for engine in engines():
        if engine.kind == kind:
            return engine
    raise ValueError(f"engine {kind!r} is none of {', '.join(kinds())}")


def engine_of(accelerator: Any) -> Engine:
    """The record of the engine under which an `Accelerator` trains; raises EngineError if there is none."""
    for engine in engines():
        if engine.runs(accelerator):
            return engine
    raise EngineError(
        f"the launcher chose {accelerator.distributed_type.value}, which is not an engine of this package: there are "
        f"{', '.join(kinds())} (see configs/accelerate); an entry point in the group {GROUP!r} adds another"
    )
