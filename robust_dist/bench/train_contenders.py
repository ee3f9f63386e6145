"""Trainers that step over random images for ever, each with its own way of augmenting."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from robust_dist.bench.augment_peers import BACKENDS
from robust_dist.data import Batch, ImageSet
from robust_dist.train.data_config import DataConfig
from robust_dist.train.engine import fit_engine
from robust_dist.train.folder import RunFolder
from robust_dist.train.loop import Trainer
from robust_dist.train.recipe import AugmentConfig, ModelConfig, PrecisionConfig, Recipe, TrackingConfig

NONE, COMPILED, GRAPH = "none", "torch, compiled", "the whole step as a CUDA graph"
_STEPS = 16  # of an epoch
_WITHOUT = AugmentConfig(crop=0, flip=False, trivial=False, cutmix=False)


@dataclass(frozen=True)
class Settings:
    """What all contenders have in common: images a step, their side in pixels, autocast ("no" or "bf16")."""

    batch: int
    precision: Any
    device: torch.device


def random_set(settings: Settings) -> ImageSet:
    """An epoch of noise on the device."""
    count, generator = settings.batch * _STEPS, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    classes = tuple(str(number) for number in range(10))
    return ImageSet(images.to(settings.device), labels.to(settings.device), classes, "random images")


def _recipe(model: str, settings: Settings) -> Recipe:
    return Recipe(
        data=DataConfig(name="cifar10"),
        model=ModelConfig(name=model),
        precision=PrecisionConfig(mixed=settings.precision, deterministic=False),
        tracking=TrackingConfig(trackers=[], progress=False),
        batch_size=settings.batch,
        epochs=10_000,
    )


def recipes(model: str, settings: Settings, compiled: bool, cuda_graph: bool) -> dict[str, tuple[Recipe, str | None]]:
    """Name to a recipe and the backend that augments; None for the recipe's own choice."""
    plain = _recipe(model, settings)
    found: dict[str, tuple[Recipe, str | None]] = {NONE: (replace(plain, augment=_WITHOUT), None)}
    found |= {name: (plain, name) for name in BACKENDS}
    if compiled:
        found[COMPILED] = replace(plain, augment=AugmentConfig(compile=True)), None
    if cuda_graph:
        found[GRAPH] = replace(plain, cuda_graph=True), None
    return found


class Contender:
    """A trainer that steps over random images for ever.

    Args:
        recipe: Of the run.
        backend: Of the augmentation; None leaves the recipe's choice.
        images: The training set, on the device.
        accelerator: The engine.
        folder: A folder for the run; nothing is kept in it.
    """

    def __init__(
        self, recipe: Recipe, backend: str | None, images: ImageSet, accelerator: Accelerator, folder: Path
    ) -> None:
        recipe = replace(recipe, run_dir=str(folder))
        fit_engine(accelerator, recipe)
        self.trainer = Trainer(recipe, accelerator, RunFolder(folder), images, images)
        for module in self.trainer.augment.modules():
            if backend is not None and hasattr(module, "backend"):
                cast(Any, module).backend = backend
        self.trainer.model.train()
        self.trainer.optimizer.train()
        self.parts = self._parts()
        self.batch = next(self.parts)[0]

    def step(self) -> None:
        """One optimizer step on the next batch."""
        self.trainer._train_step(next(self.parts))

    def augment(self) -> tuple[Tensor, Tensor]:
        """The augmentation of one batch, always the same."""
        return self.batch.augmented(self.trainer.step.pipeline)

    def _parts(self) -> Iterator[list[Batch]]:
        for epoch in itertools.count():
            yield from self.trainer.loader.epoch(epoch)
