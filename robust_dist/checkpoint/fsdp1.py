"""Accelerate's load without its faults: code that files run, random states skipped in silence, two under FSDP1."""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import default_planner

from robust_dist.checkpoint.dcp_metadata import plain_failures, plain_reading
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import CheckpointError


def load_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """As `accelerator.load_state`, without running what the files hold, and right under FSDP1, too.

    Objects of `register_for_checkpointing` are read with weights_only, and a DCP folder through
    `dcp_metadata.plain_reading`; what DeepSpeed reads it unpickles, whatever is asked of it. Accelerate passes over
    a random state that it cannot read: here it is an error.

    Accelerate 1.15 loads there what state the optimizer has, and without a word nothing where it has none yet, as
    before a first step. And torch 2.14's planner fails ("Missing key ... optimizer.param_groups") where a parameter
    has fewer rows than there are ranks. Under every other engine this is `accelerator.load_state`.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank calls this.
        folder: What `accelerator.save_state` or `convert` wrote.
        **options: Of `accelerator.load_state`.

    Raises:
        CheckpointError: A file holds more than tensors and plain values, or a random state is damaged.
    """
    with plain_reading(), plain_failures(folder), _plain_objects():
        if _is_sharded_fsdp1(accelerator):
            for optimizer in accelerator._optimizers:
                make_state(optimizer)
            with _planner_that_keeps_empty_shards():
                accelerator.load_state(str(folder), **options)
        else:
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


def _is_sharded_fsdp1(accelerator: Any) -> bool:
    if accelerator.distributed_type.value != "FSDP":
        return False
    plugin = accelerator.state.fsdp_plugin
    return getattr(plugin, "fsdp_version", 1) == 1 and plugin.state_dict_type.name == "SHARDED_STATE_DICT"


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


def make_state(optimizer: Any) -> None:
    """Make the optimizer's state by a step with zero gradients and a learning rate of 0, unless it has some.

    Args:
        optimizer: The optimizer, or Accelerate's wrapper of it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    if optimizer.state or any(param.grad is not None for param in params):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    finally:
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
