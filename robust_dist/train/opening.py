"""The first lines of a run: the data found, the work ahead, the backends used, and warnings."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator

from robust_dist.augment import RobustAugment
from robust_dist.data.image_set import SHARE, HostSet, ImageSet, free_bytes
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import printable
from robust_dist.engines.accelerate import cores_here
from robust_dist.measure.memory import text_of
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import agree
from robust_dist.schedule import base_optimizer
from robust_dist.train.data_record import left_out
from robust_dist.train.optimizers import chosen, second_beta
from robust_dist.train.recipe import Recipe

_NAMES = {"fused_triton": "fused (Triton)", "fused_cpu": "fused (C)", "single": "single-tensor"}
NAMED = 10


@dataclass(frozen=True)
class Backends:
    """The backends of a run, by the names in its first line and in `environment.json`.

    Attributes:
        optimizer: RAdaBeliefW's: "fused (Triton)", "fused (C)", "foreach" or "single-tensor"; None for another
            optimizer, and under an engine that fills the param groups only during a step.
        augmentation: "triton", "native", "torch" or "torch.compile".
    """

    optimizer: str | None
    augmentation: str


def backends_of(recipe: Recipe, accelerator: Accelerator, optimizer: Any, augment: RobustAugment) -> Backends:
    """The backends that this run uses; `optimizer` is as returned by the engine.

    Raises:
        ValueError: On every rank, if ranks would use different ones: backends round differently, so whole weights,
            which each rank updates itself, would drift apart.
    """
    compiled = recipe.augment.compile
    found = Backends(
        optimizer_backend(optimizer), "torch.compile" if compiled else augment.backend_for(accelerator.device)
    )
    agree(
        asdict(found),
        "the ranks would use different backends, which round differently; make the same one available to all (see "
        "robust-dist doctor on each host), or set optimizer.options.fused=false for all",
    )
    return found


def optimizer_backend(optimizer: Any) -> str | None:
    """The backend that steps RAdaBeliefW; see `Backends.optimizer`."""
    inner = base_optimizer(optimizer)
    name = inner.backend_in_use() if isinstance(inner, RAdaBeliefW) else None
    return None if name is None else _NAMES.get(name, name)


def part_lines(sets: Sequence[LabelledSet]) -> list[str]:
    """One line each for training and evaluation images: their number, classes, and what was left out."""
    train, test = sets
    first = f"train: {_count(len(train), 'image')} of {_classes(train.classes)}, {train.name}{_left_out(train)}"
    return [printable(line) for line in (first, f"eval: {_count(len(test), 'image')}, {test.name}{_left_out(test)}")]


def say_run(
    recipe: Recipe,
    accelerator: Accelerator,
    sets: Sequence[LabelledSet],
    trainer: Any,
    backends: Backends,
    warnings: Sequence[str],
) -> None:
    """Print the work ahead and, after `warnings`, anything else that is odd; `trainer` is the run's Trainer."""
    ranks_here = 0 if accelerator.device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    odd = [*warnings, *trainer.begun.warnings, *oddities(recipe, sets, trainer.total_steps, ranks_here)]
    print(
        run_line(recipe, accelerator, trainer, backends),
        *trainer.begun.lines,
        *(f"warning: {warning}" for warning in odd),
        sep="\n",
        flush=True,
    )


def run_line(recipe: Recipe, accelerator: Accelerator, trainer: Any, backends: Backends) -> str:
    """One line for the work ahead: model, steps, devices and backends; `trainer` is the run's Trainer."""
    steps, epochs = trainer.loader.steps_per_epoch, recipe.epochs
    ranks, device = accelerator.num_processes, accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    steps_by = "" if backends.optimizer is None else f" {backends.optimizer}"
    return (
        f"run: {recipe.model.name}, {trainer.num_parameters:,} parameters; {_count(epochs, 'epoch')} of "
        f"{_count(steps, 'step')} are {trainer.total_steps:,} steps of {recipe.batch_size:,} images; "
        f"{_count(ranks, 'rank')} on {name}; {recipe.optimizer.name}{steps_by}, "
        f"augmentation by {backends.augmentation}"
    )


