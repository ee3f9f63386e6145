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
__version__ = "0.3.0"
