"""Training with your own model, images, optimizer or augmentation, in a script, a notebook or `accelerate launch`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_dist.augment import RobustAugment
from robust_dist.augment.cutmix import soft_targets
from robust_dist.data.registry import DATASETS
from robust_dist.engines.engine import engine_of
from robust_dist.models.registry import MODELS, ModelInfo, check_output
from robust_dist.train.augment_config import AugmentConfig
from robust_dist.train.build import build_accelerator
from robust_dist.train.data_config import DataConfig
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import OWN
from robust_dist.train.main import train
from robust_dist.train.metrics import best_row
from robust_dist.train.optimizers import OPTIMIZERS, OptimizerChoice
from robust_dist.train.recipe import Recipe, load_recipe
from robust_dist.train.sources import image_set, info_of_sets, preprocessing_of

# The engine that this process has trained under, if it allows only one run per process.
_spent: list[str] = []
Augment = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        rows: The epochs, as in `metrics.jsonl`, oldest first.
        best: The row with the highest eval_accuracy; the newest in a tie.
        run_dir: The run's folder.
        checkpoint: Its newest checkpoint.
    """

    rows: list[dict[str, Any]]
    best: dict[str, Any]
    run_dir: Path
    checkpoint: Path

    @property
    def paths(self) -> dict[str, Path]:
        """The folder's contents by name: run_dir, checkpoint, recipe, data, metrics, curves and log."""
        files = {"recipe": "recipe.yaml", "data": "data.json", "metrics": "metrics.jsonl"}
        files |= {"curves": "curves.png", "log": "log.txt"}
        places = {"run_dir": self.run_dir, "checkpoint": self.checkpoint}
        places |= {name: self.run_dir / file for name, file in files.items()}
        return {name: path for name, path in places.items() if path.exists()}


