"""RAdaBeliefW: the equations, its backends, parameter groups, converters."""

from robust_dist.optim.convert import from_adabelief_pytorch, from_timm_adabelief
from robust_dist.optim.groups import param_groups
from robust_dist.optim.radabeliefw import RAdaBeliefW

__all__ = ["RAdaBeliefW", "from_adabelief_pytorch", "from_timm_adabelief", "param_groups"]
