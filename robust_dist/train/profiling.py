"""A torch.profiler trace of a few steps, in RUN/profile."""

import os
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, schedule

from robust_dist.train.recipe import Recipe

SKIPPED, TRACED = 10, 5
OPERATORS = 12


def window(setting: bool | tuple[int, int], steps_left: int) -> tuple[int, int] | None:
    """The traced steps of this start: (steps before them, their number); None for none.

    Args:
        setting: The recipe's `profile`.
        steps_left: Optimizer steps from this start to the run's end; the window is moved forward until it fits.
    """
    if not setting or steps_left < 2:
        return None
    skipped, traced = (SKIPPED, TRACED) if isinstance(setting, bool) else setting
    # The profiler itself needs one step to warm up.
    traced = min(traced, steps_left - 1)
    return max(1, min(skipped, steps_left - traced)), traced


class Profiling:
    """Traces a few steps of the first host's ranks, and tells where the trace lies.

    Args:
        recipe: The run's settings.
        accelerator: The engine.
        folder: The run's folder.
        total_steps: Optimizer steps of the whole run.
        done: Optimizer steps done before this start.
    """

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def step(self) -> None:
        """One optimizer step was begun."""
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
        """The trace under a name that TensorBoard's profiler tab knows, and a table on the main process."""
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
