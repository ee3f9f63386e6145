"""The section "optimizer" of a recipe, and the optimizers that it can name.

| optimizer.name | what | weight decay |
|---|---|---|
| RAdaBeliefW | the paper's method | decoupled |
| nag | the paper's eq. 3 to 5, momentum betas[0]; eps and betas[1] are not used | added to the gradient |
| adam | the paper's eq. 10, eps inside the root | none |
| adamw, radam, adabelief | the paper's eq. 10, 14 and 15, 16, eps inside the root | decoupled |
| nadamw | torch.optim.NAdam | decoupled |
| schedulefree_adamw | schedulefree.AdamWScheduleFree (Defazio et al. 2024), with schedule.name: constant | decoupled |
| schedulefree_radam | schedulefree.RAdamScheduleFree, without warm-up, with schedule.name: constant | decoupled |
| schedulefree_plus | ScheduleFree+ (Defazio 2026), which measures its rate; lr multiplies it, 1 is usual | squared |
| prodigy | prodigyopt.Prodigy (Mishchenko and Defazio 2023); lr multiplies its own estimate, 1 is usual | decoupled |
| mechanic | Mechanic (Cutkosky, Defazio and Mehta 2023), which learns the scale of RAdaBeliefW's moves | decoupled |

An installed package adds one by an entry point of the group "robust_dist.optimizers" whose value is an
`OptimizerChoice`; recipes and studies can then use its name. `module:Name` names your own: a torch.optim.Optimizer
class, a function that returns one, or an `OptimizerChoice`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer

from robust_dist import own_code
from robust_dist.extras import added
from robust_dist.extras import require as require_package
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import DEFAULTS, OPTIONS, check_constant, check_group
from robust_dist.train.baselines import NAG, Mechanic, PaperAdam, ScheduleFreePlus
from robust_dist.train.keys import COSTLY, NAMES_CODE, require, require_number

if TYPE_CHECKING:
    from robust_dist.train.recipe import Recipe

GROUP = "robust_dist.optimizers"
_KEY = "optimizer.name"
# The groups' rate under lr: auto, where any rate above 0 does the same.
ANY_RATE = 0.01
AUTO_DECAY = 3.0
_SETTINGS = (*DEFAULTS, *OPTIONS)


@dataclass
class OptimizerConfig:
    """The optimizer's settings (PAPER: betas, eps and weight decay are RAdaBeliefW's defaults).

    Attributes:
        name: RAdaBeliefW; the paper's baselines nag, adam, adamw, radam, adabelief; nadamw (torch's); mechanic;
            schedulefree_plus; schedulefree_adamw, schedulefree_radam and prodigy (need the extra "study"); one added by
            an installed package; or your own, as MODULE:NAME. robust_dist/train/optimizers.py describes each.
        lr: Learning rate before the schedule. auto, for RAdaBeliefW: the run measures its rate from its loss and its
            gradients, and averages its weights; with schedule.name: constant. (Both also work with a number: options:
            {averaging: schedule_free, rate_guard: 2} trusts lr within a factor of 2.)
        head_lr_mult: Factor of the head's learning rate, which then has a param group of its own; the head is the layer
            that produces the logits.
        betas: Decay rates of the two moments; nag uses only the first, as its momentum.
        beta2: Replaces the second of betas: a number, or auto: 1 - max(0.001, beta2_steps/total_steps). Null with
            lr: auto means auto too.
        beta2_steps: auto divides it by the run's optimizer steps.
        eps: Added to the variance every step, and under the root.
        weight_decay: Decoupled decay, until the switch; nag adds it to the gradient, adam has none. auto, for
            RAdaBeliefW: a fraction of 3/total_steps per step, not multiplied by the learning rate.
        no_decay: What is not decayed: "bias", "norm" or a part of a parameter's name. The paper decays everything.
        clip_norm: Largest norm of the whole gradient; null does not clip.
        options: Further keyword arguments of the optimizer (prodigy: d_coef, schedulefree_adamw: r, ...). For
            RAdaBeliefW, exp_avg_dtype: bfloat16 keeps the first moment in half the memory, rounded to nearest, or
            stochastically with stochastic_rounding: true (and a seed).
    """

    name: str = field(default="RAdaBeliefW", metadata=COSTLY | NAMES_CODE)
    lr: float | Literal["auto"] = 0.01
    head_lr_mult: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    beta2: float | Literal["auto"] | None = None
    beta2_steps: float = 7.5
    eps: float = 1e-8
    weight_decay: float | Literal["auto"] = 0.01
    no_decay: list[str] = field(default_factory=list)
    clip_norm: float | None = field(default=None, metadata=COSTLY)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if own_code.is_name(self.name):
            own_code.check_form(_KEY, self.name)
        else:
            wanted = (
                f"one of {', '.join(OPTIMIZERS)}, an entry point {GROUP!r} of an installed package, or "
                "your own as MODULE:NAME"
            )
            require(choice_of(self.name) is not None, _KEY, self.name, wanted)
        if self.lr != "auto":
            require_number("optimizer.lr", self.lr, 0)
        require_number("optimizer.head_lr_mult", self.head_lr_mult, 0)
        require_number("optimizer.eps", self.eps, 0)
        if self.weight_decay != "auto":
            require_number("optimizer.weight_decay", self.weight_decay, 0)
        for name in ("lr", "weight_decay"):
            of_ours = getattr(self, name) != "auto" or self.name == "RAdaBeliefW"
            require(of_ours, f"optimizer.{name}", "auto", f"a number with optimizer.name={self.name!r}")
        for beta in self.betas:
            require(0 <= beta < 1, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        if isinstance(self.beta2, (int, float)):
            require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, 'in [0, 1), "auto" or null')
        require(0 < self.beta2_steps < math.inf, "optimizer.beta2_steps", self.beta2_steps, "a finite number above 0")
        if self.clip_norm is not None:
            require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "above 0, or null")


def averages_weights(section: Mapping[str, Any]) -> bool:
    """Whether the optimizer in a recipe's section (a mapping) evaluates an average of what it trains."""
    name = section.get("name", "")
    choice = choice_of(name) if name else None
    asked = section.get("lr") == "auto" or (section.get("options") or {}).get("averaging") is not None
    return choice is not None and (choice.averages_weights or (name == "RAdaBeliefW" and asked))


