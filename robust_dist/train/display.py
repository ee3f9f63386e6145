"""Progress on the screen while a run trains: a bar, and a line per epoch."""

import sys
import time
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from robust_dist.measure.memory import GIB, peak_memory, total_memory
from robust_dist.train.meter import Figures, Meter, data_wait_share
from robust_dist.train.recipe import Recipe

SECONDS_BETWEEN_LOOKS = 0.5


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return "IPKernelApp" in getattr(shell, "config", {})


class Display:
    """Progress bar and epoch lines on the main process.

    Args:
        recipe: The run's settings.
        accelerator: The engine.
        total_steps: Optimizer steps of the whole run.
        done: Optimizer steps done before this start.
        meter: What the bar shows beside the steps.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, total_steps: int, done: int, meter: Meter) -> None:
        self.epochs, self.accelerator, self.meter = recipe.epochs, accelerator, meter
        self.unit = "GPU" if accelerator.device.type == "cuda" else "rank"
        hidden = not (recipe.tracking.progress and accelerator.is_main_process)
        self.bar = tqdm(
            total=total_steps,
            initial=done,
            # A notebook's cell is no terminal, and shows a bar all the same.
            disable=hidden or (False if in_notebook() else None),
            unit="step",
            dynamic_ncols=True,
            mininterval=SECONDS_BETWEEN_LOOKS,
        )
        self._looked = time.perf_counter()

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()

    def step(self) -> None:
        """One optimizer step was begun; the figures beside the bar are made anew only as often as they are seen."""
        if not self.bar.disable and time.perf_counter() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = time.perf_counter()
            self.bar.set_postfix_str(self._postfix(self.meter.recent()), refresh=False)
        self.bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the object of one epoch."""
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
