"""The state of a parameter: made key by key, kept in float32 or better, sharded as its parameter is."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

STEP = "step"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: its own, but float32 (complex64) at the least."""
    return torch.promote_types(param.dtype, torch.float32)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor; does not import torch.distributed.tensor, which is slow."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _same_layout(tensor: Any, like: Any) -> bool:
    return tensor.device_mesh == like.device_mesh and tuple(tensor.placements) == tuple(like.placements)


def _placed_like(tensor: Any, param: Any) -> Any:
    if is_dtensor(tensor):
        return tensor.redistribute(param.device_mesh, param.placements)
    raise TypeError("a DTensor parameter has a gradient or state that is a plain tensor; wrap it as the parameter is")


def local(tensor: Any, param: Tensor) -> Tensor:
    """The plain tensor that this rank computes on; a gradient sharded otherwise than `param` is redistributed."""
    if not is_dtensor(param):
        return tensor
    if tensor is not param and not (is_dtensor(tensor) and _same_layout(tensor, param)):
        tensor = _placed_like(tensor, param)
    return tensor.to_local()


def as_step(value: Any, param: Tensor, capturable: bool) -> Tensor:
    """A step count as this optimizer keeps it: a fresh 0-d float32 tensor, on the CPU unless capturable."""
    device = param.device if capturable else torch.device("cpu")
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=torch.float32, copy=True)
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def _repair_step(state: dict[str, Any], param: Tensor, capturable: bool) -> None:
    step = state.get(STEP, 0.0)
    device_type = param.device.type if capturable else "cpu"
    if not isinstance(step, Tensor) or step.device.type != device_type:
        state[STEP] = as_step(step, param, capturable)


def complete(state: dict[str, Any], param: Tensor, capturable: bool) -> None:
    """Make what is missing of a parameter's state, key by key: loaders may have brought a part of it."""
    _repair_step(state, param, capturable)
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(
                param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False
            )
        elif is_dtensor(param) and not (is_dtensor(state[key]) and _same_layout(state[key], param)):
            state[key] = _placed_like(state[key], param)


def own_steps(states: Mapping[Tensor, Any], params: Iterable[Tensor], capturable: bool) -> None:
    """Give every parameter a step tensor of its own; loaders bring ints, or one tensor for all."""
    for param in params:
        state = states.get(param)
        if state and STEP in state:
            state[STEP] = as_step(state[STEP], param, capturable)


def _saved_ids(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [param for group in groups for param in group["params"]]


def _restore(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Any]) -> None:
    # load_state_dict casts floating state to the parameter's dtype; what it was given still has the bits
    ids, params = _saved_ids(loaded["param_groups"]), _saved_ids(optimizer.param_groups)
    for saved_id, param in zip(ids, params, strict=True):
        if state_dtype(param) == param.dtype or saved_id not in loaded["state"]:
            continue
        for key, value in loaded["state"][saved_id].items():
            if key != STEP and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                optimizer.state[param][key] = value.to(device=param.device, dtype=state_dtype(param))


def load_exactly(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Run `load(state_dict)` so that the state of bfloat16 and float16 parameters comes back in float32.

    The two hooks live for this call only: hooks do not survive deepcopy or pickle. The first runs after
    the user's own pre-hooks and so sees what is really loaded; the second before their post-hooks.
    """
    loaded: dict[str, Any] = {}

    def remember(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        loaded.update(given)

    def restore(_: torch.optim.Optimizer) -> None:
        _restore(optimizer, loaded)

    before = optimizer.register_load_state_dict_pre_hook(remember)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        load(state_dict)
    finally:
        before.remove()
        after.remove()