def decay_of(config: OptimizerConfig, total_steps: int) -> float:
    """The weight decay; for "auto" 3 / total_steps, as a fraction per step.

    Raises:
        ValueError: "auto" in a run of fewer than 3 steps.
    """
    if config.weight_decay == "auto" and total_steps < AUTO_DECAY:
        raise ValueError(
            f"optimizer.weight_decay='auto' needs at least {AUTO_DECAY:g} steps, and this run makes {total_steps}; "
            "train longer, or give weight_decay as a number"
        )
    return AUTO_DECAY / total_steps if config.weight_decay == "auto" else config.weight_decay


def _radabeliefw_arguments(config: OptimizerConfig, betas: tuple[Any, Any]) -> dict[str, Any]:
    given = adam_arguments(config, betas)
    if config.lr == "auto":
        given |= {"lr": ANY_RATE, "averaging": "schedule_free", "rate_guard": 1.0}
    if config.weight_decay == "auto":
        del given["weight_decay"]  # each group has its own
        given["decay_by_rate"] = False
    return given


def adam_arguments(config: OptimizerConfig, betas: tuple[Any, Any]) -> dict[str, Any]:
    """The recipe's settings under the names of torch's AdamW."""
    return {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _plus_arguments(config: OptimizerConfig, betas: tuple[float, float]) -> dict[str, Any]:
    """The rate alone: its betas differ in meaning and go as options, and the groups have their weight decay."""
    return {"lr": config.lr}


def _momentum_arguments(config: OptimizerConfig, betas: tuple[float, float]) -> dict[str, Any]:
    return {"lr": config.lr, "momentum": betas[0], "weight_decay": config.weight_decay}


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """An optimizer that a recipe can name.

    Attributes:
        make: Called with the param groups, and with `arguments` and the recipe's `optimizer.options` as keywords.
        arguments: From the recipe's section and its betas, with the second one settled, to keyword arguments of `make`.
        needs_whole_parameters: It sums over, or exchanges, whole parameters, which sharding engines hide.
        is_rectified: It takes short steps until its second moment is known (RAdam's rectification).
        averages_weights: Its `eval()` replaces the trained weights with an average.
        problem: Why a recipe does not fit it: a message that names the setting and what would be right, or None.
    """

    make: Callable[..., Optimizer]
    arguments: Callable[[OptimizerConfig, tuple[float, float]], dict[str, Any]] = adam_arguments
    needs_whole_parameters: bool = False
    is_rectified: bool = False
    averages_weights: bool = False
    problem: "Callable[[Recipe], str | None]" = lambda recipe: None


def choice_of(name: str) -> OptimizerChoice | None:
    """The optimizer with this name: ours, an entry point's, or the user's own, which is imported; None if unknown."""
    if own_code.is_name(name):
        return own_choice(name)
    return OPTIMIZERS.get(name) or _added(name)


@cache
def _added(name: str) -> OptimizerChoice | None:
    return added(GROUP, name, OptimizerChoice)


def own_choice(name: str) -> OptimizerChoice:
    """The optimizer named as `module:Name`.

    A class or function is called with the param groups (each with its weight decay), with those of lr, betas, eps and
    weight_decay that are among its parameters, and with `optimizer.options`.

    Raises:
        OwnCodeError: It cannot be imported, or is not an optimizer.
    """
    made = own_code.load(_KEY, name)
    if isinstance(made, OptimizerChoice):
        return made
    is_other = isinstance(made, torch.nn.Module) or (isinstance(made, type) and not issubclass(made, Optimizer))
    if is_other or not callable(made):
        wanted = "a class of torch.optim.Optimizer, a function that returns one, or an OptimizerChoice"
        raise own_code.wrong(_KEY, name, made, wanted)

    def arguments(config: OptimizerConfig, betas: tuple[float, float]) -> dict[str, Any]:
        given = adam_arguments(config, betas)
        return (
            given if own_code.takes_any(made) else {key: one for key, one in given.items() if own_code.takes(made, key)}
        )

    return OptimizerChoice(make=partial(_make_own, name, made), arguments=arguments)


def _make_own(name: str, made: Callable[..., Any], groups: list[dict[str, Any]], **arguments: Any) -> Optimizer:
    optimizer = own_code.call(_KEY, name, made, groups, **arguments)
    if not isinstance(optimizer, Optimizer):
        wanted = "it must return a torch.optim.Optimizer"
        raise own_code.OwnCodeError(f"{_KEY}={name!r} returned a {type(optimizer).__name__}; {wanted}")
    if not all("lr" in group for group in optimizer.param_groups):
        wanted = 'put "lr" into the defaults, for the schedule to set'
        raise own_code.OwnCodeError(f"{_KEY}={name!r} has param groups without a learning rate; {wanted}")
    return optimizer


def chosen(config: OptimizerConfig) -> OptimizerChoice:
    """The optimizer that a section names."""
    choice = choice_of(config.name)
    assert choice is not None
    return choice


def second_beta(config: OptimizerConfig, total_steps: int) -> float:
    """The decay of the second moment: the given one, or for "auto" 1 - max(0.001, beta2_steps/total_steps).

    The rectification of eq. 13 is a warm-up of about 1/(1 - beta2) steps, which a short run never leaves; "auto" gives
    it the same fraction of every run shorter than 1000 beta2_steps steps, and the paper's 0.999 to longer ones.

    Raises:
        ValueError: "auto" in a run of at most beta2_steps steps.
    """
    beta2 = config.beta2
    if beta2 is None:
        beta2 = "auto" if config.lr == "auto" else config.betas[1]
    if beta2 != "auto":
        return beta2
    if total_steps <= config.beta2_steps:
        raise ValueError(
            f"optimizer.beta2='auto' needs more than optimizer.beta2_steps={config.beta2_steps:g} steps, but this run "
            f"has {total_steps}; train longer, or give beta2 as a number"
        )
    return 1 - max(0.001, config.beta2_steps / total_steps)


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], total_steps: int) -> Optimizer:
    """The optimizer over param groups that have their weight decay, for a run of `total_steps`.

    Raises:
        ValueError: Its package is missing, it does not accept an option, or a setting is out of range.
    """
    choice = chosen(config)
    arguments = choice.arguments(config, (config.betas[0], second_beta(config, total_steps)))
    try:
        return choice.make(groups, **(arguments | config.options))
    except ImportError as error:
        raise ValueError(str(error)) from error
    except own_code.OwnCodeError:
        raise
    except (TypeError, ValueError) as error:
        if not config.options and isinstance(error, ValueError):
            raise
        raise ValueError(f"optimizer.options={config.options} do not suit {config.name}: {error}") from error