def oddities(recipe: Recipe, sets: Sequence[LabelledSet], total_steps: int, ranks_here: int) -> list[str]:
    """Likely mistakes that are not errors, one per line.

    `ranks_here` is the number of ranks sharing this host's processor, 0 if they have GPUs.
    """
    train = sets[0]
    classes, cores = len(train.classes), cores_here()
    found = []
    if classes == 1:
        found.append(f"there is one class, {train.classes[0]!r}: every answer of the model is right ({train.name})")
    elif classes >= len(train):
        found.append(f"{len(train):,} training images have {classes:,} classes: is one image per class right?")
    if recipe.early_stopping.patience is not None:
        found += _early_stopping_doubts(recipe)
    given = "init_from" if recipe.init_from is not None else "model.weights" if recipe.model.weights else None
    if given is not None and recipe.optimizer.lr == "auto":
        found.append(
            f"optimizer.lr='auto' with {given}: small gradients of trained weights make the first rates large, which "
            "can undo the training; give a number"
        )
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


def _early_stopping_doubts(recipe: Recipe) -> list[str]:
    """What is planned for the full length, and so is cut short in a run that ends earlier."""
    schedule = recipe.schedule
    planned = [] if schedule.name == "constant" else [f"the learning rate's decay (schedule.name={schedule.name})"]
    if recipe.optimizer.weight_decay and schedule.weight_decay_off_at < 1:
        planned.append(f"the weight-decay switch (schedule.weight_decay_off_at={schedule.weight_decay_off_at:g})")
    if not planned:
        return []
    return [
        f"early_stopping.patience={recipe.early_stopping.patience}: {' and '.join(planned)} "
        f"{'is' if len(planned) == 1 else 'are'} planned over all {_count(recipe.epochs, 'epoch')}, so a run that "
        "stops early does not reach its end; a run of fewer epochs costs as little and completes its schedule"
    ]


def _steps_needed(recipe: Recipe, total_steps: int) -> int:
    """Roughly how many steps eq. 13's rectification holds the optimizer back; 0 if it has none."""
    if not chosen(recipe.optimizer).is_rectified:
        return 0
    return round(1 / (1 - second_beta(recipe.optimizer, total_steps)))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _classes(names: Sequence[str]) -> str:
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names):,} class{'es' * (len(names) != 1)} ({listed})"


def _left_out(dataset: LabelledSet) -> str:
    reasons = left_out(dataset)
    if not reasons:
        return ""
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]))
    return f"; left out: {listed}"


def data_notes(sets: Sequence[LabelledSet]) -> list[dict[str, Any]]:
    """The entries in `environment.json` for each set in memory.

    Returns:
        For each: its name, images, bytes, location, and how many of its bytes lie on the training device.
    """
    return [
        {
            "name": dataset.name,
            "images": len(dataset),
            "bytes": dataset.nbytes,
            "kept_on": str(dataset.device) if isinstance(dataset, ImageSet) else "host",
            "device_bytes": dataset.nbytes if isinstance(dataset, ImageSet) else 0,
        }
        for dataset in sets
        if isinstance(dataset, (ImageSet, HostSet))
    ]


def decoder_note(train: LabelledSet) -> dict[str, str]:
    """The entry in `environment.json` for the JPEG decoder during training; empty if nothing is decoded."""
    decoder = getattr(train, "decoder", None)
    if decoder is None:
        return {}
    from robust_dist.data.fast_decode import decoder_name

    return {"decode": f"{decoder}, by {decoder_name(decoder)}"}


def data_lines(sets: Sequence[LabelledSet], keep_on: str) -> list[str]:
    """One line for each memory that holds sets; `keep_on` is the recipe's."""
    placed = [dataset for dataset in sets if isinstance(dataset, ImageSet)]
    streamed = [dataset for dataset in sets if isinstance(dataset, HostSet)]
    lines = []
    if placed:
        device = placed[0].device
        free = free_bytes(device)
        left = "" if free is None else f" ({text_of(free)} free there)"
        lines.append(f"{_total(placed)} of data on {device}{left}: {_listed(placed)}")
    if streamed:
        where = f"in the host's memory{_reason(streamed[0].device, keep_on)}"
        lines.append(f"{_total(streamed)} of data {where}; batches are copied a step ahead: {_listed(streamed)}")
    return lines


def _reason(device: torch.device, keep_on: str) -> str:
    free = free_bytes(device)
    if keep_on == "host" or free is None:
        return f" (data.keep_on={keep_on})"
    return f", too much for {SHARE:.0%} of the {text_of(free)} free on {device} (data.keep_on={keep_on})"


def _total(sets: Sequence[ImageSet | HostSet]) -> str:
    return text_of(sum(dataset.nbytes for dataset in sets))


def _listed(sets: Sequence[ImageSet | HostSet]) -> str:
    return "; ".join(f"{dataset.name}, {text_of(dataset.nbytes)} in {len(dataset):,} images" for dataset in sets)
