"""robust_dist: a robust image-classification recipe that stays correct when training is sharded."""

from typing import TYPE_CHECKING, Any

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, sample_keys
from robust_dist.engines import register
from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch

__all__ = [
    "CutMix",
    "RAdaBeliefW",
    "RobustAugment",
    "RobustSchedule",
    "TrivialAugment",
    "WeightDecaySwitch",
    "load",
    "param_groups",
    "register",
    "sample_keys",
]
__version__: str

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from robust_dist.inference.trained import Preprocess


def load(path: "str | Path", *, checkpoint: str | int = "last", **options: Any) -> "tuple[nn.Module, Preprocess]":
    """Load a trained model and the preprocessing that turns an image into its input.

        model, preprocess = robust_dist.load("runs/quickstart")
        print(preprocess.classes[model(preprocess("digit.png")[None]).argmax()])

    Args:
        path: The folder of a run, trained under any engine, or of an export (`robust-dist export`).
        checkpoint: For a run: "last", "best" (highest logged accuracy among the checkpoints on disk), or a step.
        **options: `model`, the model passed to `fit`, for a run whose model was passed that way; `kind`, the recipe's
            class, for a run whose recipe has keys of your own.

    Returns:
        The model in eval mode, float32 on the CPU, with the weights that the run evaluated; and a callable that maps a
        path, a PIL image or uint8 [3, H, W] to float32 [3, size, size]. Its `classes` are the class names in label
        order.

    Raises:
        ValueError: There is no run or checkpoint, the checkpoint is torn, or it lacks the evaluated weights.
        ImportError: The extra "train" is not installed.
    """
    from robust_dist.inference.trained import load as read

    return read(path, checkpoint=checkpoint, **options)


def __getattr__(name: str) -> str:
    """The installed distribution's version, looked up on access; "0+unknown" if the package is not installed."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("robust_dist")
    except PackageNotFoundError:
        return "0+unknown"
