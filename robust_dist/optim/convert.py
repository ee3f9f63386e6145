"""Converts the state of other AdaBelief optimizers, so that their runs can continue with RAdaBeliefW.

Based on timm 1.0 (timm/optim/adabelief.py) and adabelief-pytorch 0.2 (adabelief_pytorch/AdaBelief.py). Both
rectify if rho_t >= 5, add eps to the second moment at every step, and again to its root before the
bias correction. Both keep an int `step` and call the second moment `exp_avg_var`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim.settings import DEFAULTS, OUTSIDE_UNCORRECTED
from robust_dist.optim.state import EXP_AVG, EXP_AVG_SQ, STEP

_THEIR_EXP_AVG_SQ = "exp_avg_var"
_THEIR_THRESHOLD = 5.0


def _refuse(setting: str, value: object, why: str) -> None:
    raise ValueError(f"cannot convert an AdaBelief state with {setting}={value!r}: {why}")


def _check_options(options: Mapping[str, Any], decoupled: str) -> None:
    if options.get("amsgrad"):
        _refuse("amsgrad", True, "RAdaBeliefW keeps no maximum of the second moment")
    if not options["rectify"]:
        _refuse("rectify", options["rectify"], "RAdaBeliefW always rectifies")
    if not options["degenerated_to_sgd"]:
        _refuse("degenerated_to_sgd", False, "RAdaBeliefW takes the unrectified step where it does not rectify")
    if options["weight_decay"] != 0 and not options[decoupled]:
        _refuse(decoupled, False, "RAdaBeliefW's decay is decoupled")
    if options["weight_decay"] != 0 and options["fixed_decay"]:
        _refuse("fixed_decay", True, "RAdaBeliefW multiplies the decay by lr")


def _state(state: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in (STEP, EXP_AVG, _THEIR_EXP_AVG_SQ) if key not in state]
    if missing:
        raise ValueError(f"not a state of AdaBelief: {missing} missing among {sorted(state)}")
    step = state[STEP]
    return {
        STEP: torch.tensor(float(step.item() if isinstance(step, Tensor) else step), dtype=torch.float32),
        EXP_AVG: state[EXP_AVG].detach().clone(),
        EXP_AVG_SQ: state[_THEIR_EXP_AVG_SQ].detach().clone(),
    }


def _group(group: Mapping[str, Any], theirs: set[str]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in theirs}
    ours = {**DEFAULTS, "rectify_threshold": _THEIR_THRESHOLD, "eps_placement": OUTSIDE_UNCORRECTED}
    return {**ours, **kept, "betas": tuple(group["betas"])}


def _convert(state_dict: Mapping[str, Any], absent: Mapping[str, Any], decoupled: str) -> dict[str, Any]:
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"not an optimizer's state_dict: {name!r} missing among {sorted(state_dict)}")
    for group in state_dict["param_groups"]:
        _check_options({**absent, **group}, decoupled)
    theirs = {"amsgrad", "rectify", "degenerated_to_sgd", "fixed_decay", decoupled, "buffer"}
    return {
        "state": {key: _state(state) for key, state in state_dict["state"].items()},
        "param_groups": [_group(group, theirs) for group in state_dict["param_groups"]],
    }


def from_timm_adabelief(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the state_dict of timm's AdaBelief (timm calls it `radabelief`) to one for RAdaBeliefW.

    Args:
        state_dict: The result of `timm.optim.AdaBelief.state_dict()`.

    Returns:
        A state_dict with copied tensors, whose groups also set timm's threshold and eps placement.

    Raises:
        ValueError: It uses an option that RAdaBeliefW does not have (amsgrad, rectify=False,
            degenerated_to_sgd=False, coupled or fixed weight decay), or is not a state of AdaBelief.
    """
    absent = {"decoupled_decay": True, "fixed_decay": False, "rectify": True, "degenerated_to_sgd": True}
    return _convert(state_dict, absent, "decoupled_decay")


def from_adabelief_pytorch(
    state_dict: Mapping[str, Any],
    *,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    rectify: bool = True,
    degenerated_to_sgd: bool = True,
) -> dict[str, Any]:
    """Convert the state_dict of adabelief_pytorch.AdaBelief to one for RAdaBeliefW.

    Args:
        state_dict: The result of `adabelief_pytorch.AdaBelief.state_dict()`.
        weight_decouple: The constructor's argument; this and the following are not in the state_dict.
        fixed_decay: The constructor's argument.
        rectify: The constructor's argument.
        degenerated_to_sgd: The constructor's argument.

    Returns:
        A state_dict with copied tensors, whose groups also set AdaBelief's threshold and eps placement.

    Raises:
        ValueError: See `from_timm_adabelief`.
    """
    absent = {
        "weight_decouple": weight_decouple,
        "fixed_decay": fixed_decay,
        "rectify": rectify,
        "degenerated_to_sgd": degenerated_to_sgd,
    }
    return _convert(state_dict, absent, "weight_decouple")
