"""The state of a parameter: created key by key, at least float32, sharded like its parameter."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim.pages import empty_like
from robust_dist.optim.settings import exp_avg_dtype, option

_local, _layout, _device, _dtype = map(attrgetter, ("_local_tensor", "_spec", "device", "dtype"))
PLAIN = frozenset((Tensor, torch.nn.Parameter))
STEP = "step"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MASTER = "master"
Z = "z"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: its own, but at least float32 (complex64)."""
    return torch.promote_types(param.dtype, torch.float32)


def _moment_dtype(key: str, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a parameter's moment under its group's settings."""
    wide = state_dtype(param)
    low = exp_avg_dtype(group) if key == EXP_AVG and wide is torch.float32 else None
    return low or wide


def _are_of_their_dtypes(moments: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether each moment has its parameter's `state_dtype`."""
    found, wanted = {*map(_dtype, moments)}, {*map(_dtype, params)}
    if len(found) == len(wanted) == 1:
        return found == {torch.promote_types(next(iter(wanted)), torch.float32)}
    return all(moment.dtype is state_dtype(param) for moment, param in zip(moments, params, strict=True))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all are plain tensors or parameters, not subclasses such as DTensor."""
    if torch.compiler.is_compiling():
        # torch 2.6 cannot trace a set of classes.
        return all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in tensors)
    return PLAIN.issuperset(map(type, tensors))


def is_fake(tensor: Any) -> bool:
    """Whether this is a FakeTensor or a DTensor of one, which has neither memory nor values."""
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    if type(local) is Tensor or type(local) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(local, module.FakeTensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor; avoids importing torch.distributed.tensor, which is slow."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    if torch.compiler.is_compiling():
        # Dynamo cannot trace an access to sys.modules.
        from torch.distributed.tensor import DTensor

        return isinstance(tensor, DTensor)
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; a plain tensor unchanged."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def _is_placed(tensor: Any, param: Any) -> bool:
    """Whether a tensor is a DTensor with the layout of this DTensor parameter."""
    if type(tensor) is not type(param) and not is_dtensor(tensor):
        return False
    # The public properties are slower than the comparison itself.
    found, wanted = tensor._spec, param._spec
    if found is wanted:
        return True
    return (found.mesh is wanted.mesh or found.mesh == wanted.mesh) and found.placements == wanted.placements


def _placed_like(tensor: Any, param: Any) -> Any:
    if is_dtensor(tensor):
        return tensor.redistribute(param.device_mesh, param.placements)
    raise TypeError("a DTensor parameter has a gradient or state that is a plain tensor; wrap it as the parameter is")


def _sharing_placements(tensor: Any, param: Any) -> Any:
    """The same tensor with the parameter's own placements object, which makes comparisons fast."""
    if not (is_dtensor(param) and _is_placed(tensor, param)):
        return tensor
    placed = type(param).from_local(
        tensor._local_tensor,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=tensor.stride(),
    )
    if placed._spec == param._spec:
        # With one shared object, later comparisons are identity checks.
        placed._spec = param._spec
    return placed


def local_columns(params: list[Any], grads: list[Any], *moments: list[Any]) -> list[list[Tensor]] | None:
    """`local_slot` of many DTensor parameters, a column at a time; None if a gradient has another layout."""
    try:
        if not all(map(is_, map(_layout, grads), map(_layout, params))):
            return None
    except AttributeError:  # a gradient that is a plain tensor
        return None
    return [list(map(_local, column)) for column in (params, grads, *moments)]


def traced_columns(params: list[Any], grads: list[Any], *moments: list[Any]) -> list[list[Tensor]]:
    """`local_slot` of DTensors and plain tensors in code that Dynamo can trace, whose graph has the DTensors."""
    columns: list[list[Tensor]] = [[] for _ in range(2 + len(moments))]
    for row in zip(params, grads, *moments, strict=True):
        param, grad, *state = row
        if is_dtensor(param):
            if grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
            row = (param.to_local(), grad.to_local(), *(tensor.to_local() for tensor in state))
        for column, tensor in zip(columns, row, strict=True):
            column.append(tensor)
    return columns


def local_slot(param: Any, grad: Any, *state: Any) -> tuple[Tensor, ...]:
    """This rank's local tensors of a DTensor parameter, its gradient and its complete state.

    A gradient whose sharding differs from that of `param` is redistributed. Without autograd the local tensors are
    those of `to_local()`, at a hundredth of its cost.
    """
    # fully_shard gives a parameter and its gradient the same layout object
    if type(grad) is not type(param) or (grad._spec is not param._spec and not _is_placed(grad, param)):
        grad = _placed_like(grad, param)
    return param._local_tensor, grad._local_tensor, *(tensor._local_tensor for tensor in state)


def first_index(tensor: Any) -> int:
    """The row-major index of a DTensor's first local element in the whole tensor; 0 for a plain or fake tensor."""
    if not is_dtensor(tensor) or is_fake(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    stride = 1
    index = 0
    for size, offset in zip(reversed(tensor.shape), reversed(offsets), strict=True):
        index += stride * offset
        stride *= size
    return index


def as_step(value: Any, param: Tensor, on_device: bool) -> Tensor:
    """A step count as a new 0-d float32 tensor, on the parameter's device or the CPU."""
    device = param.device if on_device else torch.device("cpu")
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=torch.float32, copy=True)
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def _repair_step(state: dict[str, Any], param: Tensor, on_device: bool) -> None:
    step = state.get(STEP, 0.0)
    device = param.device if on_device else torch.device("cpu")
    if not isinstance(step, Tensor) or step.device != device:
        state[STEP] = as_step(step, param, on_device)


def completed(states: Sequence[dict[str, Any]], params: Sequence[Any], on_device: bool) -> list[list[Tensor]] | None:
    """The columns (step, exp_avg, exp_avg_sq) of the states if `complete` has nothing to do; else None.

    Checking all states together is much cheaper than one by one; a compiled step checks only while it is traced, one
    by one, in code that torch 2.6 can trace.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        columns = [list(map(itemgetter(key), states)) for key in (STEP, *MOMENTS)]
    except KeyError:
        return None
    steps, *moments = columns
    devices = {*map(_device, params)} if on_device else {torch.device("cpu")}
    if {*map(type, steps)} != {Tensor} or len(devices) != 1 or {*map(_device, steps)} != devices:
        return None
    # model.double() and the like change a parameter's dtype between two steps.
    if not _are_of_their_dtypes(moments[1], params):
        return None
    if all_plain(params):
        return columns
    # DTensors; `_sharing_placements` gave the moments their own layout.
    try:
        wanted = list(map(_layout, params))
        return columns if all(all(map(is_, map(_layout, column), wanted)) for column in moments) else None
    except AttributeError:
        return None


def _cast(value: Tensor, dtype: torch.dtype, param: Tensor) -> Tensor:
    """Cast the state of a parameter whose dtype has changed; widening is exact."""
    if value.is_complex() != dtype.is_complex:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} is {param.dtype}, and its moments are {value.dtype}: moments"
            " cannot be converted between real and complex. Convert the model before the optimizer's first step, or"
            " delete the parameter's entry in optimizer.state to reset its moments"
        )
    return value.to(dtype)


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], on_device: bool) -> None:
    """Create the missing keys of a parameter's state, which may have been loaded in part.

    Moments follow the parameter's dtype, if it has changed, and the group's `exp_avg_dtype`.

    Args:
        state: The parameter's state.
        param: The parameter.
        group: Its param group.
        on_device: Whether the step count is on the parameter's device; else on the CPU.

    Raises:
        RuntimeError: The moments are real and the parameter is complex, or the reverse.
    """
    _repair_step(state, param, on_device)
    for key in MOMENTS:
        dtype = _moment_dtype(key, param, group)
        if key not in state:
            state[key] = _sharing_placements(empty_like(param, dtype).zero_(), param)
        elif state[key].dtype is not dtype:
            state[key] = _sharing_placements(_cast(state[key], dtype, param), param)
        if is_dtensor(param) and not _is_placed(state[key], param):
            state[key] = _placed_like(state[key], param)
    _complete_master(state, param, group)
    if option(group, "averaging") is not None:
        _complete_z(state, param)


def _complete_z(state: dict[str, Any], param: Tensor) -> None:
    """Create the fast weights of averaging as a copy of the trained weights."""
    trained, dtype = state.get(MASTER, param), state_dtype(param)
    if Z not in state:
        state[Z] = _sharing_placements(empty_like(param, dtype).copy_(trained.detach()), param)
    elif state[Z].dtype is not dtype:
        state[Z] = _sharing_placements(_cast(state[Z], dtype, param), param)
    if is_dtensor(param) and not _is_placed(state[Z], param):
        state[Z] = _placed_like(state[Z], param)


def has_master(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether this parameter has a master of higher precision under its group's settings."""
    return option(group, "master_weights") and state_dtype(param) != param.dtype


def _complete_master(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    wanted = has_master(param, group)
    if not wanted and MASTER not in state:
        return
    if MASTER not in state:
        state[MASTER] = _sharing_placements(empty_like(param, state_dtype(param)).copy_(param.detach()), param)
    if is_dtensor(param) and not _is_placed(state[MASTER], param):
        state[MASTER] = _placed_like(state[MASTER], param)
    if wanted:
        return
    # A master that is no longer stepped would become stale. A widened parameter takes its value, except in a dry step.
    if option(group, "master_weights"):
        if float(group["lr"]) == 0.0:
            return
        with torch.no_grad():
            param.copy_(state[MASTER])
    del state[MASTER]


def own_steps(states: Mapping[Tensor, Any], params: Iterable[Tensor], capturable: bool) -> None:
    """Give every parameter its own step tensor; loaded states may have ints, or one tensor for all."""
    for param in params:
        state = states.get(param)
        if state and STEP in state:
            state[STEP] = as_step(state[STEP], param, capturable)


def _restored(key: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """A loaded value in this optimizer's dtype; None if it is not a floating-point tensor."""
    if key == STEP or not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    kept = key == EXP_AVG and value.dtype == exp_avg_dtype(group)
    return value.to(device=param.device, dtype=value.dtype if kept else state_dtype(param))


def _restore(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Any]) -> None:
    # load_state_dict has cast floating-point state to the parameter's dtype; its argument still has the bits
    for theirs, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        exact = option(group, "exp_avg_dtype") is None
        for saved_id, param in zip(theirs["params"], group["params"], strict=True):
            if exact and state_dtype(param) == param.dtype:
                continue
            for key, value in loaded["state"].get(saved_id, {}).items():
                restored = _restored(key, value, param, group)
                if restored is not None:
                    optimizer.state[param][key] = restored


def load_exactly(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Run `load(state_dict)` without losing the dtypes of the state.

    The state of bfloat16 and float16 parameters is restored in float32, and an exp_avg in its group's `exp_avg_dtype`.
    Moments of sharded parameters get the parameters' own placements.

    The two hooks exist only during this call, because hooks do not survive deepcopy or pickle. The first runs after
    the user's pre-hooks, so it sees what is loaded; the second runs before the user's post-hooks.
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
    for param, state in optimizer.state.items():
        for key in (*MOMENTS, MASTER, Z):
            if key in state:
                state[key] = _sharing_placements(state[key], param)
