"""What a study costs: its runs, its steps, and the hours that a measured step makes of them."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from robust_dist.augment import sample_keys
from robust_dist.data import dataset_info, load_dataset
from robust_dist.study.grid import Study
from robust_dist.train.build import build_augment, build_classifier, build_optimizer
from robust_dist.train.recipe import Recipe, flatten, recipe_dict

# Sizes of the sets that may have to be fetched first.
_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "fashion_mnist": (60_000, 10_000)}
# What makes a step take longer; the rest of a recipe does not.
_COSTLY = ("data.name", "model.", "optimizer.name", "optimizer.clip_norm", "augment.", "precision.", "batch_size")
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


def sizes(recipe: Recipe) -> tuple[int, int]:
    """Training and evaluation images of the recipe's data; nothing is fetched.

    Raises:
        ValueError: The data is not here, and no set whose size is known.
    """
    return _SIZES.get(recipe.data.name) or _loaded_sizes(recipe.data.name, recipe.data.root)


@cache
def _loaded_sizes(name: str, root: str) -> tuple[int, int]:
    train, test = (load_dataset(name, root, train=part, download=False) for part in (True, False))
    return len(train), len(test)


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of a run."""
    images = sizes(recipe)[0]
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
        found[cell.name] = Cost(steps_of(recipe), step, recipe.epochs * sizes(recipe)[1] * image)
    return found


def _cost_key(recipe: Recipe) -> str:
    flat = flatten(recipe_dict(recipe))
    return str(sorted((key, str(value)) for key, value in flat.items() if key.startswith(_COSTLY)))


def measure(recipe: Recipe) -> tuple[float, float]:
    """Seconds of one optimizer step, and of the evaluation of one image, on this machine's first device.

    The step is augmentation, forward and backward pass, and update, on one process and random images; the median of
    up to 20 steps, or of as many as 8 seconds hold.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = dataset_info(recipe.data.name)
    torch.manual_seed(0)
    shape = (recipe.batch_size, info.channels, info.size, info.size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(info.num_classes, (recipe.batch_size,), device=device)
    keys = sample_keys(0, 0, torch.arange(recipe.batch_size, device=device))
    augment = build_augment(recipe, info.num_classes).to(device)
    model = build_classifier(recipe, info.num_classes, info.channels).to(device)
    optimizer = build_optimizer(recipe, model, max(100, steps_of(recipe)))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision.mixed]
    autocast: dict[str, Any] = {"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32}

    def step() -> None:
        prepared, targets = augment(images, labels, keys)
        with torch.autocast(**autocast):
            logits = model(prepared)
        nn.functional.cross_entropy(logits.float(), targets).backward()
        if recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def look() -> None:
        with torch.no_grad(), torch.autocast(**autocast):
            model(augment.normalize(images))

    if hasattr(optimizer, "train"):
        optimizer.train()
    of_step = _median_seconds(step, device)
    model.eval()
    return of_step, _median_seconds(look, device) / recipe.batch_size


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


def estimate(study: Study, recipes: dict[str, Recipe]) -> str:
    """What `--dry-run` says: cells, runs, steps and hours, from steps measured now on this machine."""
    found = costs(study, recipes)
    seeds = len(study.seeds)
    hours = seeds * sum(cost.hours for cost in found.values())
    steps = sorted({cost.steps for cost in found.values()})
    fastest, slowest = (bound(cost.step_seconds for cost in found.values()) for bound in (min, max))
    spread = f"{1000 * fastest:.1f}" + (f" to {1000 * slowest:.1f}" if slowest > fastest else "")
    lines = [
        f"{study.name}: {len(found)} cells x {seeds} seeds = {len(found) * seeds} runs of "
        f"{' to '.join(f'{count:,}' for count in dict.fromkeys((steps[0], steps[-1])))} steps",
        f"a step, measured: {spread} ms on {_device()}",
    ]
    if torch.cuda.is_available():
        lines.append(f"{hours:.1f} GPU hours, without the runs' starts; N workers on N GPUs need 1/N of that")
    else:
        lines.append(
            f"{hours:.1f} hours with one worker of these threads, without the runs' starts; GPU hours are not measured "
            "here: this machine has no GPU"
        )
    return "\n".join(lines)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread(s)"
