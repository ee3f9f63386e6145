"""Speed and waiting of a run, by host clocks alone, so that no step waits for a device to be measured."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from robust_dist.measure.dispatch import training_flops
from robust_dist.measure.gpus import peak_tflops
from robust_dist.measure.memory import GIB, peak_memory
from robust_dist.train.recipe import Recipe

T = TypeVar("T")


@dataclass
class Figures:
    """Measurements of a stretch of training.

    Attributes:
        seconds: Its length.
        images: Images that all ranks trained on.
        wait_seconds: Of them, in which this rank's loop waited for its loader.
    """

    seconds: float = 0.0
    images: int = 0
    wait_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def data_wait_share(figures: Figures) -> float:
    """The share of the time that this rank's loop waited for its loader, 0 to 1."""
    return min(1.0, figures.wait_seconds / figures.seconds) if figures.seconds > 0 else 0.0


class Meter:
    """Counts images and seconds of an epoch, and of the moments since someone last looked.

    Args:
        world_size: Ranks of the run.
        flops_per_image: What one image costs the model, or None.
        peak: FLOP/s that one device does at most, or None.
    """

    def __init__(self, world_size: int, flops_per_image: int | None = None, peak: float | None = None) -> None:
        self.world_size, self.flops_per_image, self.peak = world_size, flops_per_image, peak
        self.begin()

    def begin(self) -> None:
        """An epoch, or what is left of it, begins."""
        self._began = self._looked = time.perf_counter()
        self._images = self._images_then = 0
        self._waited = self._waited_then = 0.0

    def fetch(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches; the time until each is there counts as waiting."""
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
        """A step over so many images of all ranks was begun."""
        self._images += images

    def epoch(self) -> Figures:
        """Since `begin`; on a GPU, once its work has been waited for."""
        return Figures(time.perf_counter() - self._began, self._images, self._waited)

    def recent(self) -> Figures:
        """Since the last call, or `begin`."""
        now, then = time.perf_counter(), self._looked
        images, waited = self._images - self._images_then, self._waited - self._waited_then
        self._looked, self._images_then, self._waited_then = now, self._images, self._waited
        return Figures(now - then, images, waited)

    def mfu(self, figures: Figures) -> float | None:
        """Model FLOPs utilisation: the model's own arithmetic over what the devices could do; None where unknown."""
        if self.flops_per_image is None or self.peak is None:
            return None
        return self.flops_per_image * figures.images_per_second / self.world_size / self.peak


def build_meter(recipe: Recipe, accelerator: Accelerator, model: nn.Module, image_shape: tuple[int, ...]) -> Meter:
    """A meter that knows the model and the device.

    Args:
        recipe: The run's settings; `tracking.peak_tflops` goes before the device's data sheet.
        accelerator: The engine.
        model: The whole model, before the engine shards it.
        image_shape: [C, H, W] of a training image.
    """
    peak = recipe.tracking.peak_tflops
    if peak is None and accelerator.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(accelerator.device), accelerator.mixed_precision)
    if peak is None:
        return Meter(accelerator.num_processes)
    try:
        flops = training_flops(model, image_shape)
    except Exception as error:
        # A figure is not worth a run.
        accelerator.print(f"no MFU: the model's operations cannot be counted ({type(error).__name__}: {error})")
        return Meter(accelerator.num_processes)
    return Meter(accelerator.num_processes, flops, peak * 1e12)


def measured(meter: Meter, figures: Figures, accelerator: Accelerator) -> dict[str, float | None]:
    """The measured figures of an epoch, equal on all ranks; a collective.

    The wait is that of the rank that waited longest, the memory that of the rank that used most.
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
