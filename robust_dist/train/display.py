"""What a person sees while a run trains: a bar, a line per epoch, trackers."""

from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from robust_dist.train.recipe import Recipe, flatten, recipe_dict


class Display:
    """Progress bar and epoch lines on the main process, and the life of the trackers.

    Args:
        recipe: The run's settings.
        accelerator: The engine.
        total_steps: Optimizer steps of the whole run.
        done: Optimizer steps done before this start.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, total_steps: int, done: int) -> None:
        self.epochs, self.accelerator = recipe.epochs, accelerator
        hidden = not (recipe.tracking.progress and accelerator.is_main_process)
        self.bar = tqdm(
            total=total_steps, initial=done, disable=hidden or None, unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self.settings = {key: _scalar(value) for key, value in flatten(recipe_dict(recipe)).items()}

    def __enter__(self) -> "Display":
        self.accelerator.init_trackers("trackers", config=self.settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()

    def step(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the object of one epoch."""
        if self.accelerator.is_main_process:
            tqdm.write(
                f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.4f}  "
                f"accuracy {row['eval_accuracy']:.2%} of {row['eval_samples']}  lr {row['lr']:.3g}  "
                f"decay {row['weight_decay']:.3g}  {row['images_per_second']:,.0f} images/s"
            )


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
