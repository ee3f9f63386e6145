"""Images per second of whole training steps, and augmentation's share of them: `robust-dist bench train`."""

import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from robust_dist.bench.augment_peers import BACKENDS
from robust_dist.bench.timing import (
    Bar,
    Panel,
    Result,
    Timing,
    interleaved,
    machine,
    pick_device,
    reason,
    thread_count,
    write,
)
from robust_dist.data import ImageSet
from robust_dist.measure.table import table
from robust_dist.train.build import fit_engine
from robust_dist.train.data_config import DataConfig
from robust_dist.train.loop import Trial, random_set
from robust_dist.train.recipe import AugmentConfig, ModelConfig, PrecisionConfig, Recipe
from robust_dist.validate import whole_number

MODELS = ("resnet56", "resnet18_cifar")
NONE, COMPILED, GRAPH = "none", "torch, compiled", "the whole step as a CUDA graph"
_ALONE = "alone: "
_STEPS = 16  # of an epoch
_WITHOUT = AugmentConfig(crop=0, flip=False, trivial=False, cutmix=False)


@dataclass(frozen=True)
class Settings:
    """The settings that all contenders share.

    Attributes:
        batch: Images per step, of 32 x 32 pixels.
        precision: Autocast, "no" or "bf16".
        device: Where they train.
    """

    batch: int
    precision: Any
    device: torch.device


@dataclass(frozen=True)
class Row:
    """One model with one kind of augmentation.

    Attributes:
        model: Its name.
        batch: Images a step.
        augmentation: "none" (images are normalised only), or the backend.
        timing: Seconds per step of augmentation, forward and backward pass, and update.
        alone: Seconds that the augmentation alone takes.
        share: The median of `alone` divided by that of `timing`; None for a captured step, where it takes less.
        to_none: Images per second divided by those without augmentation.
    """

    model: str
    batch: int
    augmentation: str
    timing: Timing
    alone: Timing
    share: float | None
    to_none: float


def _recipes(model: str, settings: Settings, compiled: bool, cuda_graph: bool) -> dict[str, tuple[Recipe, str | None]]:
    """Maps a name to a recipe and the backend that augments; None for the recipe's own choice."""
    plain = Recipe(
        data=DataConfig(name="cifar10"),
        model=ModelConfig(name=model),
        precision=PrecisionConfig(mixed=settings.precision, deterministic=False),
        batch_size=settings.batch,
    )
    found: dict[str, tuple[Recipe, str | None]] = {NONE: (replace(plain, augment=_WITHOUT), None)}
    found |= {name: (plain, name) for name in BACKENDS}
    if compiled:
        found[COMPILED] = replace(plain, augment=AugmentConfig(compile=True)), None
    if cuda_graph:
        found[GRAPH] = replace(plain, cuda_graph=True), None
    return found


def _trial(recipe: Recipe, backend: str | None, images: ImageSet, accelerator: Accelerator, folder: Path) -> Trial:
    fit_engine(accelerator, recipe)
    trial = Trial(recipe, accelerator, folder, images, images)
    for module in trial.trainer.augment.modules():
        if backend is not None and hasattr(module, "backend"):
            cast(Any, module).backend = backend
    return trial


def _model_rows(
    model: str, settings: Settings, options: dict[str, bool], rounds: int, left_out: dict[str, str]
) -> list[Row]:
    accelerator = Accelerator(cpu=settings.device.type == "cpu", mixed_precision=settings.precision)
    images = random_set(settings.batch * _STEPS, (3, 32, 32), 10, settings.device)
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (recipe, backend) in _recipes(model, settings, **options).items():
            try:
                trial = _trial(recipe, backend, images, accelerator, Path(folder, str(len(calls))))
                calls[name], calls[_ALONE + name] = trial.step, trial.augment
            except Exception as error:
                left_out[f"{model}, {name}"] = reason(error)
        on_gpu, failures = settings.device.type == "cuda", dict[str, str]()
        warmup, least = (8, 0.2) if on_gpu else (0, 0.0)
        times = interleaved(
            calls, rounds=rounds, warmup=warmup, min_seconds=least, device=settings.device, failures=failures
        )
    left_out.update({f"{model}, {name}": why for name, why in failures.items() if not name.startswith(_ALONE)})
    calls.clear()
    gc.collect()
    if (why := left_out.get(f"{model}, {NONE}")) is not None:
        raise ValueError(f"{model} cannot be trained here: {why}")
    rows = []
    for name, step in times.items():
        if (alone := times.get(_ALONE + name)) is not None:
            share = None if name == GRAPH else alone.median / step.median
            rows.append(Row(model, settings.batch, name, step, alone, share, times[NONE].median / step.median))
    return rows


