"""The optimizer's settings: their names in a param group, their defaults and their ranges."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim.reference import PAPER_THRESHOLD
from robust_dist.validate import whole_number

INSIDE = "inside"
OUTSIDE = "outside"
OUTSIDE_UNCORRECTED = "outside_uncorrected"
EPS_PLACEMENTS = (INSIDE, OUTSIDE, OUTSIDE_UNCORRECTED)

DEFAULTS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "rectify_threshold": PAPER_THRESHOLD,
    "eps_placement": INSIDE,
    "accumulate_eps": True,
    "foreach": None,
    "fused": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
}

# In a group only if they differ from these defaults: DCP loads a checkpoint only into groups with exactly the same
# keys, and checkpoints of older releases have none of these. Read them with `option`.
OPTIONS: dict[str, Any] = {
    "master_weights": False,
    "exp_avg_dtype": None,
    "stochastic_rounding": False,
    "seed": 0,
    "averaging": None,
    "rate_guard": None,
    "rate_constant": 4.0,
    "decay_by_rate": True,
}
SCHEDULE_FREE = "schedule_free"
# In groups with `averaging` or `rate_guard`: whether it holds the trained weights, and the measurements of rate.py.
TRAINS = "train_mode"
MEASURED = ("rate_mean_gradient", "rate_mean_loss", "rate_smallest")
# averaging.py keeps a table of about 50 / (1 - beta2) entries.
LARGEST_BETA2 = 0.9999


def option(group: Mapping[str, Any], name: str) -> Any:
    """The value of one of `OPTIONS` in a param group."""
    return group.get(name, OPTIONS[name])


@dataclass(frozen=True)
class Hyper:
    """The numbers of one param group that the arithmetic needs.

    Attributes:
        lr: Learning rate after the schedule; a tensor is read on the device that steps.
        weight_decay: Decoupled weight decay, multiplied by `lr`.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: The paper's eps.
        rectify_threshold: The update is rectified if rho_t is greater than this.
        eps_placement: One of `EPS_PLACEMENTS`.
        accumulate_eps: Whether eps is added to the second moment at every step, as in eq. 16.
        maximize: Whether the gradient's sign is flipped.
        stochastic_rounding: Whether bfloat16 values without a master are rounded stochastically (rounding.py).
        seed: Seed of stochastic rounding.
        averaging: Whether the weights are averaged (averaging.py).
        decay_by_rate: Whether `weight_decay` is multiplied by `lr`.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    beta1: float
    beta2: float
    eps: float
    rectify_threshold: float
    eps_placement: str
    accumulate_eps: bool
    maximize: bool
    stochastic_rounding: bool = False
    seed: int = 0
    averaging: bool = False
    decay_by_rate: bool = True

    @property
    def added_eps(self) -> float:
        """The term that eq. 16 adds to the second moment at every step."""
        return self.eps if self.accumulate_eps else 0.0


def hyper(group: Mapping[str, Any], lr: float | Tensor | None = None) -> Hyper:
    """The numbers of a param group that the arithmetic needs; `lr` replaces the group's own if it is given."""
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=group["lr"] if lr is None else lr,
        weight_decay=group["weight_decay"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        rectify_threshold=group["rectify_threshold"],
        eps_placement=group["eps_placement"],
        accumulate_eps=group["accumulate_eps"],
        maximize=group["maximize"],
        stochastic_rounding=option(group, "stochastic_rounding"),
        seed=option(group, "seed"),
        averaging=option(group, "averaging") is not None,
        decay_by_rate=option(group, "decay_by_rate"),
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def check_not_negative(name: str, value: object) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    if not (0.0 <= _number(name, value) < math.inf):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _check_number_or_tensor(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} as a tensor must have 1 element, got shape {tuple(value.shape)}")
        value = value.item()
    check_not_negative(name, value)


def _check_betas(betas: object) -> None:
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair (beta1, beta2), got {len(betas)} values: {betas!r}")
    for index, beta in enumerate(betas):
        if not (0.0 <= _number(f"betas[{index}]", beta) < 1.0):
            raise ValueError(f"betas[{index}] must be at least 0 and less than 1, got {beta!r}")


def _check_flags(group: Mapping[str, Any]) -> None:
    for name in ("maximize", "capturable", "differentiable", "accumulate_eps"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if group[name] is not None and not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True, False or None, got {group[name]!r}")


def _as_dtype(value: Any) -> Any:
    """Convert a dtype's name to the dtype; return anything else unchanged."""
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), value)
        return found if isinstance(found, torch.dtype) else value
    return value


def exp_avg_dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a param group's `exp_avg_dtype` names."""
    return _as_dtype(option(group, "exp_avg_dtype"))


def _plain(value: Any) -> Any:
    """Convert other numbers (NumPy's) to float; return Python numbers and anything else unchanged."""
    return float(value) if isinstance(value, Real) and not isinstance(value, (int, float)) else value


def make_plain(group: MutableMapping[str, Any]) -> None:
    """Rewrite the settings of a checked group in types that JSON and torch's full state dicts accept.

    They reject torch.dtype and NumPy numbers, which may come from a caller or an older checkpoint.
    """
    if option(group, "averaging") is not None:
        group.setdefault(TRAINS, True)
    if option(group, "rate_guard") is not None:
        for name in MEASURED:
            group.setdefault(name, 0.0)
    for name in ("lr", "weight_decay", "eps", "rectify_threshold", "rate_guard", "rate_constant"):
        if name in group:
            group[name] = _plain(group[name])
    if "betas" in group:
        group["betas"] = tuple(map(_plain, group["betas"]))
    dtype = _as_dtype(group.get("exp_avg_dtype"))
    if dtype is not None:
        group["exp_avg_dtype"] = str(dtype).removeprefix("torch.")


