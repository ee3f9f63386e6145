"""The optimizer's state as torch's state dict functions take it under FSDP, and Accelerate's save and load with it.

They fill an optimizer without state by a step of their own, which touches every trainable parameter, or no parameter
where a gradient is there; at a load they want state of the trainable ones, all of them and them alone. A checkpoint
holds state of what was stepped: fewer parameters, or some that are frozen now.
"""

import functools
import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import default_planner
from torch.optim import Optimizer

from robust_dist.checkpoint.dcp_metadata import plain_failures, plain_reading
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.optim.groups import reshard

_STATE = "optimizer.state."


def save_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """As `accelerator.save_state`; under FSDP, parameters that were never stepped are saved as that.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank calls this.
        folder: Where the checkpoint will be.
        **options: Of `accelerator.save_state`.
    """
    with ExitStack() as stack:
        if accelerator.distributed_type.value == "FSDP":
            for model, optimizer in zip(accelerator._models, accelerator._optimizers, strict=False):
                reshard(model)
                stack.enter_context(only_stepped(_base(optimizer)))
        accelerator.save_state(str(folder), **options)


def load_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """As `accelerator.load_state`, and right under FSDP, too.

    torch and Accelerate 1.15 fail under FSDP2 ("Missing key") where a trainable parameter was never stepped; they drop
    the state of parameters that are frozen now, and all of it where gradients are there, as under FSDP1 before a first
    step, without a word. And torch 2.14's planner fails under FSDP1 ("Missing key ... optimizer.param_groups") where a
    parameter has fewer rows than there are ranks.

    Nothing that the files hold is run: objects of `register_for_checkpointing` are read with weights_only, a DCP folder
    through `dcp_metadata.plain_reading`; what DeepSpeed reads it unpickles, whatever is asked of it. Accelerate passes
    over a random state that it cannot read: here it is an error.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank calls this.
        folder: What `accelerator.save_state` or `convert` wrote.
        **options: Of `accelerator.load_state`.

    Raises:
        CheckpointError: A file holds more than tensors and plain values, or a random state is damaged.
    """
    with ExitStack() as stack:
        for context in (plain_reading(), plain_failures(folder), _plain_objects()):
            stack.enter_context(context)
        if accelerator.distributed_type.value == "FSDP":
            for index, (model, optimizer) in enumerate(zip(accelerator._models, accelerator._optimizers, strict=False)):
                names = _names_in(accelerator, Path(folder), index)
                if names is not None:
                    stack.enter_context(only_saved(model, _base(optimizer), names, whole=_saves_whole(accelerator)))
            if accelerator.state.fsdp_plugin.fsdp_version == 1:
                stack.enter_context(_planner_that_keeps_empty_shards())
        accelerator.load_state(str(folder), **options)
    _set_random_state(Path(folder, f"random_states_{accelerator.process_index}.pkl"))


@contextmanager
def _plain_objects() -> Iterator[None]:
    """Accelerate reads registered objects with weights_only=False."""
    from accelerate import accelerator as module

    def load_plain(obj: Any, path: str, index: int = 0) -> None:
        obj.load_state_dict(load_file(Path(path, f"custom_checkpoint_{index}.pkl")))

    place: Any = module
    own = place.load_custom_state
    place.load_custom_state = load_plain
    try:
        yield
    finally:
        place.load_custom_state = own


def _set_random_state(path: Path) -> None:
    """As Accelerate does, which says nothing where it fails; a rank that was not there before has no file."""
    import numpy as np
    from accelerate.utils import load

    if not path.exists():
        return
    try:
        states = load(path)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])  # noqa: NPY002
        torch.set_rng_state(states["torch_manual_seed"])
        devices = states.get("torch_cuda_manual_seed", [])
        # With another number of GPUs there is no state for each, as on another machine.
        if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: the random state cannot be read ({reason})") from None


def _base(optimizer: Any) -> Optimizer:
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _saves_whole(accelerator: Any) -> bool:
    found: bool = accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"
    return found


def _names_in(accelerator: Any, folder: Path, index: int) -> set[str] | None:
    """The parameters of which an Accelerate folder's optimizer has state; None where its load needs no help."""
    from robust_dist.checkpoint.dcp import read_metadata

    plugin = accelerator.state.fsdp_plugin
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
def only_stepped(optimizer: Optimizer) -> Iterator[None]:
    """Have torch's functions find state of the parameters that have some on this rank, and of no other.

    Args:
        optimizer: The torch optimizer itself.
    """
    with _requiring_grad(optimizer, {param for param, state in optimizer.state.items() if state}):
        yield


@contextmanager
def only_saved(
    model: nn.Module, optimizer: Optimizer, names: Collection[str], *, whole: bool = False
) -> Iterator[None]:
    """Have torch's functions load state of these parameters, and of no other; an error leaves all as it was.

    Args:
        model: The model that the optimizer steps; its parameters are sharded again.
        optimizer: The torch optimizer itself.
        names: What a checkpoint holds state of, as torch's state dicts call it.
        whole: Whether tensors are loaded whole. torch then fails where there is no state at all, so that one parameter
            has some meanwhile.
    """
    reshard(model)
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
def _planner_that_keeps_empty_shards() -> Iterator[None]:
    # Accelerate makes the planner itself; with flattening it drops a rank's empty shards, then misses their keys.
    original: Any = default_planner.DefaultLoadPlanner
    default_planner.DefaultLoadPlanner = functools.partial(  # type: ignore[misc,assignment]
        original, flatten_sharded_tensors=False
    )
    try:
        yield
    finally:
        default_planner.DefaultLoadPlanner = original  # type: ignore[misc]


def make_state(optimizer: Any, params: Iterable[Tensor] | None = None) -> None:
    """Make parameters' state by a step with zero gradients and a learning rate of 0.

    Gradients that are there stay, and no hook or schedule of the optimizer sees the step.

    Args:
        optimizer: The optimizer, or Accelerate's wrapper of it.
        params: Some of its parameters; None: the trainable ones without state.
    """
    optimizer = _base(optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    if params is None:
        params = [param for param in held if param.requires_grad and not optimizer.state.get(param)]
    chosen = list(params)
    if not chosen:
        return
    grads = [param.grad for param in held]
    rated = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    try:
        for param in held:
            param.grad = None
        for param in chosen:
            param.grad = torch.zeros_like(param)
        for group, lr in rated:
            group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
        step = type(optimizer).step
        # torch wraps a class's step in one that calls the hooks.
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
    finally:
        for group, lr in rated:
            group["lr"] = lr
        for param, grad in zip(held, grads, strict=True):
            param.grad = grad
