"""The backends: torch's operations, a pass in C on the CPU, or Triton kernels on a GPU, all with the same result.

Each backend other than torch is a module of this package with

    missing() -> str | None                                 why it is not available, None if it is
    runs_on(device) -> bool                                 whether it supports tensors on that device
    augment(pipeline, images, labels, keys, index) -> (images, targets)

and optionally, for single stages, `trivial(stage, images, plan) -> images` for uint8 images and `mix(images, plan) ->
images` for any dtype, and `instruction_set() -> str` for `doctor`.

A backend for a device whose values are not read may also have `repeat(pipeline, images, labels, keys, index)`: the
result of `augment`, without checks, if dtypes, shapes, devices and settings are those of the last call; else None.

`augment` gets a RobustAugment in training mode; uint8 images [N, C, H, W], any strides; labels, integers [N]; keys,
int64 [B]; and index, int64 [B], the samples of the batch, or None for all N = B in order. These have already been
checked. It returns images [B, C, H, W] in `pipeline.dtype` and the memory format `pipeline.out_format(images)`, and
targets, float32 [B, num_classes].
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
    """The module of a backend, or the reason why there is none."""
    try:
        module: Any = importlib.import_module(_MODULES[name])
        return module.missing() or module
    except ImportError as error:
        return str(error)


def missing(name: str) -> str | None:
    """The reason why the backend `name` is not available; None if it is."""
    if name == "torch":
        return None
    found = _found(name)
    return found if isinstance(found, str) else None


def module_of(name: str) -> Any:
    """The module of the backend "native" or "triton", which must not be missing."""
    return _found(name)


def check_backend(backend: str) -> str:
    """Check the name of a backend and return it.

    Raises:
        ValueError: For a name that is not in `BACKENDS`.
        RuntimeError: For a backend that is not available.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto" and (why := missing(backend)) is not None:
        raise RuntimeError(
            f'backend="{backend}" cannot be used: {why}; backend="auto" selects the fastest available one'
        )
    return backend


def choose(backend: str, device: torch.device) -> str:
    """The backend for tensors on one device: "torch", "native" or "triton".

    "auto" is the pass in C on a CPU and the Triton kernels on CUDA, if available; otherwise, and under `torch.compile`,
    which generates its own kernels, it is torch.

    Raises:
        RuntimeError: For an explicit backend that does not support the device or cannot be compiled.
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
        raise RuntimeError(f'backend="{backend}" does not support tensors on {device}: set backend="auto"')
    return backend


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(
        f'images on a GPU are augmented by torch\'s operations, which are slower: {why}; backend="torch" selects them '
        "without this warning",
        UserWarning,
        stacklevel=4,
    )


def choose_stage(backend: str, device: torch.device, name: str) -> tuple[str, Callable[..., Any] | None]:
    """Like `choose`, for the single stage "trivial" or "mix"; also returns the backend's function, None for torch.

    Raises:
        RuntimeError: As in `choose`, and for an explicit backend that supports only whole pipelines.
    """
    chosen = choose(backend, device)
    function = None if chosen == "torch" else getattr(module_of(chosen), name, None)
    if function is None and backend not in ("auto", "torch"):
        raise RuntimeError(f'backend="{backend}" supports only whole pipelines: set backend="auto" for a single stage')
    return (chosen, function) if function is not None else ("torch", None)