def check_fits(recipe: "Recipe") -> None:
    """Reject a recipe whose optimizer does not fit its other settings; the ValueError says what would be right."""
    problem = chosen(recipe.optimizer).problem(recipe)
    if problem is not None:
        raise ValueError(problem)


def _of_adam(recipe: "Recipe") -> str | None:
    decay = recipe.optimizer.weight_decay
    return f"optimizer.weight_decay={decay} with name='adam', which has none: set 0, or adamw" if decay else None


def _of_radabeliefw(recipe: "Recipe") -> str | None:
    config = recipe.optimizer
    wrong = list(_of_options(config)) or list(_of_options_together(config))
    guard = config.options.get("rate_guard", 1.0 if config.lr == "auto" else None)
    averages = averages_weights({"name": config.name, "lr": config.lr, "options": config.options})
    if averages:
        what = "lr='auto'" if config.lr == "auto" else f"options.averaging={config.options['averaging']!r}"
        wrong += _of_averaging(recipe, f"optimizer.{what}")
    if config.lr == "auto" and guard != 1:
        wrong.append(
            f"optimizer.options.rate_guard={guard!r} with optimizer.lr='auto': leave it out, or give lr as a number"
        )
    if config.lr == "auto" or guard == 1:
        what = "lr='auto'" if config.lr == "auto" else f"options.rate_guard={guard!r}"
        wrong += _of_no_rate(recipe, f"optimizer.{what}, which takes no rate", averages)
    return "; ".join(wrong) or None


