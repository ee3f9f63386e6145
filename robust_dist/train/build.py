"""From a recipe to the things that a run needs."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from robust_dist import own_code
from robust_dist.augment import RobustAugment
from robust_dist.data import load_dataset
from robust_dist.data.batches import Cut
from robust_dist.data.image_set import ImageSet, place
from robust_dist.data.loader import Loader
from robust_dist.data.sets import LabelledSet
from robust_dist.engines.launch import make_accelerator
from robust_dist.models.registry import check_output
from robust_dist.models.weights import head_of
from robust_dist.optim import param_groups
from robust_dist.ranks.talk import attempt, on_rank_0
from robust_dist.schedule import RobustSchedule
from robust_dist.schedule.curve import OwnDecay
from robust_dist.train.data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from robust_dist.train.optimizers import OptimizerConfig, check_fits, make_optimizer
from robust_dist.train.own_data import info_of
from robust_dist.train.recipe import Recipe
from robust_dist.train.rendezvous import init_method
from robust_dist.train.sources import (
    check_ranks_see_the_same,
    eval_in_memory,
    eval_stream,
    open_in_memory,
    open_streams,
    tell_cache,
    tell_decoder,
    tell_exif,
)

# Steps of a run at which a schedule of one's own is tried.
TRIED = 1000


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The engine of the run: ranks, devices, autocast, accumulation, the place of trackers.

    Raises:
        EngineError: A configuration for GPUs where there is none, or a mesh of another number of ranks.
    """
    torch.backends.cudnn.deterministic = recipe.precision.deterministic
    torch.backends.cudnn.benchmark = not recipe.precision.deterministic
    return make_accelerator(
        mixed_precision=recipe.precision.mixed,
        accumulation=recipe.accumulation,
        folder=recipe.run_dir,
        timeout=timedelta(seconds=recipe.timeout_seconds),
        init_method=init_method(),
    )


def load_sets(recipe: Recipe, accelerator: Accelerator) -> tuple[LabelledSet, LabelledSet]:
    """Training and evaluation images for this rank's device; one process a host fetches, the others wait.

    Raises:
        ValueError: On every rank, where the files are missing, torn, too large for the device, or not the same.
    """
    first, device = accelerator.is_local_main_process, accelerator.device

    def load(download: bool) -> tuple[LabelledSet, LabelledSet]:
        return open_sets(recipe.data, device, download=download)

    began = time.monotonic()
    sets = attempt(lambda: load(recipe.data.download), here=first)
    others = attempt(lambda: load(False), here=not first)
    loaded = sets or others
    assert loaded is not None
    check_ranks_see_the_same(*loaded)
    if recipe.data.in_memory:
        images = sum(map(len, loaded))
        accelerator.print(f"decoded {images:,} images in {time.monotonic() - began:.1f} s; they stay whole in memory")
    on_rank_0(lambda: tell_exif(recipe.data, *loaded))
    on_rank_0(lambda: tell_decoder(loaded[0]))
    on_rank_0(lambda: tell_cache(*loaded))
    return loaded


def open_sets(data: DataConfig, device: torch.device, *, download: bool) -> tuple[LabelledSet, LabelledSet]:
    """Training and evaluation images: streamed, or whole in memory, where `data.keep_on` says."""
    if own_code.is_name(data.name):
        data.check_own()
    if data.streamed:
        return open_streams(data, device, download=download)
    # The training images first: they are read more often.
    sets = (
        open_in_memory(data, download=download)
        if data.in_memory
        else [_set_by_name(data, train=part, download=download) for part in (True, False)]
    )
    train, test = place(sets, device, data.keep_on)
    return train, test


def open_eval_set(data: DataConfig, device: torch.device, classes: tuple[str, ...], *, download: bool) -> LabelledSet:
    """The evaluation images alone, as `open_sets` has them.

    Args:
        data: The recipe's section.
        device: Where they are given out.
        classes: Those of the training images.
        download: Whether missing files may be fetched.

    Raises:
        ValueError: The files are missing, torn, or of other classes.
    """
    if data.streamed:
        return eval_stream(data, device, classes, download=download)
    if data.in_memory:
        found = eval_in_memory(data, classes, download=download)
    else:
        found = _set_by_name(data, train=False, download=download)
    return place([found], device, data.keep_on)[0]


def _set_by_name(data: DataConfig, *, train: bool, download: bool) -> ImageSet:
    root = Path(data.root)
    if own_code.is_name(data.name):
        return info_of(data).loader(root, train, download)
    return load_dataset(data.name, root, train=train, download=download, own_files=data.own_files)


def build_loader(recipe: Recipe, accelerator: Accelerator, train_set: LabelledSet) -> Loader:
    """The order of the training images and this rank's part of each global batch."""
    cut = Cut(
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=recipe.accumulation,
        block=recipe.data.block,
        drop_last=recipe.data.drop_last,
    )
    return train_set.loader(cut)


