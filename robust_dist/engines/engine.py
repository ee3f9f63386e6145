"""The record of an engine: everything that the rest of the package asks of one."""

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
# Engines of checkpoints that do not note theirs: of whole ones, and of those in shards.
UNNOTED, UNNOTED_SHARDS = "ddp", "fsdp"


class EngineError(RuntimeError):
    """The engine does something other than what was asked for; the message says which line to change."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run's demands on its engine.

    Attributes:
        optimizer: The optimizer's name.
        optimizer_params: Its settings by name.
        schedule_params: RobustSchedule's settings by name.
        batch_size: Samples of a global batch.
        accumulation: Parts of a batch that a rank takes one after the other.
        clip_norm: Largest norm of the gradient; None leaves it as it is.
    """

    optimizer: str
    optimizer_params: dict[str, Any]
    schedule_params: dict[str, Any]
    batch_size: int
    accumulation: int
    clip_norm: float | None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to train on several ranks; the defaults are those of an engine that keeps everything whole, as DDP does.

    Attributes:
        kind: Its name in a checkpoint's metadata and in `robust-dist convert --to`.
        shards_weights: Between steps no rank holds the whole weights.
        forward_is_collective: A forward pass waits for the other ranks, so all of them must make it.
        steps_whole_parameters: The optimizer's parameters are whole, with the model's own shapes.
        trains_any_memory_format: Weights need not be contiguous.
        casts_weights: Under mixed precision a forward pass uses weights of the lower dtype.
        autocasts: Under mixed precision a forward pass runs under torch.autocast.
        steps_in_backward: `accelerator.backward` also clips the gradients and steps.
        broadcasts_buffers: Before a forward pass every rank gets the first one's buffers.
        names_parameters: The optimizer's files name its parameters; otherwise a note of the names is written beside.
        loads_on_any_ranks: A checkpoint loads at another number of ranks without a conversion.
        has_full_state_dict: There is a form of its checkpoints that the first rank writes whole.
        trains_once: A process can train one run under it, and no second one.
        extra: The extra of this package that an engine's files need; None for the one that training needs anyway.
        variants: Its ways of launching that `robust-dist plan` compares, the simplest first; they are no subclass's.
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
        """Whether an `Accelerator` trains under this engine; every engine says it."""
        raise NotImplementedError

    def title(self, accelerator: Any) -> str:
        """The engine's name in a message to the user."""
        return self.kind

    def fit(self, accelerator: Any, settings: RunSettings) -> None:
        """Complete the engine's own configuration from the run's settings, before `prepare`.

        Raises:
            ValueError: The two contradict each other, or the engine cannot do what is asked.
        """

    def prepare(self, accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any) -> tuple[Any, Any, Any]:
        """The whole model, its optimizer and the RobustSchedule over it, prepared by this engine."""
        prepared: tuple[Any, Any, Any] = accelerator.prepare(model, optimizer, schedule)
        return prepared

    def casts_batch_norm(self, accelerator: Any) -> bool:
        """Whether mixed precision casts the weights of batch normalisation and leaves its statistics in float32."""
        return False

    def input_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype that images must be cast to before the model; None if the engine casts by itself."""
        return None

    def saves_whole(self, accelerator: Any) -> bool:
        """Whether this run's checkpoints have the form of `has_full_state_dict`."""
        return False

    def save(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Write the state of everything that was prepared, on every rank; `options` are `accelerator.save_state`'s."""
        accelerator.save_state(str(folder), **options)

    def load(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Load what `save` or `write` wrote, on every rank; `options` are `accelerator.load_state`'s."""
        accelerator.load_state(str(folder), **options)

    def write(self, state: "TrainingState", folder: Path, world_size: int, *, whole: bool = False) -> list[str]:
        """Write a converted state into an empty folder as `accelerator.load_state` takes it on `world_size` ranks.

        `whole`: in the form of `has_full_state_dict`. Returns notes for the person: what could not be carried over as
        it was.
        """
        raise NotImplementedError

    def saved_bytes(self, sizes: "Sizes", rank: int, world_size: int, *, whole: bool = False) -> int:
        """Bytes of weights and optimizer state, without buffers, that a rank writes; `whole` as `write`."""
        return sizes.elements * (sizes.bytes_each + sizes.moments) if rank == 0 else 0


@cache
def engines() -> tuple[Engine, ...]:
    """All records: those of other distributions' entry points in the group "robust_dist.engines", then our own.

    Raises:
        EngineError: Two have the same kind, or an entry point cannot be loaded, or is no record.
    """
    found = [load_entry_point(point, Engine, EngineError) for point in entry_points(group=GROUP)]
    own = import_module("robust_dist.engines")
    for name in own.OWN:
        found += import_module(f"{own.__name__}.{name}").ENGINES
    twice = sorted({engine.kind for engine in found if sum(other.kind == engine.kind for other in found) > 1})
    if twice:
        raise EngineError(f"several engines are called {', '.join(twice)}; give each its own kind")
    return tuple(found)


def kinds() -> list[str]:
    """The kinds of all engines."""
    return sorted(engine.kind for engine in engines())


def engine_named(kind: str) -> Engine:
    """The record of a kind; a ValueError where there is none."""
    for engine in engines():
        if engine.kind == kind:
            return engine
    raise ValueError(f"engine {kind!r} is none of {', '.join(kinds())}")


def engine_of(accelerator: Any) -> Engine:
    """The record of the engine under which an `Accelerator` trains; an EngineError where no record knows it."""
    for engine in engines():
        if engine.runs(accelerator):
            return engine
    raise EngineError(
        f"the launcher chose {accelerator.distributed_type.value}, which is no engine that this package knows: there "
        f"are {', '.join(kinds())} (see configs/accelerate); an entry point in the group {GROUP!r} adds another"
    )
