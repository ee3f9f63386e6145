"""Progress bar, epoch lines, speed figures from host clocks, and a profiler trace of a few steps."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm.auto import tqdm

from robust_dist.measure.dispatch import training_flops
from robust_dist.measure.gpus import peak_tflops
from robust_dist.measure.memory import GIB, peak_memory, total_memory
from robust_dist.train.recipe import Recipe

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.5
SKIPPED, TRACED = 10, 5
OPERATORS = 12


@dataclass
class Figures:
    """Measurements of a stretch of training.

    Attributes:
        seconds: Its duration.
        images: Images trained on by all ranks.
        wait_seconds: Time that this rank's loop waited for its loader.
    """

    seconds: float = 0.0
    images: int = 0
    wait_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Images per second over all ranks."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def data_wait_share(figures: Figures) -> float:
    """The fraction of the time that this rank's loop waited for its loader."""
    return min(1.0, figures.wait_seconds / figures.seconds) if figures.seconds > 0 else 0.0


class Meter:
    """Counts images and seconds of an epoch, and since the last reading; no step waits for a device.

    Args:
        world_size: Number of ranks.
        flops_per_image: The model's, or None.
        peak: Peak FLOP/s of one device, or None.
    """

    def __init__(self, world_size: int, flops_per_image: int | None = None, peak: float | None = None) -> None:
        self.world_size, self.flops_per_image, self.peak = world_size, flops_per_image, peak
        self.begin()

    def begin(self) -> None:
        """Begin an epoch, or the rest of one."""
        self._began = self._looked = time.perf_counter()
        self._images = self._images_then = 0
        self._waited = self._waited_then = 0.0

    def fetch(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches; the time until each arrives counts as waiting."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - began
            yield batch

    def count(self, images: int) -> None:
        """Count a step over this many images of all ranks."""
        self._images += images

    def epoch(self) -> Figures:
        """Figures since `begin`; on a GPU, after waiting for its work."""
        return Figures(time.perf_counter() - self._began, self._images, self._waited)

    def recent(self) -> Figures:
        """Figures since the last call, or `begin`."""
        now, then = time.perf_counter(), self._looked
        images, waited = self._images - self._images_then, self._waited - self._waited_then
        self._looked, self._images_then, self._waited_then = now, self._images, self._waited
        return Figures(now - then, images, waited)

    def mfu(self, figures: Figures) -> float | None:
        """Model FLOPs utilisation: the model's own arithmetic over the devices' peak; None if unknown."""
        if self.flops_per_image is None or self.peak is None:
            return None
        return self.flops_per_image * figures.images_per_second / self.world_size / self.peak


def build_meter(recipe: Recipe, accelerator: Accelerator, model: nn.Module, image_shape: tuple[int, ...]) -> Meter:
    """A meter that knows the whole, unwrapped model and the device.

    `tracking.peak_tflops` takes precedence over the device's data sheet; `image_shape` is [C, H, W].
    """
    peak = recipe.tracking.peak_tflops
    if peak is None and accelerator.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(accelerator.device), accelerator.mixed_precision)
    if peak is None:
        return Meter(accelerator.num_processes)
    try:
        flops = training_flops(model, image_shape)
    except Exception as error:
        # A missing figure must not end a run.
        accelerator.print(f"no MFU: the model's operations cannot be counted ({type(error).__name__}: {error})")
        return Meter(accelerator.num_processes)
    return Meter(accelerator.num_processes, flops, peak * 1e12)


def measured(meter: Meter, figures: Figures, accelerator: Accelerator) -> dict[str, float | None]:
    """The measured figures of an epoch, equal on all ranks; a collective.

    Waiting time and memory are the maximum over ranks.
    """
    mine = torch.tensor(
        [data_wait_share(figures), peak_memory(accelerator.device) / GIB, figures.seconds],
        dtype=torch.float32,
        device=accelerator.device,
    )
    waited, memory, seconds = accelerator.gather(mine.reshape(1, 3)).amax(dim=0).tolist()
    whole = Figures(seconds, figures.images)
    return {
        "images_per_second": whole.images_per_second,
        "images_per_second_per_rank": whole.images_per_second / accelerator.num_processes,
        "data_wait_share": waited,
        "peak_memory_gib": memory,
        "mfu": meter.mfu(whole),
    }


