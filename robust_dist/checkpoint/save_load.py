"""Accelerate's save and load of a run's whole state, with each engine's additions."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import CheckpointError
from robust_dist.engines.engine import engine_of
from robust_dist.optim.dry_step import dry_step
from robust_dist.schedule import base_optimizer


def save_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """Like `accelerator.save_state`, but correct under every engine.

    Under FSDP, parameters that were never stepped are saved as such; under ZeRO, a rank that cannot write does not keep
    the others waiting.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank must call this.
        folder: The folder of the new checkpoint.
        **options: Passed to `accelerator.save_state`.
    """
    engine_of(accelerator).save(accelerator, Path(folder), **options)


def load_state(accelerator: Any, folder: str | Path, **options: Any) -> None:
    """Like `accelerator.load_state`, but correct under every engine.

    Accelerate's own load is wrong under FSDP if parameters were never stepped or are now frozen (`FSDP.load`), and it
    ignores a random state that it cannot read, which is an error here. No code in the files is run: objects of
    `register_for_checkpointing` are read with weights_only, DCP folders by `dcp`; only ZeRO's files are always
    unpickled.

    Args:
        accelerator: The Accelerator, after `prepare`; every rank must call this.
        folder: Written by `accelerator.save_state` or `convert`.
        **options: Passed to `accelerator.load_state`.

    Raises:
        CheckpointError: A file holds more than tensors and plain values, or a random state is damaged.
    """
    with _plain_objects():
        engine_of(accelerator).load(accelerator, Path(folder), **options)
    _set_random_state(Path(folder, f"random_states_{accelerator.process_index}.pkl"))


@contextmanager
def _plain_objects() -> Iterator[None]:
    """Read registered objects safely, which Accelerate reads with weights_only=False."""
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
    """Set the random state as Accelerate does, but raise if it is unreadable; a new rank has no file."""
    import numpy as np
    from accelerate.utils import load

    if not path.exists():
        return
    # NumPy 1 and 2 name it differently, and Accelerate allows neither the other's name nor NumPy 1.24's dtype.
    rebuild: Any = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*allowed, type(np.dtype(np.uint32))]):
            states = load(path)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])  # noqa: NPY002
        torch.set_rng_state(states["torch_manual_seed"])
        devices = states.get("torch_cuda_manual_seed", [])
        # With a different number of GPUs there is not a state for each.
        if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: the random state cannot be read ({reason})") from None


def make_state(optimizer: Any, params: Iterable[Tensor] | None = None) -> None:
    """Create parameters' state with one step of zero gradients and a learning rate of 0.

    Existing gradients are kept, and no hook or schedule of the optimizer sees the step.

    Args:
        optimizer: The optimizer, or an engine's wrapper around it.
        params: Some of its parameters; None: the trainable ones without state.
    """
    optimizer = base_optimizer(optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    if params is None:
        params = [param for param in held if param.requires_grad and not optimizer.state.get(param)]
    chosen = list(params)
    if not chosen:
        return
    with dry_step(optimizer, chosen):
        step = type(optimizer).step
        # torch wraps a class's step in a function that calls the hooks.
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
