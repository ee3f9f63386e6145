"""The estimate of `--dry-run`: hours by measured steps here, and for a GPU elsewhere by counted operations."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from robust_dist.measure.dispatch import FakeTensorMode, Operation, Operations
from robust_dist.measure.gpus import Gpu, find_gpu
from robust_dist.study.grid import Study
from robust_dist.study.measure import costs, facts, steps_of
from robust_dist.train.build import build_classifier
from robust_dist.train.recipe import Recipe, recipe_dict
from robust_dist.train.sources import preprocessing_of
from robust_dist.train.step import summed_loss

# Assumptions, all of them: shares of the peak rates that an operation reaches, and what the host needs to start one.
ARITHMETIC_SHARE, MEMORY_SHARE, START_SECONDS = 0.35, 0.8, 10e-6
OPTIMIZER_BYTES = 28  # a parameter


def operations(model: nn.Module, images: Tensor, precision: str) -> tuple[list[Operation], list[Operation]]:
    """The operations of a forward pass, and of a forward and a backward pass, of a model on fake tensors.

    Args:
        model: Of fake tensors.
        images: [B, C, H, W], fake.
        precision: "no", "bf16" or "fp16"; the last two are counted as bfloat16.
    """
    count = Operations()
    with count:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
            logits = model(images)
        forward = len(count.found)
        summed_loss(logits, torch.zeros_like(logits), None, 0.0).backward()
    return count.found[:forward], count.found


def seconds(found: list[Operation], gpu: Gpu, precision: str) -> float:
    """Estimated seconds of operations, one after the other on the device, or of the host where it is the slower one."""
    peak = 1e12 * ARITHMETIC_SHARE * gpu.tflops(precision)
    rate = 1e9 * MEMORY_SHARE * gpu.memory_gbytes
    on_device = sum(max(one.flops / peak, one.bytes / rate) for one in found)
    return max(on_device, START_SECONDS * len(found))


def run_hours(recipe: Recipe, gpu: Gpu) -> float:
    """Estimated hours of a run on one GPU: forward, backward, update, evaluation; not augmentation, data and start."""
    known, precision = facts(recipe.data), recipe.precision.mixed
    side = preprocessing_of(recipe.data, evaluation=False).size
    # Fake tensors are built in one layout; another one moves as many bytes.
    plain = replace(recipe, model=replace(recipe.model, channels_last=False))
    with FakeTensorMode():
        model = build_classifier(plain, known.classes, known.channels)
        images = torch.empty(recipe.batch_size, known.channels, side, side)
        forward, both = operations(model, images, precision)
    update = OPTIMIZER_BYTES * sum(p.numel() for p in model.parameters()) / (1e9 * MEMORY_SHARE * gpu.memory_gbytes)
    step = seconds(both, gpu, precision) + max(update, START_SECONDS)
    batches = recipe.epochs * -(-known.eval // recipe.batch_size)
    return (steps_of(recipe) * step + batches * seconds(forward, gpu, precision)) / 3600


def gpu_hours(study: Study, recipes: dict[str, Recipe], name: str) -> str:
    """The line that `--dry-run` adds where there is no GPU.

    Args:
        study: The study.
        recipes: Every cell's recipe by the cell's name.
        name: The GPU, of robust_dist/measure/gpus.py.

    Raises:
        ValueError: There is no such GPU in the table.
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
        gpu: The one whose hours are estimated where there is none to measure on.

    Raises:
        ValueError: That GPU is not in the table.
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
