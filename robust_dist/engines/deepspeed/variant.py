"""ZeRO 1 to 3 in a plan: flat groups, parts of parameters, buckets.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_dist.engines.variant import (
    ALONE,
    MOMENTS,
    SINGLE,
    STEP,
    Collective,
    Held,
    Passes,
    Run,
    Variant,
    of_all,
    split,
)
from robust_dist.measure.memory import storage_bytes
from robust_dist.optim import RAdaBeliefW

if TYPE_CHECKING:
    from robust_dist.plan.profile import Profile, Shapes
    from robust_dist.plan.question import Question

# The all-gather of each rank's part starts at a multiple of 4 bytes of float16.
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True)
class ZeroVariant(Variant):
    """One stage of ZeRO with what configs/deepspeed/*.json decides (a test compares them with the files).

    Attributes:
        stage: 1, 2 or 3.
        reduce_bucket: Elements of a bucket of gradients.
        prefetch: Elements that stage 3 gathers ahead.
        persistent: Stage 3 leaves parameters of at most so many elements gathered.
        max_live: Elements that stage 3 may have gathered at a time, and the distance up to which it keeps them.
    """

    stage: int
    reduce_bucket: int = 50_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    max_live: int = 1_000_000_000
    broadcasts_buffers: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether gradients are sent while the backward pass runs; it doubles the bucket under stage 2."""
        return self.overlap > 0

    def unfit(self, job: "Question") -> str | None:
        """The reason why this is no candidate for these machines, or None."""
        return ALONE if job.world_size == 1 and not self.offload else None

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """The whole model is cast; there is no autocast."""
        return dtype, None

    def held(self, shapes: "Shapes", job: "Question", rank: int = 0) -> Held:
        """Stages 1 and 2: a part of one flat group; stage 3: a part of each parameter. All have float32 masters."""
        size, shards = job.itemsize, job.world_size
        if self.stage == 3:
            own = sum(-(-p.numel // shards) for p in shapes.parameters)
            on_device = (0 if self.offload else own) + self._kept(shapes)
            return Held(size * on_device, SINGLE * own, size * own, MOMENTS * own + STEP, own, self.offload)
        own = partition(shapes.numel, shards)
        gradients = size * _touched(shapes, own, rank)
        return Held(size * own * shards, SINGLE * own, gradients, MOMENTS * own + STEP, own)

    def worst_rank(self, shapes: "Shapes", job: "Question") -> int:
        """The first; under stages 1 and 2 the one whose part touches the largest gradients."""
        if self.stage == 3:
            return 0
        return max(range(job.world_size), key=lambda rank: self.held(shapes, job, rank).total)

    def passes(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int, *, accumulates: bool) -> Passes:
        """Activations beside buckets, and under stage 3 beside gathered parameters."""
        if self.stage == 3:
            return self._passes_of_3(shapes, profile, job, batch)
        size, bucket = job.itemsize, self.reduce_bucket
        # communication_data_type is fp32 in our JSONs: a bucket is flattened, and converted, before it is sent.
        # A gradient that is larger than a bucket is sent alone.
        sending = min(max(bucket, max(p.numel for p in shapes.parameters)), shapes.numel) * (
            size + (SINGLE if size != SINGLE else 0)
        )
        if self.stage == 2:
            activations, gradients = split(profile, batch, size / job.world_size)
            gradients += size * shapes.numel / job.world_size if accumulates else 0
            return Passes(activations, bucket * size * (2 if self.overlaps else 1) + sending, gradients)
        if accumulates:
            return Passes(profile.live(batch), bucket * size, size * shapes.numel)
        activations, gradients = split(profile, batch, size)
        sent = size * shapes.numel + sending
        if activations + gradients > sent:
            return Passes(activations, bucket * size, gradients)
        return Passes(0.0, bucket * size, sent)

    def _passes_of_3(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int) -> Passes:
        shared = shapes.numel - self._kept(shapes)
        gathered = min(shared, self.max_live) + min(shared, self.prefetch)
        own = self.held(shapes, job)
        buckets = self.reduce_bucket + min(self.reduce_bucket, shapes.numel)
        in_flight = job.itemsize * gathered + SINGLE * buckets
        return Passes(profile.live(batch), in_flight, 0 if own.on_host else own.gradients)

    def step_bytes(self, own: Held, job: "Question", temporaries: int) -> float:
        """Averaged gradients are made float32 beside the optimizer's temporaries."""
        if self.stage == 3:
            return own.gradients + SINGLE * (own.elements + self.reduce_bucket) + temporaries
        # They are flattened first; both are gone before the optimizer runs.
        size = job.itemsize
        making = own.gradients + size * own.elements + (SINGLE * own.elements if size != SINGLE else 0)
        return max(making, SINGLE * own.elements + temporaries)

    def collectives(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """Stage 3 gathers parameters for every micro batch; 1 and 2 all-reduce float32 buckets, 2 for every one."""
        if self.stage == 3:
            yield from self._collectives_of_3(shapes, job, accumulation)
            return
        times = accumulation if self.stage == 2 else 1
        flat = partition(shapes.numel, job.world_size) * job.world_size
        count = times * -(-shapes.numel // self.reduce_bucket)
        payload = times * SINGLE * shapes.numel
        yield of_all(job, "gradients", "all-reduce", payload, count, overlaps=self.overlaps)
        yield of_all(job, "parameters, after the step", "all-gather", job.itemsize * flat, 1, overlaps=False)

    def _collectives_of_3(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """Parameters stay gathered from forward to backward if the model is below max_live; else they come twice."""
        world, size = job.world_size, job.itemsize
        shared = [p for p in shapes.parameters if p.numel > self.persistent]
        flat = sum(-(-p.numel // world) * world for p in shared)
        every = sum(-(-p.numel // world) * world for p in shapes.parameters)
        gathers = accumulation * (1 if flat <= self.max_live else 2)
        count = gathers * -(-flat // self.prefetch)
        yield of_all(job, "parameters", "all-gather", gathers * size * flat, count, overlaps=True)
        count = accumulation * -(-every // self.reduce_bucket)
        yield of_all(job, "gradients", "reduce-scatter", accumulation * SINGLE * every, count, overlaps=True)
        kept = size * self._kept(shapes)
        yield of_all(job, "small parameters, after the step", "all-gather", kept, 1, overlaps=False)

    def _kept(self, shapes: "Shapes") -> int:
        """Elements of the parameters that stage 3 leaves gathered."""
        return sum(p.numel for p in shapes.parameters if p.numel <= self.persistent)

    def with_buckets(self, elements: int) -> "ZeroVariant":
        """The same with buckets of so many elements."""
        return replace(self, reduce_bucket=elements)

    def start(self, model: nn.Module, job: "Question", batch: int) -> Run:
        """`deepspeed.initialize` with this variant's settings."""
        # It asks for both.
        os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(job.world_size))
        with _silence():
            import deepspeed

            from robust_dist.engines.deepspeed import register

            register()
            optimizer = RAdaBeliefW(model.parameters(), lr=1e-4)
            config = self._config(job, batch)
            return _ZeroRun(*deepspeed.initialize(model=model, optimizer=optimizer, config=config)[:2])

    def _config(self, job: "Question", batch: int) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.reduce_bucket,
            "overlap_comm": self.overlaps,
            "contiguous_gradients": True,
        }
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": self.prefetch,
                "stage3_param_persistence_threshold": self.persistent,
                "stage3_max_live_parameters": self.max_live,
                "stage3_max_reuse_distance": self.max_live,
            }
        return {
            "zero_optimization": zero,
            "bf16": {"enabled": job.dtype == torch.bfloat16},
            "communication_data_type": "fp32",
            "train_batch_size": batch * job.world_size,
            "train_micro_batch_size_per_gpu": batch,
            "steps_per_print": 10**9,
        }


def partition(numel: int, shards: int) -> int:
    """Elements of one rank's part of a flat group under stages 1 and 2, padding included."""
    return -(-numel // (_ALIGNMENT * shards)) * _ALIGNMENT


def _touched(shapes: "Shapes", own: int, rank: int) -> int:
    """Elements of the gradients that a part begins, holds or ends in: a view of a piece keeps the whole alive."""
    begin, end, start, elements = rank * own, (rank + 1) * own, 0, 0
    for parameter in shapes.parameters:
        stop = start + parameter.numel
        elements += parameter.numel if start < end and stop > begin else 0
        start = stop
    return elements + max(0, end - max(start, begin))


class _ZeroRun(Run):
    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def parameters(self) -> int:
        """Bytes between steps, when stage 3 has only small ones gathered."""
        if hasattr(self.optimizer, "lp_param_buffer"):
            kept = [p for p in self.model.parameters() if p.numel()]
            return storage_bytes([self.optimizer.lp_param_buffer, *kept])
        return super().parameters()

    def masters(self) -> int:
        name = "fp32_partitioned_groups_flat" if self._is_3() else "single_partition_of_fp32_groups"
        return storage_bytes(getattr(self.optimizer, name))

    def gradients(self) -> int:
        """Bytes of the averaged gradients of this rank's part."""
        if self._is_3():
            return storage_bytes([self.optimizer.grad_partitions_flat_buffer])
        return storage_bytes(t for group in self.optimizer.averaged_gradients.values() for t in group or ())

    def _is_3(self) -> bool:
        return hasattr(self.optimizer, "grad_partitions_flat_buffer")


@contextmanager
def _silence() -> Iterator[None]:
    """Without the log of every setting at the start."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
