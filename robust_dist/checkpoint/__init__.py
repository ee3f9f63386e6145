"""Checkpoints that are either complete or absent, and their conversion between engines."""

from robust_dist.checkpoint.conversion import convert, read
from robust_dist.checkpoint.inspection import inspect
from robust_dist.checkpoint.save_load import load_state, make_state, save_state
from robust_dist.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, verify, write_atomically
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