def in_notebook() -> bool:
    """Whether this process is a notebook kernel."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return "IPKernelApp" in getattr(shell, "config", {})


class Display:
    """Progress bar and epoch lines on the main process; `done` steps were taken before this start."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, total_steps: int, done: int, meter: Meter) -> None:
        self.epochs, self.accelerator, self.meter = recipe.epochs, accelerator, meter
        self.unit = "GPU" if accelerator.device.type == "cuda" else "rank"
        hidden = not (recipe.tracking.progress and accelerator.is_main_process)
        self.bar = tqdm(
            total=total_steps,
            initial=done,
            # A notebook cell is not a terminal, but can show a bar.
            disable=hidden or (False if in_notebook() else None),
            unit="step",
            dynamic_ncols=True,
            mininterval=SECONDS_BETWEEN_LOOKS,
        )
        self._looked = time.perf_counter()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def step(self) -> None:
        """Count an optimizer step; the figures beside the bar are computed only as often as it is drawn."""
        if not self.bar.disable and time.perf_counter() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = time.perf_counter()
            self.bar.set_postfix_str(self._postfix(self.meter.recent()), refresh=False)
        self.bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the row of one epoch."""
        if self.accelerator.is_main_process:
            tqdm.write(
                f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.4f}  "
                f"accuracy {row['eval_accuracy']:.2%} of {row['eval_samples']}  lr {row['lr']:.3g}  "
                f"decay {row['weight_decay']:.3g}  {row['images_per_second']:,.0f} images/s  "
                f"data wait {row['data_wait_share']:.0%}  {row['peak_memory_gib']:.2f} GiB{_mfu(row['mfu'])}"
            )

    def _postfix(self, figures: Figures) -> str:
        device = self.accelerator.device
        most, there = peak_memory(device) / GIB, total_memory(device)
        memory = f"{most:.2f} GiB" if there is None else f"{most:.1f}/{there / GIB:.0f} GiB"
        rate = figures.images_per_second / self.meter.world_size
        wait = f"data wait {data_wait_share(figures):.0%}"
        return f"{rate:,.0f} images/s per {self.unit}, {wait}, {memory}{_mfu(self.meter.mfu(figures), ', ')}"


def _mfu(share: float | None, before: str = "  ") -> str:
    return "" if share is None else f"{before}MFU {share:.1%}"


def window(setting: bool | tuple[int, int], steps_left: int) -> tuple[int, int] | None:
    """The traced steps of this start: (steps before them, their number); None for none.

    `steps_left` are those from this start to the run's end; the window is moved earlier until it fits.
    """
    if not setting or steps_left < 2:
        return None
    skipped, traced = (SKIPPED, TRACED) if isinstance(setting, bool) else setting
    # The profiler itself needs one step to warm up.
    traced = min(traced, steps_left - 1)
    return max(1, min(skipped, steps_left - traced)), traced


class Profiling:
    """Traces a few steps of the first host's ranks into RUN/profile, and prints where the trace is."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path, total_steps: int, done: int) -> None:
        self.folder, self.accelerator = folder / "profile", accelerator
        self.profiler: profile | None = None
        on_first_host = accelerator.process_index < int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        steps = window(recipe.profile, total_steps - done)
        if steps is not None and on_first_host:
            self.first, self.count = done + steps[0] + 1, steps[1]
            self.profiler = self._build(*steps)

    def __enter__(self) -> "Profiling":
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def step(self) -> None:
        """Count an optimizer step."""
        if self.profiler is not None:
            self.profiler.step()

    def _build(self, skipped: int, traced: int) -> profile:
        activities = [ProfilerActivity.CPU]
        if self.accelerator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        return profile(
            activities=activities,
            schedule=schedule(wait=skipped - 1, warmup=1, active=traced, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )

    def _write(self, profiler: profile) -> None:
        """Write the trace under a name known to TensorBoard's profiler tab, and print a table on the main process."""
        rank = self.accelerator.process_index
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{rank}.{self.first}.pt.trace.json"
        profiler.export_chrome_trace(str(path))
        if self.accelerator.is_main_process:
            order = f"self_{self.accelerator.device.type}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=OPERATORS, max_name_column_width=50)
            (self.folder / f"operators.{self.first}.txt").write_text(table, encoding="utf-8")
            last = self.first + self.count - 1
            print(f"\nprofile of steps {self.first} to {last}: {path} (chrome://tracing, ui.perfetto.dev)\n{table}")
