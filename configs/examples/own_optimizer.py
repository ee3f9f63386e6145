"""An optimizer of your own.

robust-dist train --config quickstart --optimizer.name own_optimizer:Lion --optimizer.lr 0.001 --run_dir runs/lion
"""

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; `weight_decay` becomes 0 when the schedule switches it off."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = momentum.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                momentum.lerp_(parameter.grad, 1 - beta2)
