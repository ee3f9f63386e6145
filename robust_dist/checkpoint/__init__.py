"""Checkpoints that are whole or not there, and their conversion between engines."""

from typing import TYPE_CHECKING, Any

from robust_dist.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, verify, write_atomically

if TYPE_CHECKING:
    from robust_dist.checkpoint.conversion import convert, read
    from robust_dist.checkpoint.inspection import inspect
    from robust_dist.checkpoint.save_load import load_state, make_state, save_state
    from robust_dist.checkpoint.training_state import TrainingState, note_parameters

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "TrainingState",
    "convert",
    "inspect",
    "load_state",
    "make_state",
    "note_parameters",
    "read",
    "save_state",
    "verify",
    "write_atomically",
]
_HOMES = {
    "TrainingState": "training_state",
    "convert": "conversion",
    "inspect": "inspection",
    "load_state": "save_load",
    "make_state": "save_load",
    "note_parameters": "training_state",
    "read": "conversion",
    "save_state": "save_load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
