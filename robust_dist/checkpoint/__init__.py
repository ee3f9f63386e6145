"""Checkpoints that are whole or not there."""

from robust_dist.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, verify, write_atomically

__all__ = ["Checkpoint", "CheckpointError", "CheckpointStore", "verify", "write_atomically"]
