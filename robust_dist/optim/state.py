"""The state of a parameter: made key by key, kept in float32 or better, sharded as its parameter is."""

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
    """The dtype of a parameter's moments: its own, but float32 (complex64) at the least."""
    return torch.promote_types(param.dtype, torch.float32)


def _moment_dtype(key: str, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a group's settings keep a moment of this parameter."""
    wide = state_dtype(param)
    low = exp_avg_dtype(group) if key == EXP_AVG and wide is torch.float32 else None
    return low or wide


def _are_of_their_dtypes(moments: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether each has its parameter's `state_dtype`."""
    found, wanted = {*map(_dtype, moments)}, {*map(_dtype, params)}
    if len(found) == len(wanted) == 1:
        return found == {torch.promote_types(next(iter(wanted)), torch.float32)}
    return all(moment.dtype is state_dtype(param) for moment, param in zip(moments, params, strict=True))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none is of a class of its own, as a DTensor is."""
    if torch.compiler.is_compiling():
        # torch 2.6 cannot trace a set of classes.
        return all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in tensors)
    return PLAIN.issuperset(map(type, tensors))


def is_fake(tensor: Any) -> bool:
    """Whether this is a FakeTensor, or a DTensor of one: it has a shape, but neither memory nor values."""
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    if type(local) is Tensor or type(local) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(local, module.FakeTensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor; does not import torch.distributed.tensor, which is slow."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    if torch.compiler.is_compiling():
        # Dynamo does not trace a look into sys.modules.
        from torch.distributed.tensor import DTensor

        return isinstance(tensor, DTensor)
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def _is_placed(tensor: Any, param: Any) -> bool:
    """Whether a tensor is a DTensor in the layout of this DTensor parameter."""
    if type(tensor) is not type(param) and not is_dtensor(tensor):
        return False
    # The public properties cost more than the comparison itself.
    found, wanted = tensor._spec, param._spec
    if found is wanted:
        return True
    return (found.mesh is wanted.mesh or found.mesh == wanted.mesh) and found.placements == wanted.placements


def _placed_like(tensor: Any, param: Any) -> Any:
    if is_dtensor(tensor):
        return tensor.redistribute(param.device_mesh, param.placements)
    raise TypeError("a DTensor parameter has a gradient or state that is a plain tensor; wrap it as the parameter is")


def _sharing_placements(tensor: Any, param: Any) -> Any:
    """The same tensor with the parameter's own placements: a comparison is fast only where they are the same."""
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
        # One object for both makes every later comparison a glance.
        placed._spec = param._spec
    return placed


def local_columns(params: list[Any], grads: list[Any], *moments: list[Any]) -> list[list[Tensor]] | None:
    """`local_slot` of many DTensor parameters, a column at a time; None where a gradient has another layout."""
    try:
        if not all(map(is_, map(_layout, grads), map(_layout, params))):
            return None
    except AttributeError:  # a gradient that is a plain tensor
        return None
    return [list(map(_local, column)) for column in (params, grads, *moments)]


def traced_columns(params: list[Any], grads: list[Any], *moments: list[Any]) -> list[list[Tensor]]:
    """`local_slot` of DTensors and plain tensors, in what Dynamo can trace: its graph holds the DTensors themselves."""
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
    """This rank's local tensors of a DTensor parameter whose state is `complete`.

    A gradient sharded otherwise than `param` is redistributed. Without autograd the local tensors are what
    `to_local()` returns, at a hundredth of its price.
    """
    # fully_shard gives a parameter and its gradient one and the same layout
    if type(grad) is not type(param) or (grad._spec is not param._spec and not _is_placed(grad, param)):
        grad = _placed_like(grad, param)
    return param._local_tensor, grad._local_tensor, *(tensor._local_tensor for tensor in state)


def first_index(tensor: Any) -> int:
    """The row-major index, in the whole tensor, of a DTensor's first local element; 0 of a plain or a fake one's."""
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
    """A step count as this optimizer keeps it: a fresh 0-d float32 tensor, on the parameter's device or the CPU."""
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
    """The states' columns (step, exp_avg, exp_avg_sq) where `complete` would find nothing to do; else None.

    Asked of all at once, which is a fraction of the price of asking one by one. A compiled step, which asks when it is
    traced alone, asks one by one, in what torch 2.6 can trace.
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
    # model.double() and its kind change a parameter's dtype between two steps.
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
    """State of a parameter whose dtype has changed; widened, it goes on from the very same values."""
    if value.is_complex() != dtype.is_complex:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} is {param.dtype}, and its moments are {value.dtype}: moments of"
            " real numbers are none of complex ones. Change the model before its optimizer's first step, or delete the"
            " parameter's entry in optimizer.state, so that its moments start anew"
        )
    return value.to(dtype)


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], on_device: bool) -> None:
    """Make what is missing of a parameter's state, key by key: loaders may have brought a part of it.

    Moments follow the parameter's dtype where that has changed, and the group's `exp_avg_dtype`.

    Args:
        state: The parameter's.
        param: The parameter.
        group: Its param group.
        on_device: Whether its step count is kept on its device; else on the CPU.

    Raises:
        RuntimeError: The moments are real and the parameter is complex, or the other way round.
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
    """The fast weights of averaging, which begin as the trained ones."""
    trained, dtype = state.get(MASTER, param), state_dtype(param)
    if Z not in state:
        state[Z] = _sharing_placements(empty_like(param, dtype).copy_(trained.detach()), param)
    elif state[Z].dtype is not dtype:
        state[Z] = _sharing_placements(_cast(state[Z], dtype, param), param)
    if is_dtensor(param) and not _is_placed(state[Z], param):
        state[Z] = _placed_like(state[Z], param)


def has_master(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the group's settings give this parameter a master of higher precision."""
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
    # A master that nobody steps would be wrong later. The parameter of a model that was widened takes its value, but
    # not in a dry step.
    if option(group, "master_weights"):
        if float(group["lr"]) == 0.0:
            return
        with torch.no_grad():
            param.copy_(state[MASTER])
    del state[MASTER]


def own_steps(states: Mapping[Tensor, Any], params: Iterable[Tensor], capturable: bool) -> None:
    """Give every parameter a step tensor of its own; loaders bring ints, or one tensor for all."""
    for param in params:
        state = states.get(param)
        if state and STEP in state:
            state[STEP] = as_step(state[STEP], param, capturable)


def _restored(key: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """A loaded value in this optimizer's dtype; None for what is no floating tensor."""
    if key == STEP or not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    kept = key == EXP_AVG and value.dtype == exp_avg_dtype(group)
    return value.to(device=param.device, dtype=value.dtype if kept else state_dtype(param))


def _restore(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Any]) -> None:
    # load_state_dict casts floating state to the parameter's dtype; what it was given still has the bits
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
    """Run `load(state_dict)` so that the state of bfloat16 and float16 parameters comes back in float32.

    And an exp_avg that the group keeps in bfloat16 comes back so.

    Moments of sharded parameters come back with the parameters' own placements.

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
    for param, state in optimizer.state.items():
        for key in (*MOMENTS, MASTER, Z):
            if key in state:
                state[key] = _sharing_placements(state[key], param)
