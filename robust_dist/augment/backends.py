"""The backends: torch's operations, a pass in C on the CPU, or Triton's kernels on a GPU, all with the same result.

A backend but torch's is a module of this package with

    missing() -> str | None                                 why it cannot be used here, None where it can
    runs_on(device) -> bool                                 whether it takes tensors of that device
    augment(pipeline, images, labels, keys, index) -> (images, targets)

and perhaps, for the stages alone, `trivial(stage, images, plan) -> images` of uint8 images and `mix(images, plan) ->
images` of any dtype, and `instruction_set() -> str` for `doctor`.

A backend of a device whose values are not read may also have `repeat(pipeline, images, labels, keys, index)`: the
result of `augment`, without checks, where dtypes, shapes, devices and settings are those of the last call; else None.

`augment` gets a RobustAugment in training; uint8 images [N, C, H, W], of any strides; labels, integers [N]; keys,
int64 [B]; and index, int64 [B], of the samples of the batch, or None where they are all N = B in their order. It has
been checked by then that they belong together. It gives [B, C, H, W] in `pipeline.dtype` and in the memory format that
`pipeline.out_format(images)` names, and targets, float32 [B, num_classes].
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_MODULES = {"native": "robust_dist.augment.fused_cpu", "triton": "robust_dist.augment.fused_triton"}
FASTEST = {"cpu": "native", "cuda": "triton"}
BACKENDS = ("auto", "torch", *_MODULES)


@functools.cache
def _found(name: str) -> ModuleType | str:
    """The module of a backend, or why there is none."""
    try:
        module: Any = importlib.import_module(_MODULES[name])
        return module.missing() or module
    except ImportError as error:
        return str(error)


def missing(name: str) -> str | None:
    """The reason why the backend `name` cannot be used here; None if it can."""
    if name == "torch":
        return None
    found = _found(name)
    return found if isinstance(found, str) else None


def module_of(name: str) -> Any:
    """The module of the backend "native" or "triton", which must not be missing."""
    return _found(name)


def check_backend(backend: str) -> str:
    """A name of `BACKENDS`; raises for another, and for one that is demanded and cannot be used.

    Raises:
        ValueError: For a name that is none of `BACKENDS`.
        RuntimeError: For a backend that is missing here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto" and (why := missing(backend)) is not None:
        raise RuntimeError(f'backend="{backend}" cannot be used: {why}; backend="auto" takes the fastest there is')
    return backend


def choose(backend: str, device: torch.device) -> str:
    """The backend for tensors of one device: "torch", "native" or "triton".

    "auto" is the pass in C on a CPU and Triton's kernels on CUDA, each where it can be used and the code is not being
    compiled by `torch.compile`, which makes its own kernels of torch's operations; else torch.

    Raises:
        RuntimeError: For a demanded backend that cannot take the device or cannot be compiled.
    """
    if backend == "auto":
        name = "torch" if torch.compiler.is_compiling() else FASTEST.get(device.type, "torch")
        if name == "torch" or (why := missing(name)) is None:
            return name
        if device.type == "cuda":
            _say_once(why)
        return "torch"
    if backend == "torch":
        return backend
    if torch.compiler.is_compiling():
        raise RuntimeError(f'backend="{backend}" cannot be compiled: set backend="auto" or "torch"')
    if (why := missing(backend)) is not None:
        raise RuntimeError(f'backend="{backend}" cannot be used: {why}')
    if not module_of(backend).runs_on(device):
        raise RuntimeError(f'backend="{backend}" does not take tensors on {device}: set backend="auto"')
    return backend


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(
        f'images on a GPU are augmented by torch\'s operations, which are slower: {why}; backend="torch" takes them '
        "without this warning",
        UserWarning,
        stacklevel=4,
    )


def choose_stage(backend: str, device: torch.device, name: str) -> tuple[str, Callable[..., Any] | None]:
    """Like `choose`, for the stage `name` alone, "trivial" or "mix", with the function that does it; None for torch's.

    Raises:
        RuntimeError: As `choose`, and for a demanded backend that does whole pipelines only.
    """
    chosen = choose(backend, device)
    function = None if chosen == "torch" else getattr(module_of(chosen), name, None)
    if function is None and backend not in ("auto", "torch"):
        raise RuntimeError(f'backend="{backend}" does whole pipelines only: set backend="auto" for a stage alone')
    return (chosen, function) if function is not None else ("torch", None)