def _check_rate(group: Mapping[str, Any]) -> None:
    averaging, guard = option(group, "averaging"), option(group, "rate_guard")
    if averaging not in (None, SCHEDULE_FREE):
        raise ValueError(f"averaging must be None or {SCHEDULE_FREE!r}, got {averaging!r}")
    beta1, beta2 = group["betas"]
    if averaging and beta1 == 0.0:
        raise ValueError(f"averaging={averaging!r} needs betas[0] above 0, which is its share of the average")
    if averaging and beta2 > LARGEST_BETA2:
        raise ValueError(f"averaging={averaging!r} needs betas[1] of at most {LARGEST_BETA2}, got {beta2!r}")
    if guard is not None and not (1.0 <= _number("rate_guard", guard) < math.inf):
        raise ValueError(f"rate_guard must be None or a finite number of at least 1, got {guard!r}")
    constant = option(group, "rate_constant")
    if not (0.0 < _number("rate_constant", constant) < math.inf):
        raise ValueError(f"rate_constant must be a finite number above 0, got {constant!r}")
    if not option(group, "decay_by_rate") and not isinstance(decay := group["weight_decay"], Tensor) and decay > 1.0:
        raise ValueError(
            f"weight_decay={decay!r} with decay_by_rate=False is the share that each step takes off: it must be at "
            "most 1, and is about 3 / total_steps"
        )
    if guard is not None and group["maximize"]:
        raise ValueError(f"rate_guard={guard!r} measures a loss that falls; it does not support maximize=True")


def _check_options(group: Mapping[str, Any]) -> None:
    for name in ("master_weights", "stochastic_rounding", "decay_by_rate"):
        if not isinstance(option(group, name), bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    dtype, seed = option(group, "exp_avg_dtype"), option(group, "seed")
    if dtype is not None and not isinstance(_as_dtype(dtype), torch.dtype):
        raise TypeError(f"exp_avg_dtype must be None or torch.bfloat16, got {dtype!r}")
    if _as_dtype(dtype) not in (None, torch.bfloat16):
        raise ValueError(f"exp_avg_dtype must be None or torch.bfloat16, got {dtype!r}")
    whole_number("seed", seed, 0, 2**63 - 1)
    _check_rate(group)
    if group["differentiable"]:
        for name, default in OPTIONS.items():
            if name not in ("seed", "rate_constant") and option(group, name) != default:
                raise ValueError(f"differentiable=True does not support {name}={group[name]!r}; leave it out")


def _check_backend(group: Mapping[str, Any]) -> None:
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True and fused=True exclude each other; leave one of them None")
    for name in ("foreach", "fused"):
        if group[name] and group["differentiable"]:
            raise ValueError(f"{name}=True does not support differentiable=True; leave {name} None")
    if group["foreach"] and not group["capturable"]:
        for name in ("lr", "weight_decay"):
            if isinstance(group[name], Tensor):
                raise ValueError(f"{name} as a tensor with foreach=True needs capturable=True; or leave foreach None")


def check_group(group: Mapping[str, Any]) -> None:
    """Check a param group's settings.

    Raises:
        ValueError: A setting is out of range, or two settings exclude each other.
        TypeError: A setting has the wrong type.
    """
    _check_number_or_tensor("lr", group["lr"])
    _check_number_or_tensor("weight_decay", group["weight_decay"])
    check_not_negative("eps", group["eps"])
    _check_betas(group["betas"])
    threshold = _number("rectify_threshold", group["rectify_threshold"])
    if not (PAPER_THRESHOLD <= threshold < math.inf):
        raise ValueError(f"rectify_threshold must be a finite number of at least 4, got {threshold!r}")
    if group["eps_placement"] not in EPS_PLACEMENTS:
        raise ValueError(f"eps_placement must be one of {EPS_PLACEMENTS}, got {group['eps_placement']!r}")
    _check_flags(group)
    _check_options(group)
    _check_backend(group)


def check_constant(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a `rate_constant` where no group measures a rate.

    Raises:
        ValueError: It would have no effect.
    """
    groups = list(groups)
    wrong = [c for group in groups if (c := option(group, "rate_constant")) != OPTIONS["rate_constant"]]
    if wrong and all(option(group, "rate_guard") is None for group in groups):
        raise ValueError(f"rate_constant={wrong[0]!r} has no effect without rate_guard: give both, or leave it out")


@contextmanager
def telling_of_switches(optimizer: Any) -> Iterator[None]:
    """Warn, at the end of a load, of `averaging` and `rate_guard` that it has changed; of nested ones the outermost."""
    if optimizer.__dict__.get("_is_loading"):
        yield
        return
    names = ("averaging", "rate_guard")
    before = [{name: option(group, name) for name in names} for group in optimizer.param_groups]
    optimizer._is_loading = True
    try:
        yield
    finally:
        del optimizer._is_loading
    after = [{name: option(group, name) for name in names} for group in optimizer.param_groups]
    pairs = list(zip(before, after, strict=False))
    for name in names:
        changed = next(((old[name], new[name]) for old, new in pairs if old[name] != new[name]), None)
        if changed is not None:
            warnings.warn(_switched(name, *changed), UserWarning, stacklevel=4)


def _switched(name: str, old: Any, new: Any) -> str:
    return (
        f"the loaded state has {name}={new!r}, which holds from here on, as a state brings its groups' settings: this "
        f"optimizer was made with {name}={old!r}. Make it with {name}={new!r} to go on with that run; to train with "
        f"{name}={old!r}, load the model's weights alone, and leave the optimizer as it is made"
    )
