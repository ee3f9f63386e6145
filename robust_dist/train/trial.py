"""A run on random images, for measurements: the trainer's own steps and evaluation, of which nothing is kept."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from robust_dist.data import Batch, ImageSet
from robust_dist.train.folder import RunFolder
from robust_dist.train.loop import Trainer
from robust_dist.train.recipe import Recipe

# More than anyone measures, so that the schedule does not end.
_EPOCHS = 10_000


def random_set(count: int, shape: Sequence[int], num_classes: int, device: torch.device) -> ImageSet:
    """A set of noise on the device, the same at each call: uint8 [count, *shape] (C, H, W) and int64 labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    return ImageSet(images.to(device), labels.to(device), tuple(map(str, range(num_classes))), "random images")


class Trial:
    """A trainer that steps over random images without end; nothing is kept in its folder.

    The recipe's engine must have been fitted (`fit_engine`), and both sets lie on the device. A setting that cannot
    work is a ValueError.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, folder: Path, train_set: ImageSet, test_set: ImageSet
    ) -> None:
        tracking = replace(recipe.tracking, trackers=[], progress=False)
        recipe = replace(recipe, run_dir=str(folder), epochs=_EPOCHS, num_processes=None, tracking=tracking)
        # Which weights it begins with changes no step's cost.
        model = replace(recipe.model, weights=None)
        recipe = replace(recipe, model=model, init_from=None, init_checkpoint="last")
        self.trainer = Trainer(recipe, accelerator, RunFolder(folder), train_set, test_set)
        self.trainer.model.train()
        self.trainer.optimizer.train()
        self.parts = self._parts()
        self.batch = next(self.parts)[0]

    def step(self) -> None:
        """One optimizer step on the next batch."""
        self.trainer.train_step(next(self.parts))

    def augment(self) -> tuple[Tensor, Tensor]:
        """The augmentation of one batch, always the same."""
        return self.batch.augmented(self.trainer.step.pipeline)

    def evaluate(self) -> None:
        """One evaluation of all evaluation images."""
        self.trainer.evaluate()

    def _parts(self) -> Iterator[list[Batch]]:
        for epoch in itertools.count():
            yield from self.trainer.loader.epoch(epoch)
