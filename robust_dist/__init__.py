"""robust_dist: a robust image-classification recipe that stays right when training is sharded."""

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
    """A trained model, and what makes its input of an image.

        model, preprocess = robust_dist.load("runs/quickstart")
        print(preprocess.classes[model(preprocess("digit.png")[None]).argmax()])

    Args:
        path: A run's folder, under whatever engine it was trained, or what `robust-dist export` wrote.
        checkpoint: Of a run: "last", "best" (by logged accuracy, of the checkpoints that are there), or a step.
        **options: `model`, of a run whose model was given to `fit`, as it was given there; `kind`, the recipe's class,
            for a run whose recipe has keys of your own.

    Returns:
        The model in eval mode on the CPU in float32, with the weights that the run evaluated; and a callable that takes
        a path, a PIL image or uint8 [3, H, W] and returns float32 [3, size, size], with the class names by number in
        its `classes`.

    Raises:
        ValueError: No run, no checkpoint, a torn one, or weights that the run does not evaluate.
        ImportError: The extra "train" is not installed.
    """
    from robust_dist.inference.trained import load as read

    return read(path, checkpoint=checkpoint, **options)


def __getattr__(name: str) -> str:
    """The installed distribution's version, read when it is asked for; "0+unknown" in a bare folder."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("robust_dist")
    except PackageNotFoundError:
        return "0+unknown"
