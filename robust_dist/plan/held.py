"""Bytes that one rank holds of parameters, gradients and optimizer state: exact, as the engines lay them out.

Ours, and read in torch 2.14 (distributed/fsdp/_fully_shard) and DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py,
stage3.py, partition_parameters.py). The optimizer is RAdaBeliefW: two float32 moments of an element and a step count
of 4 bytes of a tensor.
"""

from dataclasses import dataclass

from robust_dist.plan.engines import Engine
from robust_dist.plan.question import DTYPES, Question
from robust_dist.plan.shapes import Shapes, own_rows, padded_rows

SINGLE = 4  # bytes of float32
MOMENTS = 8  # bytes of an element's two moments
STEP = 4  # bytes of a step count
# DeepSpeed starts the all-gather of each rank's part at a multiple of 4 bytes of float16.
ZERO_ALIGNMENT = 2


@dataclass(frozen=True)
class Held:
    """Bytes on one rank between the end of the backward pass and the step.

    Attributes:
        parameters: As the model holds them between steps.
        masters: ZeRO's float32 copies that the optimizer steps.
        gradients: What the optimizer will read.
        state: Of the optimizer.
        elements: That this rank's optimizer steps.
        on_host: Whether masters, gradients, state and most parameters lie in the host's memory.
    """

    parameters: int
    masters: int
    gradients: int
    state: int
    elements: int
    on_host: bool = False

    @property
    def total(self) -> int:
        """All four."""
        return self.parameters + self.masters + self.gradients + self.state


def held(engine: Engine, shapes: Shapes, question: Question, rank: int = 0) -> Held:
    """What `rank` holds."""
    shards = engine.shards(question)
    if engine.kind == "ddp":
        return _whole(shapes)
    if engine.kind == "fsdp2":
        return _by_rows(shapes, shards, rank % shards)
    size = DTYPES[question.precision].itemsize
    return _by_element(shapes, shards, size, engine) if engine.kind == "zero3" else _flat(shapes, shards, size, rank)


def _whole(shapes: Shapes) -> Held:
    numel, count = shapes.numel, len(shapes.parameters)
    return Held(SINGLE * numel, 0, SINGLE * numel, MOMENTS * numel + STEP * count, numel)


def _by_rows(shapes: Shapes, shards: int, rank: int) -> Held:
    """FSDP2: parameters and gradients are stored with padding, moments without."""
    padded = sum(padded_rows(p.shape, shards) for p in shapes.parameters)
    own = sum(own_rows(p.shape, shards, rank) for p in shapes.parameters)
    return Held(SINGLE * padded, 0, SINGLE * padded, MOMENTS * own + STEP * len(shapes.parameters), own)


def partition(numel: int, shards: int) -> int:
    """Elements of one rank's part of a flat group under ZeRO-1 and 2, padding included."""
    alignment = ZERO_ALIGNMENT * shards
    return -(-numel // alignment) * ZERO_ALIGNMENT


def _flat(shapes: Shapes, shards: int, size: int, rank: int) -> Held:
    own = partition(shapes.numel, shards)
    gradients = size * _touched(shapes, own, rank)
    return Held(size * own * shards, SINGLE * own, gradients, MOMENTS * own + STEP, own)


def _touched(shapes: Shapes, own: int, rank: int) -> int:
    """Elements of the gradients that a part begins, holds or ends in: a view of a piece keeps the whole alive."""
    begin, end, start, elements = rank * own, (rank + 1) * own, 0, 0
    for parameter in shapes.parameters:
        stop = start + parameter.numel
        elements += parameter.numel if start < end and stop > begin else 0
        start = stop
    return elements + max(0, end - max(start, begin))


def worst_rank(engine: Engine, shapes: Shapes, question: Question) -> int:
    """The rank that holds most: the first, but under ZeRO-1 and 2 the one whose part touches the largest gradients."""
    if engine.kind not in ("zero1", "zero2"):
        return 0
    return max(range(question.world_size), key=lambda rank: held(engine, shapes, question, rank).total)


def _by_element(shapes: Shapes, shards: int, size: int, engine: Engine) -> Held:
    """ZeRO-3: each parameter in equal parts; small ones stay gathered besides; float32, too, has masters."""
    own = sum(-(-p.numel // shards) for p in shapes.parameters)
    kept = persistent(shapes, engine)
    on_device = 0 if engine.offload else own
    return Held(size * (on_device + kept), SINGLE * own, size * own, MOMENTS * own + STEP, own, engine.offload)


def persistent(shapes: Shapes, engine: Engine) -> int:
    """Elements of the parameters that ZeRO-3 leaves gathered."""
    return sum(p.numel for p in shapes.parameters if p.numel <= engine.settings.persistent)
