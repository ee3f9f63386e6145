"""What a study costs: its runs, its steps, and the hours that a measured step makes of them."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_dist.augment import sample_keys
from robust_dist.data import dataset_info
from robust_dist.study.grid import Study
from robust_dist.train.build import build_augment, build_classifier, build_optimizer, open_sets, preprocessing_of
from robust_dist.train.data_config import DataConfig
from robust_dist.train.images_dtype import images_dtype
from robust_dist.train.keys import keys_of
from robust_dist.train.loss import summed_loss
from robust_dist.train.recipe import Recipe, flatten, recipe_dict

# Sizes of the sets that may have to be fetched first.
_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "fashion_mnist": (60_000, 10_000)}
_SECONDS = 8.0
_STEPS = 20


@dataclass(frozen=True)
class Cost:
    """What one run costs on the device at hand.

    Attributes:
        steps: Optimizer steps.
        step_seconds: Of one, measured.
        eval_seconds: Of all evaluations.
    """

    steps: int
    step_seconds: float
    eval_seconds: float

    @property
    def hours(self) -> float:
        """Of the run, without its start."""
        return (self.steps * self.step_seconds + self.eval_seconds) / 3600


@dataclass(frozen=True)
class Facts:
    """What is known of a data set: training and evaluation images, classes, channels."""

    train: int
    eval: int
    classes: int
    channels: int


def facts(data: DataConfig) -> Facts:
    """The data's facts; nothing is fetched.

    Raises:
        ValueError: The data is not here, and no set whose size is known.
    """
    key = str(data)
    if key not in _known:
        _known[key] = _facts(data)
    return _known[key]


_known: dict[str, Facts] = {}


def _facts(data: DataConfig) -> Facts:
    if data.name in _SIZES:
        info = dataset_info(data.name)
        return Facts(*_SIZES[data.name], info.num_classes, info.channels)
    train, test = open_sets(data, torch.device("cpu"), download=False)
    return Facts(len(train), len(test), len(train.classes), train.channels)


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of a run."""
    images = facts(recipe.data).train
    whole = images // recipe.batch_size if recipe.data.drop_last else -(-images // recipe.batch_size)
    return recipe.epochs * whole


def costs(study: Study, recipes: dict[str, Recipe]) -> dict[str, Cost]:
    """Every cell's cost by its name; recipes that differ in nothing costly are measured once.

    Raises:
        ValueError: The size of the data is not known.
    """
    measured: dict[str, tuple[float, float]] = {}
    found = {}
    for cell in study.cells():
        recipe = recipes[cell.name]
        key = _cost_key(recipe)
        if key not in measured:
            measured[key] = measure(recipe)
        step, image = measured[key]
        found[cell.name] = Cost(steps_of(recipe), step, recipe.epochs * facts(recipe.data).eval * image)
    return found


def _cost_key(recipe: Recipe) -> str:
    flat = flatten(recipe_dict(recipe))
    return str(sorted((key, str(value)) for key, value in flat.items() if keys_of(Recipe).is_costly(key)))


def measure(recipe: Recipe) -> tuple[float, float]:
    """Seconds of one optimizer step, and of the evaluation of one image, on this machine's first device.

    The step is augmentation, forward and backward pass, and update, on one process and random images (reading
    and decoding of streamed ones is not in it); the median of up to 20 steps, or of as many as 8 seconds hold.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = facts(recipe.data)
    torch.manual_seed(0)
    images, held_out = (_noise(recipe, known.channels, device, evaluation=one) for one in (False, True))
    labels = torch.randint(known.classes, (recipe.batch_size,), device=device)
    keys = sample_keys(0, 0, torch.arange(recipe.batch_size, device=device))
    model = build_classifier(recipe, known.classes, known.channels).to(device)
    prepared = images_dtype(recipe.precision.mixed, model, known.channels, preprocessing_of(recipe.data).size)
    augment = build_augment(recipe, known.classes, dtype=prepared).to(device)
    normalize = build_augment(recipe, known.classes, evaluation=True).to(device).normalize
    optimizer = build_optimizer(recipe, model, max(100, steps_of(recipe)))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision.mixed]
    autocast: dict[str, Any] = {"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32}

    def step() -> None:
        prepared, targets = augment(images, labels, keys)
        with torch.autocast(**autocast):
            logits = model(prepared)
        (summed_loss(logits, targets, None, recipe.label_smoothing) / recipe.batch_size).backward()
        if recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def look() -> None:
        with torch.no_grad(), torch.autocast(**autocast):
            model(normalize(held_out))

    if hasattr(optimizer, "train"):
        optimizer.train()
    of_step = _median_seconds(step, device)
    model.eval()
    return of_step, _median_seconds(look, device) / recipe.batch_size


def _noise(recipe: Recipe, channels: int, device: torch.device, *, evaluation: bool) -> Tensor:
    side = preprocessing_of(recipe.data, evaluation=evaluation).size
    shape = (recipe.batch_size, channels, side, side)
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def _median_seconds(action: Any, device: torch.device) -> float:
    began = time.perf_counter()
    times: list[float] = []
    while len(times) <= _STEPS and (len(times) < 3 or time.perf_counter() - began < _SECONDS):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # The first one warms up.
    return sorted(times[1:])[len(times[1:]) // 2]