def _of_options(config: OptimizerConfig) -> Iterator[str]:
    """RAdaBeliefW's options that are wrong by themselves, or say again what has a key of its own."""
    for name, value in config.options.items():
        setting = f"optimizer.options.{name}={value!r}"
        if name == "weight_decay" or (name == "lr" and config.lr == "auto"):
            yield f"{setting} has no effect: set optimizer.{name}, and leave it out here"
        elif name not in _SETTINGS:
            near = get_close_matches(name, _SETTINGS, 1)
            yield f"{setting}: RAdaBeliefW has no such option" + (f"; did you mean {near[0]!r}?" if near else "")
        elif name == "averaging" and value is None and config.lr == "auto":
            yield f"{setting} with optimizer.lr='auto', which averages weights: leave it out, or give lr as a number"
        elif name == "decay_by_rate" and value is True and config.weight_decay == "auto":
            yield f"{setting} with optimizer.weight_decay='auto', which is a share of each step: leave it out"
        else:
            try:
                check_group({**DEFAULTS, name: value})
            except (TypeError, ValueError) as error:
                yield f"{setting}: {error}"


def _of_options_together(config: OptimizerConfig) -> Iterator[str]:
    """What RAdaBeliefW says of its options beside the recipe's keys; a beta2 that the steps decide is left to it."""
    beta2 = config.betas[1] if config.beta2 in (None, "auto") else config.beta2
    given = _radabeliefw_arguments(config, (config.betas[0], beta2)) | config.options
    group = {**DEFAULTS, **given}
    try:
        check_group(group)
        check_constant([group])
    except (TypeError, ValueError) as error:
        keys = ("lr", "betas", "weight_decay", "options")
        settings = ", ".join(f"optimizer.{key}={getattr(config, key)!r}" for key in keys)
        yield f"{settings}: {error}"


def _of_averaging(recipe: "Recipe", what: str) -> Iterator[str]:
    if recipe.schedule.name != "constant":
        yield f"schedule.name={recipe.schedule.name!r} with {what}, which averages weights: set schedule.name=constant"
    if recipe.ema_decay is not None:
        yield f"ema_decay={recipe.ema_decay} with {what}, which averages weights by itself: set null"


