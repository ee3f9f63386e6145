"""The optimizer's state as torch's state dict functions take it under FSDP.

They fill an optimizer without state by a step of their own, which touches every trainable parameter, or no parameter
where a gradient is there; at a load they want state of the trainable ones, all of them and them alone. A checkpoint
holds state of what was stepped: fewer parameters, or some that are frozen now.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint import default_planner
from torch.optim import Optimizer

from robust_dist.checkpoint.dcp_files import read_metadata
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.save_load import make_state
from robust_dist.optim.groups import reshard
from robust_dist.schedule import base_optimizer

_STATE = "optimizer.state."


def names_in(plugin: Any, folder: Path, index: int) -> set[str] | None:
    """The parameters of which an Accelerate folder's optimizer has state; None where its load needs no help.

    Args:
        plugin: Accelerate's FullyShardedDataParallelPlugin.
        folder: What `accelerator.save_state` wrote.
        index: The optimizer's number.
    """
    if plugin.state_dict_type.name == "SHARDED_STATE_DICT":
        sharded = folder / f"optimizer_{index}"
        return names_with_state(read_metadata(sharded).state_dict_metadata) if sharded.is_dir() else None
    whole = folder / (f"optimizer_{index}.bin" if index else "optimizer.bin")
    if plugin.fsdp_version == 1 or not whole.is_file():
        return None
    return {str(name) for name in load_file(whole)["state"]}


def names_with_state(keys: Iterable[str]) -> set[str]:
    """The parameters of which a DCP folder with these keys holds the optimizer's state."""
    return {key.removeprefix(_STATE).rpartition(".")[0] for key in keys if key.startswith(_STATE)}


@contextmanager
def only_stepped(optimizer: Any) -> Iterator[None]:
    """Have torch's functions find state of the parameters that have some on this rank, and of no other.

    Args:
        optimizer: The optimizer, or an engine's wrapper of it.
    """
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
    wanted = {param for param, called in _called(model).items() if not called.isdisjoint(names)}
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


def _called(model: nn.Module) -> dict[Tensor, set[str]]:
    """What torch's state dicts call each parameter; a flat one of FSDP1 has several names."""
    from torch.distributed.checkpoint.state_dict import _get_fqns

    return {param: set(_get_fqns(model, name)) for name, param in model.named_parameters()}


@contextmanager
def _requiring_grad(optimizer: Optimizer, wanted: Collection[Tensor]) -> Iterator[None]:
    """What requires a gradient is what torch takes to have state; nothing else looks at it meanwhile."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.requires_grad for param in params]
    try:
        for param in params:
            param.requires_grad_(param in wanted)
        yield
    finally:
        for param, required in zip(params, before, strict=True):
            param.requires_grad_(required)


@contextmanager
def planner_that_keeps_empty_shards() -> Iterator[None]:
    """Inside, Accelerate makes a planner of DCP that loads FSDP1's parameters of which a rank holds nothing.

    With flattening, torch's default, the planner drops a rank's empty shards and then misses their keys.
    """
    original: Any = default_planner.DefaultLoadPlanner
    default_planner.DefaultLoadPlanner = functools.partial(  # type: ignore[misc,assignment]
        original, flatten_sharded_tensors=False
    )
    try:
        yield
    finally:
        default_planner.DefaultLoadPlanner = original  # type: ignore[misc]
