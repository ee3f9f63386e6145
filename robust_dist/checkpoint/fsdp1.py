"""Accelerate's load under FSDP1 with sharded state dicts, without its two faults."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner


def load_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """As `accelerator.load_state`, and right under FSDP1 with SHARDED_STATE_DICT, too.

    Accelerate 1.15 loads there what state the optimizer has, and without a word nothing where it has none yet, as
    before a first step. And torch 2.14's planner fails ("Missing key ... optimizer.param_groups") where a parameter
    has fewer rows than there are ranks. Under every other engine this is `accelerator.load_state`.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank calls this.
        folder: What `accelerator.save_state` or `convert` wrote.
        **options: Of `accelerator.load_state`.
    """
    if not _is_sharded_fsdp1(accelerator):
        accelerator.load_state(str(folder), **options)
        return
    for optimizer in accelerator._optimizers:
        make_state(optimizer)
    with _planner_that_keeps_empty_shards():
        accelerator.load_state(str(folder), **options)


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
