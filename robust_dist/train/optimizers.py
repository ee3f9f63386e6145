"""The optimizers that a recipe can name, and what each of them needs of the rest of the recipe.

| optimizer.name | what | weight decay |
|---|---|---|
| RAdaBeliefW | the paper's method | decoupled |
| nag | the paper's eq. 3 to 5, momentum betas[0]; eps and betas[1] are not used | added to the gradient |
| adam | the paper's eq. 10, eps inside the root | none |
| adamw, radam, adabelief | the paper's eq. 10, 14 and 15, 16, eps inside the root | decoupled |
| nadamw | torch.optim.NAdam | decoupled |
| schedulefree_adamw | schedulefree.AdamWScheduleFree (Defazio et al. 2024), with schedule.name: constant | decoupled |
| prodigy | prodigyopt.Prodigy (Mishchenko and Defazio 2023); lr multiplies its own estimate, 1 is usual | decoupled |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from robust_dist.extras import require
from robust_dist.optim import RAdaBeliefW
from robust_dist.train.baselines import NAG, PaperAdam
from robust_dist.train.recipe import OptimizerConfig, Recipe

# They sum over, or exchange, whole parameters, which sharding engines hide.
WHOLE_ONLY = ("schedulefree_adamw", "prodigy")


def second_beta(config: OptimizerConfig, total_steps: int) -> float:
    """The decay of the second moment: the one given, or for "auto" 1 - max(0.001, beta2_steps/total_steps).

    The rectification of eq. 13 is a warm-up of some 1/(1 - beta2) steps, which a short run never leaves; "auto" gives
    it the same share of every run shorter than 1000 beta2_steps steps, and the paper's 0.999 to longer ones.

    Raises:
        ValueError: "auto", in a run of no more than beta2_steps steps.
    """
    if config.beta2 != "auto":
        return config.betas[1] if config.beta2 is None else config.beta2
    if total_steps <= config.beta2_steps:
        raise ValueError(
            f"optimizer.beta2='auto' needs more than optimizer.beta2_steps={config.beta2_steps:g} steps, and this run "
            f"makes {total_steps}; train longer, or give beta2 as a number"
        )
    return 1 - max(0.001, config.beta2_steps / total_steps)


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], total_steps: int) -> Optimizer:
    """The optimizer over param groups.

    Args:
        config: The recipe's settings of it.
        groups: Param groups, each with its weight decay.
        total_steps: Optimizer steps of the whole run.

    Raises:
        ValueError: Its package is missing, it does not take an option, or a setting is out of its range.
    """
    betas = config.betas[0], second_beta(config, total_steps)
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    settings |= {"momentum": betas[0]} if config.name == "nag" else {"betas": betas, "eps": config.eps}
    try:
        return _maker(config.name)(groups, **(settings | config.options))
    except TypeError as error:
        raise ValueError(f"optimizer.options={config.options} do not suit {config.name}: {error}") from error
    except ImportError as error:
        raise ValueError(str(error)) from error


def check_fits(recipe: Recipe) -> None:
    """Refuse a recipe whose optimizer cannot go with its other settings.

    Raises:
        ValueError: Names the setting and what would be right.
    """
    ours, name = recipe.optimizer, recipe.optimizer.name
    if name == "adam" and ours.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay={ours.weight_decay} with name='adam', which has none: set 0, or adamw"
        )
    if name == "schedulefree_adamw":
        if recipe.schedule.name != "constant":
            wanted = "schedule-free: set schedule.name=constant (warm-up is allowed)"
            raise ValueError(
                f"schedule.name={recipe.schedule.name!r} with name='schedulefree_adamw', which is {wanted}"
            )
        if recipe.ema_decay is not None:
            raise ValueError(
                f"ema_decay={recipe.ema_decay} with schedulefree_adamw, which averages by itself: set null"
            )


def _maker(name: str) -> Callable[..., Optimizer]:
    purpose = f"optimizer.name={name!r}"
    if name == "schedulefree_adamw":
        return require("schedulefree", extra="study", purpose=purpose).AdamWScheduleFree
    if name == "prodigy":
        return require("prodigyopt", extra="study", purpose=purpose).Prodigy
    return _MAKERS[name]


_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "RAdaBeliefW": RAdaBeliefW,
    "nag": NAG,
    "adam": PaperAdam,
    "adamw": PaperAdam,
    "radam": partial(PaperAdam, rectify=True),
    "adabelief": partial(PaperAdam, belief=True),
    "nadamw": partial(torch.optim.NAdam, decoupled_weight_decay=True),
}