def _of_no_rate(recipe: "Recipe", what: str, averages: bool) -> Iterator[str]:
    """Settings that change a rate which the step does not use; for averaged weights the schedule is already named."""
    schedule = recipe.schedule
    if schedule.name != "constant" and not averages:
        yield f"schedule.name={schedule.name!r} with {what}: set schedule.name=constant"
    if schedule.warmup_steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps} with {what}: set 0"
    if recipe.optimizer.head_lr_mult != 1:
        yield f"optimizer.head_lr_mult={recipe.optimizer.head_lr_mult} with {what}: set 1"


def _of_one_rate(recipe: "Recipe") -> str | None:
    factor, name = recipe.optimizer.head_lr_mult, recipe.optimizer.name
    wanted = "which has one learning rate for all groups: set 1"
    return None if factor == 1 else f"optimizer.head_lr_mult={factor} with name={name!r}, {wanted}"


def _of_schedule_free(recipe: "Recipe") -> str | None:
    if recipe.schedule.name != "constant":
        wanted = "schedule-free: set schedule.name=constant (warm-up is allowed)"
        return f"schedule.name={recipe.schedule.name!r} with name={recipe.optimizer.name!r}, which is {wanted}"
    if recipe.ema_decay is not None:
        return f"ema_decay={recipe.ema_decay} with {recipe.optimizer.name}, which averages by itself: set null"
    return None


def _of_schedule_free_plus(recipe: "Recipe") -> str | None:
    wrong = [_of_schedule_free(recipe), _of_one_rate(recipe)]
    if recipe.optimizer.clip_norm is not None:
        wrong.append(
            f"optimizer.clip_norm={recipe.optimizer.clip_norm} with name='schedulefree_plus', which measures the "
            "gradient as it is: set null"
        )
    return "; ".join(filter(None, wrong)) or None


def _schedule_free(kind: str, groups: Any, **arguments: Any) -> Optimizer:
    package = require_package("schedulefree", extra="study", purpose=f"schedulefree.{kind}")
    optimizer: Optimizer = getattr(package, kind)(groups, **arguments)
    return optimizer


def _prodigy(groups: Any, **arguments: Any) -> Optimizer:
    package = require_package("prodigyopt", extra="study", purpose="optimizer.name='prodigy'")
    optimizer: Optimizer = package.Prodigy(groups, **arguments)
    return optimizer


OPTIMIZERS = {
    "RAdaBeliefW": OptimizerChoice(
        make=RAdaBeliefW, arguments=_radabeliefw_arguments, is_rectified=True, problem=_of_radabeliefw
    ),
    "nag": OptimizerChoice(make=NAG, arguments=_momentum_arguments),
    "adam": OptimizerChoice(make=PaperAdam, problem=_of_adam),
    "adamw": OptimizerChoice(make=PaperAdam),
    "radam": OptimizerChoice(make=partial(PaperAdam, rectify=True), is_rectified=True),
    "adabelief": OptimizerChoice(make=partial(PaperAdam, belief=True)),
    "nadamw": OptimizerChoice(make=partial(torch.optim.NAdam, decoupled_weight_decay=True)),
    **{
        name: OptimizerChoice(
            make=partial(_schedule_free, kind),
            needs_whole_parameters=True,
            averages_weights=True,
            problem=_of_schedule_free,
        )
        for name, kind in (("schedulefree_adamw", "AdamWScheduleFree"), ("schedulefree_radam", "RAdamScheduleFree"))
    },
    "mechanic": OptimizerChoice(make=Mechanic, needs_whole_parameters=True, is_rectified=True, problem=_of_one_rate),
    "schedulefree_plus": OptimizerChoice(
        make=ScheduleFreePlus,
        arguments=_plus_arguments,
        needs_whole_parameters=True,
        averages_weights=True,
        problem=_of_schedule_free_plus,
    ),
    "prodigy": OptimizerChoice(make=_prodigy, needs_whole_parameters=True, problem=_of_one_rate),
}
