"""The optimizer's state as torch's state dict functions take it under FSDP.

They fill an optimizer without state by a step of their own, which touches every trainable parameter, or no parameter
where a gradient is there; at a load they want state of the trainable ones, all of them and them alone. A checkpoint
holds state of what was stepped: fewer parameters, or some that are frozen now.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from robust_dist.checkpoint.dcp import load_into, read_metadata
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.save_load import make_state
from robust_dist.optim.groups import reshard
from robust_dist.schedule import base_optimizer

_STATE = "optimizer.state."


def names_with_state(keys: Iterable[str]) -> set[str]:
    """The parameters of which a DCP folder with these keys holds the optimizer's state."""
    return {key.removeprefix(_STATE).rpartition(".")[0] for key in keys if key.startswith(_STATE)}


def stepped_in(folder: Path, index: int) -> set[str]:
    """The parameters of which a whole optimizer file of Accelerate's folder, by its number, holds state."""
    return {str(name) for name in load_file(folder / f"optimizer{f'_{index}' if index else ''}.bin")["state"]}


def load_sharded(folder: Path, index: int, model: nn.Module, optimizer: Any) -> None:
    """Load the shards of a model and of its optimizer, which may be None, from an Accelerate folder by their number.

    The model's parameters are sharded again.

    Raises:
        CheckpointError: A file is missing, damaged, or holds more than tensors and plain values.
    """
    weights, moments = folder / f"pytorch_model_fsdp_{index}", folder / f"optimizer_{index}"
    if optimizer is None:
        state = {"model": get_model_state_dict(model)}
        load_into(weights, state)
        set_model_state_dict(model, state["model"])
        return
    optimizer = base_optimizer(optimizer)
    with only_saved(model, optimizer, names_with_state(read_metadata(moments).state_dict_metadata)):
        state = state_of(model, optimizer)
        load_into(weights, {"model": state["model"]})
        load_into(moments, {"optimizer": state["optimizer"]})
        set_state(model, optimizer, state)


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The sharded state as {"model": ..., "optimizer": ...}, by names without wrappers' components."""
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments}


def set_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Give model and optimizer what `state_of` made room for and a load has filled."""
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@contextmanager
def only_stepped(optimizer: Any) -> Iterator[None]:
    """Have torch's functions find state of the parameters that have some on this rank, and of no other."""
    optimizer = base_optimizer(optimizer)
    with _requiring_grad(optimizer, {param for param, state in optimizer.state.items() if state}):
        yield


@contextmanager
def only_saved(model: nn.Module, optimizer: Any, names: Collection[str], *, whole: bool = False) -> Iterator[None]:
    """Have torch's functions load state of these parameters, and of no other; an error leaves all as it was.

    Args:
        model: The model that the optimizer steps; its parameters are sharded again.
        optimizer: The optimizer, or an engine's wrapper of it.
        names: What a checkpoint holds state of, as torch's state dicts call it.
        whole: Whether tensors are loaded whole. torch then fails where there is no state at all, so that one parameter
            has some meanwhile.
    """
    reshard(model)
    optimizer = base_optimizer(optimizer)
    # A flat parameter of FSDP1 has several names.
    wanted = {param for name, param in model.named_parameters() if not _get_fqns(model, name).isdisjoint(names)}
    held = [param for group in optimizer.param_groups for param in group["params"]]
    filler = held[:1] if whole and not wanted else []
    before = dict(optimizer.state)
    try:
        for param in [key for key in optimizer.state if key not in wanted]:
            del optimizer.state[param]
        lacking = [param for param in held if param in wanted and not optimizer.state.get(param)]
        make_state(optimizer, [*lacking, *filler])
        with _requiring_grad(optimizer, wanted):
            yield
        for param in filler:
            optimizer.state.pop(param, None)
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(before)
        raise


@contextmanager
def _requiring_grad(optimizer: Optimizer, wanted: Collection[Tensor]) -> Iterator[None]:
    """Only `wanted` parameters require a gradient inside: torch takes these to have state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.requires_grad for param in params]
    try:
        for param in params:
            param.requires_grad_(param in wanted)
        yield
    finally:
        for param, required in zip(params, before, strict=True):
            param.requires_grad_(required)
