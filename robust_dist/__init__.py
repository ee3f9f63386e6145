"""robust_dist: a robust image-classification recipe that stays right when training is sharded."""

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, sample_keys
from robust_dist.engines.deepspeed import register
from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch

__all__ = [
    "CutMix",
    "RAdaBeliefW",
    "RobustAugment",
    "RobustSchedule",
    "TrivialAugment",
    "WeightDecaySwitch",
    "param_groups",
    "register",
    "sample_keys",
]
__version__: str


def __getattr__(name: str) -> str:
    """The installed distribution's version, read when it is asked for; "0+unknown" in a bare folder."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("robust_dist")
    except PackageNotFoundError:
        return "0+unknown"
