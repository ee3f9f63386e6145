"""The optimizers whose steps are timed: ours with each backend, torch's, DeepSpeed's, and other projects' AdaBelief."""

import contextlib
import importlib
import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from robust_dist.optim import RAdaBeliefW
from robust_dist.surroundings import extension_folder, extension_source, locks_outlive_builds, stale_locks

OURS = "RAdaBeliefW"
ADAMW_FUSED = "torch AdamW fused"

Maker = Callable[[list[Tensor]], Optimizer]


def _named(module: str, name: str, **settings: Any) -> Maker:
    """An optimizer of another package, which may talk while it is imported, built or made."""

    def make(params: list[Tensor]) -> Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            found = getattr(importlib.import_module(module), name)
            return found(params, lr=1e-2, eps=1e-8, weight_decay=1e-2, **settings)

    return make


def _deepspeed(name: str, **settings: Any) -> Maker:
    """DeepSpeed builds its step at the first use, with a C++ compiler (FusedAdam: CUDA's)."""
    make = _named("deepspeed.ops.adam", name, **settings)

    def guarded(params: list[Tensor]) -> Optimizer:
        locks = stale_locks(extension_folder(os.environ)) if locks_outlive_builds(extension_source()) else ()
        for lock in locks:
            raise RuntimeError(lock.detail)
        return make(params)

    return guarded


def makers(device: torch.device) -> dict[str, Maker]:
    """Name to a function that makes it for parameters on the device, the most telling ones first.

    A maker raises where its package is not installed or cannot work here.
    """
    on_gpu = device.type == "cuda"
    on_host = {"DeepSpeedCPUAdam": _deepspeed("DeepSpeedCPUAdam", adamw_mode=True)}
    deepspeed = {"DeepSpeed FusedAdam": _deepspeed("FusedAdam", adam_w_mode=True)} if on_gpu else on_host
    radam = partial(torch.optim.RAdam, foreach=True, weight_decay=1e-2, decoupled_weight_decay=True)
    return {
        f"{OURS} {'triton' if on_gpu else 'fused'}": partial(RAdaBeliefW, fused=True),
        f"{OURS} foreach": partial(RAdaBeliefW, foreach=True),
        f"{OURS} single": partial(RAdaBeliefW, foreach=False),
        ADAMW_FUSED: partial(torch.optim.AdamW, fused=True),
        "torch AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        "torch RAdam foreach": radam,
        **deepspeed,
        "timm AdaBelief": _named("timm.optim", "AdaBelief", rectify=False),
        "timm RAdaBelief": _named("timm.optim", "AdaBelief", rectify=True),
        "pytorch_optimizer AdaBelief": _named("pytorch_optimizer", "AdaBelief", rectify=False),
        "pytorch_optimizer RAdaBelief": _named("pytorch_optimizer", "AdaBelief", rectify=True),
        "adabelief-pytorch": _named("adabelief_pytorch", "AdaBelief", print_change_log=False),
    }
