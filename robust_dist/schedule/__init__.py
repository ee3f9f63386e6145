"""Cosine decay with warm-up, and the weight-decay switch."""

from robust_dist.schedule.comparison import RankDisagreementError
from robust_dist.schedule.hooks import base_optimizer
from robust_dist.schedule.robust import RobustSchedule
from robust_dist.schedule.switch import WeightDecaySwitch

__all__ = ["RankDisagreementError", "RobustSchedule", "WeightDecaySwitch", "base_optimizer"]


def __getattr__(name: str) -> object:
    # Its location up to 0.6.0.
    if name == "ballot":
        from robust_dist.ranks import talk

        return talk
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
