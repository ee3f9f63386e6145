"""The question that a plan answers: model, machines, batch, precision; checked before anything is computed."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from robust_dist.measure.gpus import Gpu, find_gpu
from robust_dist.measure.memory import GIB

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Question:
    """One training job, as given to `robust-dist plan`.

    Attributes:
        model: A name of `robust_dist.models.build_model`.
        nodes: Machines.
        gpus_per_node: GPUs of each.
        gpu: A name of `robust_dist.measure.gpus.GPUS`.
        memory_gib: Memory of a GPU; None takes the table's.
        batch_size: Global batch, images per optimizer step.
        image_size: Height and width, pixels.
        num_classes: Outputs.
        in_channels: Channels of the images.
        precision: The recipe's `precision.mixed`.
        micro_batch: Images at a time and GPU; None: the most that fits.
        intra_gbps: Link in a node, Gbit/s a GPU and direction; None takes the table's.
        inter_gbps: Network between nodes, Gbit/s a GPU and direction; None takes the table's.
        mfu: Share of the GPU's peak that the model's arithmetic is assumed to reach.
        margin: Share of the memory to leave free.
        options: Arguments of the model's constructor.
        recipe: The recipe's file, for the launch line.
    """

    model: str
    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    memory_gib: float | None = None
    batch_size: int = 128
    image_size: int = 224
    num_classes: int = 1000
    in_channels: int = 3
    precision: Precision = "no"
    micro_batch: int | None = None
    intra_gbps: float | None = None
    inter_gbps: float | None = None
    mfu: float = 0.35
    margin: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "batch_size", "image_size", "num_classes", "in_channels"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in ("memory_gib", "intra_gbps", "inter_gbps"):
            value = getattr(self, name)
            self._need(name, value is None or (math.isfinite(value) and value > 0), "a number above 0")
        self._need("mfu", 0 < self.mfu <= 1, "above 0 and at most 1")
        self._need("margin", 0 <= self.margin < 1, "at least 0 and below 1")
        self._need("precision", self.precision in DTYPES, f"one of {', '.join(DTYPES)}")
        world = self.world_size
        wanted = f"at least {world}: each of the {world} GPUs needs an image at every step"
        self._need("batch_size", self.batch_size >= world, wanted)
        wanted = f"between 1 and {self.rank_batch}, a GPU's share of batch_size={self.batch_size}"
        self._need("micro_batch", self.micro_batch is None or 1 <= self.micro_batch <= self.rank_batch, wanted)
        lacks = self.precision == "bf16" and not self.hardware.peak.bfloat16
        self._need("precision", not lacks, f"fp16 or no, as {self.gpu} has no bfloat16")

    def _need(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            word = name.replace("_", "-").replace("gib", "gb")
            raise ValueError(f"--{word}={getattr(self, name)!r} is not valid: it must be {wanted}")

    @property
    def hardware(self) -> Gpu:
        """The GPU."""
        return find_gpu(self.gpu)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return DTYPES[self.precision]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of that dtype."""
        return self.dtype.itemsize

    @property
    def world_size(self) -> int:
        """GPUs of all nodes: the number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def rank_batch(self) -> int:
        """Images per optimizer step on the rank that has most."""
        return -(-self.batch_size // self.world_size)

    @property
    def memory_bytes(self) -> float:
        """Memory of a GPU."""
        return (self.memory_gib or self.hardware.memory_gib) * GIB

    def accumulation(self, micro_batch: int) -> int:
        """Number of parts into which a rank cuts its share, for micro batches of at most this size."""
        return -(-self.rank_batch // micro_batch)
