"""The cost of a study: its runs, its steps, and their hours by a measured step.

The step that is measured is a run's own, `train.step.TrainStep`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from robust_dist.data import dataset_info
from robust_dist.study.grid import Study
from robust_dist.train.build import build_accelerator
from robust_dist.train.data_config import DataConfig
from robust_dist.train.keys import keys_of
from robust_dist.train.loop import Trial, random_set
from robust_dist.train.recipe import Recipe, flatten, recipe_dict
from robust_dist.train.sources import open_sets, preprocessing_of

# Sizes of the sets that may have to be fetched first.
_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "fashion_mnist": (60_000, 10_000)}
_SECONDS = 8.0
_STEPS = 20


@dataclass(frozen=True)
class Cost:
    """The cost of one run on the device at hand.

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
        """Seconds of the run, without its start."""
        return (self.steps * self.step_seconds + self.eval_seconds) / 3600


@dataclass(frozen=True)
class Facts:
    """The sizes of a data set: training and evaluation images, classes, channels."""

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

    The step is the training loop's own on one process and random images (reading and decoding of streamed ones is not
    in it); the median of up to 20 steps, or of as many as 8 seconds hold. On a processor, which has no fp16, bf16 is
    measured in its place.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        recipe = replace(recipe, cuda_graph=False)
        if recipe.precision.mixed == "fp16":
            recipe = replace(recipe, precision=replace(recipe.precision, mixed="bf16"))
    classes = facts(recipe.data).classes
    train_set = random_set(2 * recipe.batch_size, _shape(recipe, evaluation=False), classes, device)
    test_set = random_set(recipe.batch_size, _shape(recipe, evaluation=True), classes, device)
    with tempfile.TemporaryDirectory() as folder, _own_accelerator(recipe) as accelerator:
        trial = Trial(recipe, accelerator, Path(folder), train_set, test_set)
        return _median_seconds(trial.step, device), _median_seconds(trial.evaluate, device) / recipe.batch_size


def _shape(recipe: Recipe, *, evaluation: bool) -> tuple[int, int, int]:
    side = preprocessing_of(recipe.data, evaluation=evaluation).size
    return facts(recipe.data).channels, side, side


@contextmanager
def _own_accelerator(recipe: Recipe) -> Iterator[Accelerator]:
    """An Accelerator that leaves nothing behind: recipes differ in precision, of which a process has one."""
    AcceleratorState._reset_state(True)
    try:
        yield build_accelerator(recipe)
    finally:
        AcceleratorState._reset_state(True)


def _median_seconds(action: Callable[[], None], device: torch.device) -> float:
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
