"""A run on another number of ranks: what stays, what changes, and how its batch is cut then."""

import os
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from robust_dist.engines.engine import BATCH_NORMS, UNNOTED
from robust_dist.ranks.claim import host_id
from robust_dist.ranks.talk import gather
from robust_dist.train.recipe import Recipe

# EX_TEMPFAIL of sysexits.h: not done; the same command goes on.
STOPPED_STATUS = 75


class Stopped(Exception):
    """The run was asked to stop and has saved.

    Args:
        name: The signal's name.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Where it was saved.
    """

    def __init__(self, name: str, step: int, total_steps: int, checkpoint: str) -> None:
        super().__init__(name, step, total_steps, checkpoint)
        self.name, self.step, self.total_steps, self.checkpoint = name, step, total_steps, checkpoint

    def __str__(self) -> str:
        return (
            f"stopped by {self.name} at step {self.step} of {self.total_steps}; saved in {self.checkpoint}; "
            "the same command goes on from there"
        )


def fit_ranks(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with the accumulation that `micro_batch_size` asks for on these ranks; the engine is told.

    Raises:
        ValueError: `micro_batch_size` holds not one block, or contradicts `accumulation`.
    """
    if recipe.micro_batch_size is None:
        return recipe
    needed = accumulation_for(recipe, accelerator.num_processes)
    if recipe.accumulation not in (1, needed):
        raise ValueError(
            f"accumulation={recipe.accumulation} contradicts micro_batch_size={recipe.micro_batch_size}, which makes "
            f"it {needed} for batch_size={recipe.batch_size} on {accelerator.num_processes} ranks; set one of the two"
        )
    accelerator.gradient_accumulation_steps = needed
    return replace(recipe, accumulation=needed)


def accumulation_for(recipe: Recipe, num_processes: int) -> int:
    """The fewest parts of a rank's share of which none has more than `micro_batch_size` images.

    Raises:
        ValueError: `micro_batch_size` is smaller than a block, which is never cut.
    """
    most, block = recipe.micro_batch_size, recipe.data.block
    assert most is not None
    if most < min(block, recipe.batch_size):
        raise ValueError(
            f"micro_batch_size={most} is smaller than data.block={block}, which is never cut; set micro_batch_size to "
            f"{block} or more, or data.block to {most} or less"
        )
    share = -(-_blocks(recipe) // num_processes)
    return -(-share // max(1, most // block))


def largest_part(recipe: Recipe, num_processes: int) -> int:
    """Most images that a rank holds at once."""
    share = -(-_blocks(recipe) // num_processes)
    return min(-(-share // recipe.accumulation) * recipe.data.block, recipe.batch_size)


def _blocks(recipe: Recipe) -> int:
    return -(-recipe.batch_size // recipe.data.block)


def changes(recipe: Recipe, num_processes: int, engine: str, before: dict[str, Any], model: nn.Module) -> list[str]:
    """Lines for the user where ranks, engine or the parts of a batch differ from the checkpoint's.

    Args:
        recipe: Of this start, after `fit_ranks`.
        num_processes: Ranks of this start.
        engine: Kind of the engine of this start.
        before: The checkpoint's metadata.
        model: The model, wrapped or not.
    """
    was_ranks, was = int(before["num_processes"]), before["recipe"].get("accumulation", 1)
    was_engine = before.get("engine", UNNOTED)
    lines = []
    if was_engine != engine:
        lines.append(f"the run was under {was_engine} and is under {engine}: it goes on, but not bit for bit")
    if (was_ranks, was) == (num_processes, recipe.accumulation):
        return lines
    old = replace(recipe, accumulation=was)
    if was_ranks != num_processes:
        lines.append(f"the run had {was_ranks} ranks and has {num_processes}: it goes on, but not bit for bit")
    lines.append(
        f"the global batch stays {recipe.batch_size} images; accumulation {was} -> {recipe.accumulation}, a rank holds "
        f"at most {largest_part(old, was_ranks)} -> {largest_part(recipe, num_processes)} images at once"
    )
    if any(isinstance(part, BATCH_NORMS) for part in model.modules()):
        lines.append("batch normalisation takes its statistics over what a rank holds at once, so these change, too")
    return lines


def launcher() -> list[Any]:
    """The identity of the process that started this rank."""
    return [host_id(), os.getppid()]


def launchers() -> list[list[Any]]:
    """The launchers of all ranks, each one once."""
    return [list(pair) for pair in sorted({tuple(pair) for pair in gather(launcher())})]


def check_not_stopped(note: dict[str, Any]) -> None:
    """Leave again where a launcher starts its ranks once more after a signal stopped the run.

    Args:
        note: What `stopped.json` says.

    Raises:
        Stopped: As the start before.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and launcher() in note.get("launchers", []):
        raise Stopped(note["signal"], note["step"], note["total_steps"], note["checkpoint"])
