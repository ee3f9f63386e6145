"""DeepSpeed checkpoints of ZeRO 0, 1, 2 and 3: told apart, read at any number of ranks, written for any other."""

from pathlib import Path

from robust_dist.checkpoint.zero_files import LATEST, tag_folder
from robust_dist.checkpoint.zero_read import read_zero
from robust_dist.checkpoint.zero_write import write_zero

__all__ = ["is_zero", "read_zero", "write_zero"]


def is_zero(path: Path) -> bool:
    """Whether `path` is a DeepSpeed checkpoint: a folder with `latest`, a tag's folder, or Accelerate's save_state."""
    return path.is_dir() and ((path / LATEST).is_file() or tag_folder(path) is not None)
