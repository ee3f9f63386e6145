"""The optimizer's state for torch's state dict functions under FSDP.

If an optimizer has no state, they create it with a step, for every trainable parameter, or for none if there is a
gradient; for a load they require state of exactly the trainable parameters. A checkpoint has state of the parameters
that were stepped, which may be fewer, and some of which may be frozen now.
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
    """The parameters with optimizer state in a DCP folder with these keys."""
    return {key.removeprefix(_STATE).rpartition(".")[0] for key in keys if key.startswith(_STATE)}


def stepped_in(folder: Path, index: int) -> set[str]:
    """The parameters with state in the full optimizer file, given by number, of an Accelerate folder."""
    return {str(name) for name in load_file(folder / f"optimizer{f'_{index}' if index else ''}.bin")["state"]}


def load_sharded(folder: Path, index: int, model: nn.Module, optimizer: Any) -> None:
    """Load the shards of a model and its optimizer (or None) with a given number from an Accelerate folder.

    The model's parameters are resharded.

    Raises:
        CheckpointError: A file is missing or damaged, or contains more than tensors and plain values.
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
    """The sharded state as {"model": ..., "optimizer": ...}, with names without the wrappers' components."""
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments}


def set_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Set model and optimizer to a state that was allocated by `state_of` and filled by a load."""
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@contextmanager
def only_stepped(optimizer: Any) -> Iterator[None]:
    """Make torch's functions use exactly the parameters that have state on this rank."""
    optimizer = base_optimizer(optimizer)
    with _requiring_grad(optimizer, {param for param, state in optimizer.state.items() if state}):
        yield


@contextmanager
def only_saved(model: nn.Module, optimizer: Any, names: Collection[str], *, whole: bool = False) -> Iterator[None]:
    """Make torch's functions load state of exactly these parameters; an error leaves everything unchanged.

    Args:
        model: The model that the optimizer steps; its parameters are resharded.
        optimizer: The optimizer, or an engine's wrapper of it.
        names: The parameters with state in the checkpoint, by their names in torch's state dicts.
        whole: Whether full tensors are loaded. torch then fails without any state, so one parameter gets state
            temporarily.
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
    """Inside, only the `wanted` parameters require a gradient: torch assumes that these have state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.requires_grad for param in params]
    try:
        for param in params:
            param.requires_grad_(param in wanted)
        yield
    finally:
        for param, required in zip(params, before, strict=True):
            param.requires_grad_(required)
