"""What each rank sends in an optimizer step, collective by collective.

Bytes are a ring's, which is what NCCL's bandwidth figures are made of (NVIDIA nccl-tests, doc/PERFORMANCE.md): of a
payload of S bytes over n ranks an all-gather or a reduce-scatter sends S (n - 1) / n of each rank, an all-reduce twice
that, a broadcast S.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from robust_dist.measure.memory import MIB
from robust_dist.plan.engines import Engine
from robust_dist.plan.held import SINGLE, partition, persistent
from robust_dist.plan.question import DTYPES, Question
from robust_dist.plan.shapes import Shapes, padded_rows

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]
# torch's DistributedDataParallel: bucket_cap_mb, and a first bucket of 1 MiB.
DDP_BUCKET, DDP_FIRST = 25 * MIB, MIB


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in an optimizer step.

    Attributes:
        what: What is sent.
        operation: How.
        payload: Bytes of the whole, over all of them.
        ranks: That take part in each.
        count: How many there are.
        between_nodes: Whether their ring leaves the node.
        overlaps: Whether they run beside forward and backward pass.
    """

    what: str
    operation: Operation
    payload: float
    ranks: int
    count: int
    between_nodes: bool
    overlaps: bool

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives."""
        if self.operation == "broadcast":
            return self.payload
        once = self.payload * (self.ranks - 1) / self.ranks
        return 2 * once if self.operation == "all-reduce" else once


def traffic(engine: Engine, shapes: Shapes, question: Question, accumulation: int) -> list[Collective]:
    """Every collective of an optimizer step, the training loop's own included."""
    if question.world_size == 1:
        return []
    kinds = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}
    found = list(kinds.get(engine.kind, _zero12)(engine, shapes, question, accumulation))
    if shapes.float_buffers:
        # DDP gives every rank the first one's buffers before each forward pass; for the others our loop does so a step.
        count = accumulation if engine.kind == "ddp" else 1
        payload = count * (shapes.buffer_bytes if engine.kind == "ddp" else SINGLE * shapes.float_buffers)
        found.append(_wide(question, "BatchNorm statistics", "broadcast", payload, count, overlaps=False))
    return [one for one in found if one.payload]


def _wide(
    question: Question, what: str, operation: Operation, payload: float, count: int, *, overlaps: bool
) -> Collective:
    """A collective of all ranks."""
    return Collective(what, operation, payload, question.world_size, count, question.nodes > 1, overlaps)


def ddp_buckets(shapes: Shapes) -> int:
    """Buckets of gradients: from the last parameter on, each closed when it is full."""
    count, filled, limit = 0, 0, DDP_FIRST
    for parameter in reversed(shapes.parameters):
        filled += SINGLE * parameter.numel
        if filled >= limit:
            count, filled, limit = count + 1, 0, DDP_BUCKET
    return count + (filled > 0)


def _ddp(engine: Engine, shapes: Shapes, question: Question, accumulation: int) -> Iterator[Collective]:
    payload, count = SINGLE * shapes.numel, ddp_buckets(shapes)
    yield _wide(question, "gradients", "all-reduce", payload, count, overlaps=True)


def _fsdp2(engine: Engine, shapes: Shapes, question: Question, accumulation: int) -> Iterator[Collective]:
    shards, size = engine.shards(question), DTYPES[question.precision].itemsize
    leaves = question.nodes > 1 and not engine.in_nodes

    def over(what: str, operation: Operation, elements: int, count: int) -> Collective:
        return Collective(what, operation, size * elements, shards, count, leaves, True)

    padded = [sum(shards * padded_rows(p.shape, shards) for p in unit.parameters) for unit in shapes.units]
    again = [numel for numel, unit in zip(padded, shapes.units, strict=True) if engine.reshard and not unit.stays]
    units = len(shapes.units)
    yield over("parameters, forward", "all-gather", accumulation * sum(padded), accumulation * units)
    yield over("parameters, backward", "all-gather", accumulation * sum(again), accumulation * len(again))
    # accumulate() leaves the reduction out of all micro batches but the last.
    yield over("gradients", "reduce-scatter", sum(padded), units)
    if engine.in_nodes:
        mine = size * sum(padded) / shards
        yield Collective("gradients, between nodes", "all-reduce", mine, question.nodes, units, True, True)


def _zero12(engine: Engine, shapes: Shapes, question: Question, accumulation: int) -> Iterator[Collective]:
    """Buckets are all-reduced in float32 (communication_data_type), by ZeRO-2 for every micro batch."""
    times = accumulation if engine.kind == "zero2" else 1
    size, bucket = DTYPES[question.precision].itemsize, engine.settings.reduce_bucket
    flat = partition(shapes.numel, question.world_size) * question.world_size
    count = times * -(-shapes.numel // bucket)
    payload = times * SINGLE * shapes.numel
    yield _wide(question, "gradients", "all-reduce", payload, count, overlaps=engine.settings.overlap)
    yield _wide(question, "parameters, after the step", "all-gather", size * flat, 1, overlaps=False)


def _zero3(engine: Engine, shapes: Shapes, question: Question, accumulation: int) -> Iterator[Collective]:
    """Parameters stay gathered from forward to backward if the model is below max_live, and are gathered again else."""
    world, size, settings = question.world_size, DTYPES[question.precision].itemsize, engine.settings
    kept = persistent(shapes, engine)
    shared = [p for p in shapes.parameters if p.numel > settings.persistent]
    flat = sum(-(-p.numel // world) * world for p in shared)
    every = sum(-(-p.numel // world) * world for p in shapes.parameters)
    gathers = accumulation * (1 if flat <= settings.max_live else 2)
    count = gathers * -(-flat // settings.prefetch)
    yield _wide(question, "parameters", "all-gather", gathers * size * flat, count, overlaps=True)
    count = accumulation * -(-every // settings.reduce_bucket)
    yield _wide(question, "gradients", "reduce-scatter", accumulation * SINGLE * every, count, overlaps=True)
    yield _wide(question, "small parameters, after the step", "all-gather", size * kept, 1, overlaps=False)
