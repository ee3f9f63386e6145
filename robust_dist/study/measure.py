"""The cost of a study: hours by steps of the training loop timed here, and estimated for a GPU that is not here."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from robust_dist.data import dataset_info
from robust_dist.measure.dispatch import FakeTensorMode, Operation, Operations
from robust_dist.measure.gpus import Gpu, find_gpu
from robust_dist.study.grid import Study
from robust_dist.train.build import build_accelerator, build_classifier
from robust_dist.train.data_config import DataConfig
from robust_dist.train.keys import keys_of
from robust_dist.train.loop import Trial, random_set
from robust_dist.train.recipe import Recipe, flatten, recipe_dict
from robust_dist.train.sources import open_sets, preprocessing_of
from robust_dist.train.step import summed_loss

# Sizes of the sets that may have to be downloaded first.
_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "fashion_mnist": (60_000, 10_000)}
_SECONDS = 8.0
_STEPS = 20
# All of these are assumptions: shares of the peak rates that an operation reaches, and the host's time to start one.
ARITHMETIC_SHARE, MEMORY_SHARE, START_SECONDS = 0.35, 0.8, 10e-6
OPTIMIZER_BYTES = 28  # a parameter


@dataclass(frozen=True)
class Cost:
    """The cost of a run on this machine: optimizer steps, measured seconds of a step, and of all evaluations."""

    steps: int
    step_seconds: float
    eval_seconds: float

    @property
    def hours(self) -> float:
        """Hours of the run, without its start."""
        return (self.steps * self.step_seconds + self.eval_seconds) / 3600


@dataclass(frozen=True)
class Facts:
    """A data set's numbers of training images, evaluation images, classes and channels."""

    train: int
    eval: int
    classes: int
    channels: int


def facts(data: DataConfig) -> Facts:
    """The sizes of the data; nothing is downloaded.

    Raises:
        ValueError: The data is not on this machine, and its size is not known.
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
    """Every cell's cost by its name; recipes that differ only in settings without cost are measured once."""
    measured: dict[str, tuple[float, float]] = {}
    found = {}
    for cell in study.cells():
        recipe = recipes[cell.name]
        flat = flatten(recipe_dict(recipe))
        key = str(sorted((name, str(value)) for name, value in flat.items() if keys_of(Recipe).is_costly(name)))
        if key not in measured:
            measured[key] = measure(recipe)
        step, image = measured[key]
        found[cell.name] = Cost(steps_of(recipe), step, recipe.epochs * facts(recipe.data).eval * image)
    return found


def measure(recipe: Recipe) -> tuple[float, float]:
    """Seconds of an optimizer step, and of the evaluation of an image, on this machine's first device.

    The step is the training loop's own, in one process on random images (without reading and decoding); the median of
    up to 20 steps, or of as many as fit into 8 seconds. On a CPU, bf16 is measured in place of fp16.
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
    """An Accelerator of its own: recipes differ in precision, and a process has one for all."""
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


def operations(model: nn.Module, images: Tensor, precision: str) -> tuple[list[Operation], list[Operation]]:
    """The operations of a forward pass, and of a forward and backward pass, of a model on fake tensors.

    Args:
        model: Its tensors are fake.
        images: Fake tensor, [B, C, H, W].
        precision: "no", "bf16" or "fp16"; the last two are both counted as bfloat16.
    """
    count = Operations()
    with count:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
            logits = model(images)
        forward = len(count.found)
        summed_loss(logits, torch.zeros_like(logits), None, 0.0).backward()
    return count.found[:forward], count.found


def seconds(found: list[Operation], gpu: Gpu, precision: str) -> float:
    """Estimated seconds of operations in sequence on the device, or of starting them where that takes longer."""
    peak = 1e12 * ARITHMETIC_SHARE * gpu.tflops(precision)
    rate = 1e9 * MEMORY_SHARE * gpu.memory_gbytes
    on_device = sum(max(operation.flops / peak, operation.bytes / rate) for operation in found)
    return max(on_device, START_SECONDS * len(found))


def run_hours(recipe: Recipe, gpu: Gpu) -> float:
    """Estimated hours of a run on one GPU: forward, backward, update, evaluation; not augmentation, data and start."""
    known, precision = facts(recipe.data), recipe.precision.mixed
    side = preprocessing_of(recipe.data, evaluation=False).size
    # Fake tensors are built in one layout; another one moves as many bytes.
    plain = replace(recipe, model=replace(recipe.model, channels_last=False))
    # Some constructors read a value, which a fake tensor has not.
    with torch.device("meta"):
        model = build_classifier(plain, known.classes, known.channels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.empty(recipe.batch_size, known.channels, side, side)
        forward, both = operations(model, images, precision)
    update = OPTIMIZER_BYTES * sum(p.numel() for p in model.parameters()) / (1e9 * MEMORY_SHARE * gpu.memory_gbytes)
    step = seconds(both, gpu, precision) + max(update, START_SECONDS)
    batches = recipe.epochs * -(-known.eval // recipe.batch_size)
    return (steps_of(recipe) * step + batches * seconds(forward, gpu, precision)) / 3600


def gpu_hours(study: Study, recipes: dict[str, Recipe], name: str) -> str:
    """The line that `--dry-run` adds on a machine without a GPU: hours on the GPU of that name.

    Raises:
        ValueError: The table has no such GPU.
    """
    gpu = find_gpu(name)
    known: dict[str, float] = {}
    hours = 0.0
    for cell in study.cells():
        recipe = recipes[cell.name]
        flat = recipe_dict(recipe)
        key = str([flat[part] for part in ("data", "model", "precision", "batch_size", "epochs")])
        if key not in known:
            known[key] = run_hours(recipe, gpu)
        hours += len(study.seeds) * known[key]
    return (
        f"{hours:.0f} GPU hours of {name.lower()} by an estimate, not measured: an operation takes the host "
        f"{START_SECONDS * 1e6:.0f} us, or the GPU as long as {ARITHMETIC_SHARE:.0%} of its peak arithmetic or "
        f"{MEMORY_SHARE:.0%} of its memory's rate allow"
    )


def estimate(study: Study, recipes: dict[str, Recipe], gpu: str = "h100") -> str:
    """The cost of a study as `--dry-run` shows it: cells, runs, steps, and hours from steps measured on this machine.

    Args:
        study: The study.
        recipes: Every cell's recipe by the cell's name.
        gpu: The GPU whose hours are estimated if there is none to measure on.

    Raises:
        ValueError: The table has no such GPU.
    """
    elsewhere = None if torch.cuda.is_available() else gpu_hours(study, recipes, gpu)
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
    if elsewhere is None:
        lines.append(f"{hours:.1f} GPU hours, without the runs' starts; N workers on N GPUs need 1/N of that")
    else:
        lines += [f"{hours:.1f} hours with one worker of these threads, without the runs' starts", elsewhere]
    return "\n".join(lines)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread(s)"
