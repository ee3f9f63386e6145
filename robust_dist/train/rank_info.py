"""This process among the ranks of its run, and the folder that it writes to."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


@dataclass
class Rank:
    """One rank of the run, as its launcher's environment tells it before any process group is there.

    Attributes:
        number: 0 to world_size - 1.
        world_size: Ranks of the run.
        host: The machine's name.
        folder: The run's folder, None until it is claimed.
    """

    number: int = field(default_factory=lambda: _number("RANK", 0))
    world_size: int = field(default_factory=lambda: _number("WORLD_SIZE", 1))
    host: str = field(default_factory=socket.gethostname)
    folder: Path | None = None

    def claimed(self, folder: Path) -> None:
        """The run's folder belongs to this run from now on."""
        self.folder = folder

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"