def _check(batch: int, rounds: int | None, precision: str | None, models: Sequence[str]) -> None:
    for name, value in (("batch", batch), ("rounds", 1 if rounds is None else rounds)):
        whole_number(name, value, 1)
    if precision not in (None, "no", "bf16"):
        raise ValueError(f'precision must be "no" or "bf16", got {precision!r}')
    if not models:
        raise ValueError("models must name at least one model, got none")


def run(
    *,
    models: Sequence[str] = MODELS,
    batch: int = 128,
    rounds: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    compiled: bool = False,
    cuda_graph: bool = False,
) -> Result[Row]:
    """Times of the recipe's whole training steps on random 32 x 32 images, with and without augmentation, in turn.

    Args:
        models: Models by name.
        batch: Images a step.
        rounds: Turns of every contender; None is 3 on a CPU, where a turn is one step, and 7 on a GPU.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.
        precision: Autocast, "no" or "bf16"; None is "bf16" on a GPU and "no" on a CPU.
        compiled: Also time the augmentation through `torch.compile`.
        cuda_graph: Also time the whole step captured in a CUDA graph, on a GPU.

    Raises:
        ValueError: A batch, rounds, threads, precision or device out of range, or a model that cannot be trained.
    """
    _check(batch, rounds, precision, models)
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    rounds = rounds or (7 if on_gpu else 3)
    settings = Settings(batch, precision or ("bf16" if on_gpu else "no"), where)
    left_out = {GRAPH: "there is no GPU; it is for --device cuda"} if cuda_graph and not on_gpu else {}
    options = {"compiled": compiled, "cuda_graph": cuda_graph and on_gpu}
    torch.backends.cudnn.benchmark = True
    with thread_count(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        about = f"batch {batch}, 32x32, autocast {settings.precision}; medians of {rounds} rounds, in turn"
        result: Result[Row] = Result([], left_out, f"{machine()}; {about}")
        for model in models:
            result.rows.extend(_model_rows(model, settings, options, rounds, left_out))
    return result


def _cells(row: Row) -> Iterator[str]:
    speed, low, high = row.timing.rates(row.batch)
    yield from (row.model, row.augmentation, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{row.to_none:.3f}")
    yield from (f"{row.timing.median * 1e3:.2f}", f"{row.alone.median * 1e3:.3f}")
    yield "-" if row.share is None else f"{row.share:.2%}"
    if row.timing.host is not None:
        yield f"{row.timing.host * 1e3:.2f}"


def report(result: Result[Row]) -> str:
    """The rows as Markdown, with the machine and what was left out."""
    head = ["model", "augmentation", "images/s", "slowest to fastest", "of none's", "ms a step"]
    head += ["augmentation alone, ms", "share of the step"]
    head += ["host ms a step"] if any(row.timing.host is not None for row in result.rows) else []
    left_out = [f"- left out: {name}: {why}" for name, why in result.left_out.items()]
    return "\n".join([result.about, "", *left_out, *[""] * bool(left_out), table(head, map(_cells, result.rows))])


def bench_train(*, out: str | Path | None = None, **settings: Any) -> str:
    """The times of `run` as a Markdown table.

    Args:
        out: A folder for `train.md` and `train.png`, images per second; None writes nothing.
        **settings: As of `run`, whose errors are raised.
    """
    result = run(**settings)
    text = report(result)
    if out is not None:
        bars: dict[str, list[Bar]] = {row.model: [] for row in result.rows}
        for row in result.rows:
            bars[row.model].append(Bar(row.augmentation, *row.timing.rates(row.batch), row.augmentation != NONE))
        panels = [Panel(model, of_model) for model, of_model in bars.items()]
        write(out, "train", text, panels, label="images/s", note=f"Training steps. {result.about}")
    return text