class Preprocessing(NamedTuple):
    """Preparation of a set's images on the device: side in pixels, mean and std of each channel, own crop and flip.

    `crop` is padding in pixels: 0 for streamed sets, which were cropped at random before, and an eighth of the side for
    files kept in memory (4 pixels at 32, as for CIFAR).
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    flip: bool


def preprocessing_of(data: DataConfig, *, evaluation: bool = False) -> Preprocessing:
    """The preparation of training images, or of evaluation images.

    Raises:
        ValueError: An unknown data set.
    """
    if data.streamed or data.in_memory:
        size = data.eval_sides[0] if evaluation else data.size
        padding = round(size / 8) if data.in_memory else 0
        return Preprocessing(size, data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD, padding, True)
    info = info_of(data)
    return Preprocessing(info.size, info.mean, info.std, info.crop_padding, info.flip)


def build_augment(
    recipe: Recipe, num_classes: int, *, evaluation: bool = False, dtype: torch.dtype = torch.float32
) -> RobustAugment:
    """The training pipeline, with the data set's own crop and flip where the recipe leaves them open.

    Args:
        recipe: All settings.
        num_classes: Of the data set.
        evaluation: For the size of evaluation images, where only `normalize` is of use.
        dtype: Of the images given out; see `images_dtype`.
    """
    image = preprocessing_of(recipe.data, evaluation=evaluation)
    kept = {"block": recipe.data.block, "channels_last": recipe.model.channels_last}
    config = replace(recipe.augment, before=[], after=[]) if evaluation else recipe.augment
    return config.build(
        num_classes, image.size, image.mean, image.std, crop=image.crop, flip=image.flip, dtype=dtype, **kept
    )


def build_classifier(recipe: Recipe, num_classes: int, channels: int, *, contiguous: bool = False) -> nn.Module:
    """The model of the recipe; see `ModelConfig.build`. One of the user's own must give a logit a class."""
    model = recipe.model.build(num_classes, channels, seed=recipe.seed, contiguous=contiguous)
    if own_code.is_name(recipe.model.name):
        side = preprocessing_of(recipe.data).size
        check_output("model.name", recipe.model.name, model, (channels, side, side), num_classes)
    return model


def build_optimizer(recipe: Recipe, model: nn.Module, total_steps: int, *, num_classes: int | None = None) -> Optimizer:
    """The recipe's optimizer over the model's parameters, in one group where everything is decayed at one rate.

    Args:
        recipe: All settings.
        model: The classifier, before any engine wraps it.
        total_steps: Optimizer steps of the whole run, from which `optimizer.beta2: auto` follows.
        num_classes: The model's outputs, by which its head is known.

    Raises:
        ValueError: A setting that this optimizer cannot have.
        ImportError: Its package is not installed.
    """
    check_fits(recipe)
    groups = param_groups(model, recipe.optimizer.weight_decay, no_decay=tuple(recipe.optimizer.no_decay))
    if recipe.optimizer.head_lr_mult != 1:
        groups = _with_head_apart(groups, model, recipe.optimizer, num_classes)
    return make_optimizer(recipe.optimizer, groups, total_steps)


def _with_head_apart(
    groups: list[dict[str, Any]], model: nn.Module, config: OptimizerConfig, num_classes: int | None
) -> list[dict[str, Any]]:
    """The groups without the head's parameters, then those of the head with its own rate; never an empty group."""
    names = head_of(model, num_classes)
    head = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    rate = config.lr * config.head_lr_mult
    body, heads = (
        [group | {"params": [p for p in group["params"] if (id(p) in head) == is_head]} for group in groups]
        for is_head in (False, True)
    )
    found = [group for group in body if group["params"]], [group | {"lr": rate} for group in heads if group["params"]]
    if not all(found):
        what = "no linear layer with as many outputs as classes" if not names else "nothing but its head"
        raise ValueError(
            f"optimizer.head_lr_mult={config.head_lr_mult} needs a head with parameters of its own to train, and the "
            f"model has {what}; set it to 1"
        )
    return [*found[0], *found[1]]


def build_schedule(recipe: Recipe, optimizer: Optimizer, total_steps: int) -> RobustSchedule:
    """Learning rate and weight decay of every step."""
    arguments = recipe.schedule.arguments
    if own_code.is_name(recipe.schedule.name):
        arguments["decay"] = own_decay(recipe.schedule.name, total_steps)
    return RobustSchedule(optimizer, total_steps, **arguments)


def own_decay(name: str, total_steps: int) -> OwnDecay:
    """The schedule that is named as `module:Name`: from a step (from 0) and the total to the share of the base rate.

    Raises:
        OwnCodeError: It cannot be imported, is no function of two numbers, or gives something else than shares.
    """
    key = "schedule.name"
    made = own_code.load(key, name)
    if isinstance(made, type) or not callable(made):
        wanted = "a function of step and total_steps that returns the share of the learning rate"
        raise own_code.wrong(key, name, made, wanted)
    for step in range(0, total_steps, -(-total_steps // TRIED)):
        share = own_code.call(key, name, made, step, total_steps)
        if not isinstance(share, (int, float)) or not 0 <= share < math.inf:
            raise own_code.OwnCodeError(
                f"{key}={name!r} gives {share!r} at step {step} of {total_steps}; it must be finite and at least 0"
            )
    decay: OwnDecay = made
    return decay
