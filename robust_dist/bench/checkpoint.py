"""The cost of a checkpoint for training: in the background, at once, and without checksums or sync."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator

from robust_dist.bench.timing import machine
from robust_dist.checkpoint import CheckpointStore
from robust_dist.checkpoint.background import checkpoint_bytes
from robust_dist.engines.engine import engine_of
from robust_dist.measure.memory import text_of
from robust_dist.measure.table import table
from robust_dist.models import build_model
from robust_dist.optim import RAdaBeliefW
from robust_dist.train.recipe import CheckpointConfig
from robust_dist.train.saving import Saver


def bench_checkpoint(rounds: int = 7, model: str = "resnet34_cifar", folder: str | None = None) -> str:
    """Save one model and its optimizer repeatedly, each way in turn.

    Args:
        rounds: Saves of each way.
        model: A model by name.
        folder: A folder on the disk to write to; None takes the system's folder for temporary files.

    Returns:
        A table of medians (lowest to highest), with the machine.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    bare = build_model(model, 10, in_channels=3)
    net, optimizer = accelerator.prepare(bare, RAdaBeliefW(bare.parameters()))
    accelerator.backward(net(torch.zeros(2, 3, 32, 32, device=accelerator.device)).sum())
    optimizer.step()
    size = checkpoint_bytes(engine_of(accelerator), accelerator.unwrap_model(net), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=folder) as place, ExitStack() as stack:
        now, later = (
            stack.enter_context(_saver(Path(place, str(background)), size, background)) for background in (False, True)
        )
        ways = {
            "Accelerate's save_state, no checksums, no sync": _plain(accelerator, Path(place, "plain")),
            "at once (checkpoint.background=false)": _saving(accelerator, now),
            "in the background": _saving(accelerator, later),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for step in range(rounds + 1):
            for name, way in ways.items():
                times[name].append(way(step))
    # The first one fills caches.
    rows = [[name, *_cells(found[1:])] for name, found in times.items()]
    about = f"{model}, about {text_of(size)}; {machine()}; median (lowest to highest) of {rounds} rounds, ways in turn"
    head = ["checkpoint", "training waits, s", "whole on the disk after, s"]
    return "\n".join([about, "", table(head, rows)])


Way = Callable[[int], tuple[float, float]]


def _plain(accelerator: Accelerator, folder: Path) -> Way:
    def save(step: int) -> tuple[float, float]:
        began = time.perf_counter()
        accelerator.save_state(str(folder))
        seconds = time.perf_counter() - began
        return seconds, seconds

    return save


def _saver(folder: Path, need: int, background: bool) -> Saver:
    settings = CheckpointConfig(background=background)
    return Saver(CheckpointStore(folder), settings, need=need, timeout=600.0)


def _saving(accelerator: Accelerator, saver: Saver) -> Way:
    def save(step: int) -> tuple[float, float]:
        began = time.perf_counter()
        saver.save(step, lambda place: accelerator.save_state(str(place)), {})
        waited = time.perf_counter() - began
        saver.wait()
        return waited, time.perf_counter() - began

    return save


def _cells(found: list[tuple[float, float]]) -> list[str]:
    return [f"{statistics.median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in zip(*found, strict=True)]
