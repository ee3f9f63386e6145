"""What a run says at its start: what it understood of the data, what it will do, and what is odd about it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from robust_dist.data.names import printable
from robust_dist.data.sets import LabelledSet
from robust_dist.engines.launch import cores_here
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import base_optimizer
from robust_dist.train.data_record import left_out
from robust_dist.train.optimizers import second_beta
from robust_dist.train.recipe import Recipe

NAMED = 10
_BACKENDS = {
    "fused_triton": "fused (Triton)",
    "fused_cpu": "fused (C)",
    "foreach": "foreach",
    "single": "single-tensor",
}
RECTIFIED = ("RAdaBeliefW", "radam")


def part_lines(sets: Sequence[LabelledSet]) -> list[str]:
    """A line each for the training and the evaluation images: how many, of which classes, what was left out."""
    train, test = sets
    first = f"train: {_count(len(train), 'image')} of {_classes(train.classes)}, {train.name}{_left_out(train)}"
    return [printable(line) for line in (first, f"eval: {_count(len(test), 'image')}, {test.name}{_left_out(test)}")]


def say_run(
    recipe: Recipe, accelerator: Accelerator, sets: Sequence[LabelledSet], trainer: Any, warnings: Sequence[str]
) -> None:
    """Print what will be done, and after `warnings` what else is odd; `trainer` is the run's Trainer."""
    ranks_here = 0 if accelerator.device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    odd = [*warnings, *oddities(recipe, sets, trainer.total_steps, ranks_here)]
    print(run_line(recipe, accelerator, trainer), *(f"warning: {one}" for one in odd), sep="\n", flush=True)


def run_line(recipe: Recipe, accelerator: Accelerator, trainer: Any) -> str:
    """A line for what will be done with them: model, steps, devices and backends; `trainer` is the run's Trainer."""
    steps, epochs = trainer.loader.steps_per_epoch, recipe.epochs
    ranks, device = accelerator.num_processes, accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    augments = "torch.compile" if recipe.augment.compile else trainer.augment.backend_for(device)
    return (
        f"run: {recipe.model.name}, {trainer.num_parameters:,} parameters; {_count(epochs, 'epoch')} of "
        f"{_count(steps, 'step')} are {trainer.total_steps:,} steps of {recipe.batch_size:,} images; "
        f"{_count(ranks, 'rank')} on {name}; {recipe.optimizer.name}{optimizer_backend(trainer.optimizer)}, "
        f"augmentation by {augments}"
    )


def optimizer_backend(optimizer: Optimizer) -> str:
    """Which code of RAdaBeliefW steps, in words that follow its name; empty for another optimizer.

    Empty, too, under ZeRO-3, which fills the groups for a step alone.
    """
    inner = base_optimizer(optimizer)
    name = inner.backend_in_use() if isinstance(inner, RAdaBeliefW) else None
    return "" if name is None else f" {_BACKENDS.get(name, name)}"


def oddities(recipe: Recipe, sets: Sequence[LabelledSet], total_steps: int, ranks_here: int) -> list[str]:
    """What is likely to be a mistake though nothing is wrong, a line each.

    Args:
        recipe: All settings.
        sets: Training and evaluation images.
        total_steps: Optimizer steps of the run.
        ranks_here: Ranks on this host that share its processor; 0 where they have GPUs.
    """
    train = sets[0]
    classes, cores = len(train.classes), cores_here()
    found = []
    if classes == 1:
        found.append(f"there is one class, {train.classes[0]!r}: whatever the model answers is right ({train.name})")
    elif classes >= len(train):
        found.append(f"{len(train):,} training images are of {classes:,} classes: is one image a class right?")
    needed = _steps_needed(recipe, total_steps)
    if total_steps < needed:
        epochs = -(-needed * recipe.epochs // total_steps)
        found.append(
            f"{_count(total_steps, 'step')} are few: {recipe.optimizer.name} takes short steps for about the first "
            f"{needed:,}. Train for more epochs ({epochs:,} or more), set optimizer.beta2=auto, and make the "
            "augmentation lighter (augment.trivial=false, augment.cutmix=false)"
        )
    if ranks_here > cores:
        found.append(f"{ranks_here} ranks share {_count(cores, 'core')} of this host: start no more ranks than cores")
    return found


def _steps_needed(recipe: Recipe, total_steps: int) -> int:
    """About how many steps the rectification of eq. 13 holds the optimizer back, 0 for those that have none."""
    if recipe.optimizer.name not in RECTIFIED:
        return 0
    return round(1 / (1 - second_beta(recipe.optimizer, total_steps)))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _classes(names: Sequence[str]) -> str:
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names):,} class{'es' * (len(names) != 1)} ({listed})"


def _left_out(one: LabelledSet) -> str:
    reasons = left_out(one)
    if not reasons:
        return ""
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]))
    return f"; left out: {listed}"