def fit(
    recipe: Recipe | str | Path,
    *,
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    train_set: Any = None,
    eval_set: Any = None,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    augment: Augment | None = None,
    run_dir: str | Path | None = None,
) -> Result:
    """Train a recipe, with your own parts in place of those that it names.

    Otherwise the run follows the recipe: checkpoints, metrics and curves in its folder; the same call resumes it; under
    `accelerate launch` every rank calls it. A process may call it again, also in another precision, but not for two
    runs at a time; some engines allow one run per process, and a second call is an error.

    Args:
        recipe: All settings; or a YAML file; or the name of one of the package's recipes.
        model: From float images [B, C, H, W] to logits [B, classes]: a module, or a function of the number of classes,
            called with torch seeded by the recipe's seed. A module must have the same weights on every rank.
        train_set: An `ImageSet`; or a pair of images (uint8 [N, C, H, H]) and labels (int64 [N]); or a map-style data
            set of (PIL image or uint8 [C, H, H], label) with images of one size, which is read once into memory. Its
            mean and standard deviation normalise the images, and random crops are padded by an eighth of the side.
        eval_set: The same for evaluation; required with `train_set`, and not allowed without it.
        optimizer: From param groups, which have the recipe's weight decay, to the optimizer; its rates are scheduled.
        augment: From images (uint8 [B, C, H, H]), labels (int64 [B]) and keys (int64 [B]; one per sample and epoch) to
            float images and targets (int64 [B] or float [B, classes]) on the images' device, in place of the recipe's
            pipeline.
        run_dir: In place of the recipe's.

    Raises:
        ValueError: A setting or a part cannot be used; raised before the first step.
        DivergedError: The loss is no longer finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if run_dir is not None:
        recipe = replace(recipe, run_dir=str(run_dir))
    if (train_set is None) != (eval_set is None):
        given, missing = ("train_set", "eval_set") if eval_set is None else ("eval_set", "train_set")
        raise ValueError(f"{given} is given but {missing} is not; give both, or neither to use the recipe's data")
    with contextlib.ExitStack() as parts:
        if train_set is not None:
            first = image_set(train_set, "train_set")
            sets = first, image_set(eval_set, "eval_set", first.classes)
            parts.enter_context(_named(DATASETS, info_of_sets(*sets)))
            of = recipe.data
            recipe = replace(recipe, data=DataConfig(OWN, block=of.block, drop_last=of.drop_last, keep_on=of.keep_on))
        if model is not None:
            parts.enter_context(
                _named(MODELS, ModelInfo("given to fit", 0, _builder(model, preprocessing_of(recipe.data).size)))
            )
            recipe = replace(recipe, model=replace(recipe.model, name=OWN))
        if optimizer is not None:
            choice = OptimizerChoice(make=lambda groups, **_: optimizer(groups))
            parts.enter_context(_named(OPTIMIZERS, choice))
            recipe = replace(recipe, optimizer=replace(recipe.optimizer, name=OWN))
        if augment is not None:
            stages = recipe.augment.before + recipe.augment.after
            if stages:
                raise ValueError(
                    f"augment is given, but the recipe has stages of its own ({', '.join(stages)}); drop one of them"
                )
            recipe = replace(recipe, augment=_with_pipeline(recipe.augment, augment))
        rows = _train(recipe)
    folder = RunFolder(recipe.run_dir)
    newest = max(folder.checkpoints.glob("step-*"))
    return Result(rows, best_row(rows) or rows[-1], folder.path, newest)


def _train(recipe: Recipe) -> list[dict[str, Any]]:
    """Train in a process that may train again in another precision, although Accelerate's state is per process."""
    if is_initialized():
        found = AcceleratorState().mixed_precision
        if found != recipe.precision.mixed:
            raise ValueError(
                f"precision.mixed={recipe.precision.mixed!r}, but this process has an Accelerator of its own with "
                f"mixed_precision={found!r}: set the same, or let fit create the only one"
            )
        return train(recipe)
    if _spent:
        raise ValueError(
            f"this process has trained under {_spent[0]}, which allows one run per process: start one process per run"
        )
    try:
        accelerator = build_accelerator(recipe)
        if engine_of(accelerator).trains_once:
            _spent.append(engine_of(accelerator).title(accelerator))
        return train(recipe, accelerator)
    finally:
        if is_initialized():
            # The run's end closed the process group; the next run opens its own.
            vars(AcceleratorState()).clear()
            vars(PartialState()).clear()


def _builder(model: nn.Module | Callable[[int], nn.Module], side: int) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
        if options:
            raise ValueError(f"model.options={options} are for a model named in the recipe; leave them out")
        made = model if isinstance(model, nn.Module) else model(num_classes)
        check_output("model", type(made).__name__, made, (in_channels, side, side), num_classes)
        return made

    return build


@contextlib.contextmanager
def _named(registry: dict[str, Any], entry: Any) -> Iterator[None]:
    registry[OWN] = entry
    try:
        yield
    finally:
        del registry[OWN]


class _OwnPipeline(nn.Module):
    """The caller's augmentation, with the rest of the recipe's pipeline."""

    def __init__(self, pipeline: RobustAugment, own: Augment) -> None:
        super().__init__()
        self.pipeline, self.own = pipeline, own
        self.image_shape, self.normalize = pipeline.image_shape, pipeline.normalize

    def backend_for(self, device: torch.device) -> str:
        return OWN

    def forward(
        self, images: Tensor, labels: Tensor, keys: Tensor, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if index is not None:
            images, labels = images.index_select(0, index), labels.index_select(0, index)
        images, targets = self.own(images, labels, keys)
        return images, targets if targets.is_floating_point() else soft_targets(targets, self.pipeline.num_classes)


def _with_pipeline(config: AugmentConfig, own: Augment) -> AugmentConfig:
    class OwnAugment(type(config)):  # type: ignore[misc]
        def build(self, *image: Any, **given: Any) -> nn.Module:
            return _OwnPipeline(super().build(*image, **given), own)

    made = OwnAugment(**vars(config))
    assert isinstance(made, AugmentConfig)
    return made
