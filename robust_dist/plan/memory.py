"""The peak of a rank's memory: what it holds (exact), and what passes and steps need besides (estimated)."""

from dataclasses import dataclass

from robust_dist.measure.memory import GIB
from robust_dist.optim.foreach import CPU_BLOCK
from robust_dist.plan.engines import Engine
from robust_dist.plan.held import MOMENTS, SINGLE, Held, held, persistent, worst_rank
from robust_dist.plan.profile import Profile
from robust_dist.plan.question import DTYPES, Question
from robust_dist.plan.shapes import Shapes

# CUDA's context, the libraries' workspaces and NCCL's channels: an allowance, not measured here.
ALLOWANCE = int(1.5 * GIB)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        held: Parameters, masters, gradients and state.
        buffers: Of the model (BatchNorm's statistics).
        activations: Most that forward and backward pass need for one micro batch.
        in_flight: Gathered parameters and buckets that exist at that moment.
        gradients_then: Gradients that exist at that moment.
        step: Gradients and temporaries of the optimizer's step.
        allowance: For what is not the model's.
        host: Bytes of the host's memory, for this rank.
    """

    held: Held
    buffers: int
    activations: float
    in_flight: float
    gradients_then: float
    step: float
    allowance: int
    host: int

    @property
    def resident(self) -> float:
        """What stays from step to step."""
        own = self.held
        return own.parameters + self.buffers + (0 if own.on_host else own.masters + own.state)

    @property
    def passes(self) -> float:
        """The highest moment of forward and backward pass."""
        return self.resident + self.activations + self.in_flight + self.gradients_then

    @property
    def peak(self) -> float:
        """The highest moment, allowance included."""
        return max(self.passes, self.resident + self.step) + self.allowance


def memory(
    engine: Engine,
    shapes: Shapes,
    profile: Profile,
    question: Question,
    micro_batch: int,
    *,
    rank: int | None = None,
    on_cpu: bool = False,
) -> Memory:
    """One rank's memory at this micro batch.

    Args:
        engine: Whose rules hold.
        shapes: Of the model.
        profile: Of the model in the engine's dtypes.
        question: The job.
        micro_batch: Images at a time.
        rank: Whose; None: that of the rank that holds most.
        on_cpu: Of a rank on a processor: no CUDA, and an optimizer that works in pieces.
    """
    own = held(engine, shapes, question, worst_rank(engine, shapes, question) if rank is None else rank)
    accumulates = question.accumulation(micro_batch) > 1
    passes = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}.get(engine.kind, _zero12)
    activations, in_flight, gradients = passes(engine, shapes, profile, question, micro_batch, accumulates)
    return Memory(
        own,
        shapes.buffer_bytes,
        activations,
        in_flight,
        gradients,
        _step(engine, own, question, on_cpu),
        0 if on_cpu else ALLOWANCE,
        own.masters + own.gradients + own.state + DTYPES[question.precision].itemsize * own.elements
        if own.on_host
        else 0,
    )


def step_temporaries(elements: int, *, on_cpu: bool = False) -> int:
    """Bytes that RAdaBeliefW's foreach step needs beside gradients: two float32 lists; on a processor of a piece."""
    return MOMENTS * (min(elements, CPU_BLOCK) if on_cpu else elements)


def _step(engine: Engine, own: Held, question: Question, on_cpu: bool) -> float:
    if own.on_host:
        return 0.0
    temporaries = step_temporaries(own.elements, on_cpu=on_cpu)
    if engine.kind in ("zero1", "zero2"):
        # Averaged gradients are flattened, then made float32; both are gone before the optimizer runs.
        size = DTYPES[question.precision].itemsize
        making = own.gradients + size * own.elements + (SINGLE * own.elements if size != SINGLE else 0)
        return max(making, SINGLE * own.elements + temporaries)
    if engine.kind == "zero3":
        return own.gradients + SINGLE * (own.elements + engine.settings.reduce_bucket) + temporaries
    return own.gradients + temporaries


_Passes = tuple[float, float, float]


def _split(profile: Profile, batch: int, bytes_per_born: float) -> tuple[float, float]:
    """Activations, and the gradients that exist beside them at the highest moment."""
    both, alone = profile.live(batch, bytes_per_born), profile.live(batch)
    return min(alone, both), max(both - alone, 0.0)


def _ddp(engine: Engine, shapes: Shapes, profile: Profile, question: Question, batch: int, more: bool) -> _Passes:
    if question.world_size == 1:
        if more:
            return profile.live(batch), 0.0, SINGLE * shapes.numel
        activations, gradients = _split(profile, batch, SINGLE)
        return activations, 0.0, gradients
    # The buckets, of which gradients are views, are there all the time.
    return profile.live(batch), 0.0, SINGLE * shapes.numel


def _fsdp2(engine: Engine, shapes: Shapes, profile: Profile, question: Question, batch: int, more: bool) -> _Passes:
    size, shards = DTYPES[question.precision].itemsize, engine.shards(question)
    # Without synchronisation FSDP2 adds whole gradients up until the last micro batch.
    whole = size * shapes.numel if more else 0
    moments = []
    for moment in _backward_moments(shapes, engine.reshard):
        activations = profile.live_between(batch, moment.born, moment.born_after)
        moments.append((activations, size * moment.in_flight, whole + SINGLE * moment.born / shards))
    return max(moments, key=sum)


@dataclass(frozen=True)
class _Moment:
    """The backward pass of one unit, elements.

    Attributes:
        born: Of the gradients that are finished before it.
        born_after: And after it.
        in_flight: Gathered parameters, this unit's gradients, and those before it, which are being scattered.
    """

    born: int
    born_after: int
    in_flight: int


def _backward_moments(shapes: Shapes, reshard: bool) -> list[_Moment]:
    """Gradients are taken to be finished in the reverse of the parameters' order, units as their first parameter."""
    place = {parameter: index for index, parameter in enumerate(shapes.parameters)}
    behind = [0]
    for parameter in reversed(shapes.parameters):
        behind.append(behind[-1] + parameter.numel)
    behind.reverse()
    units = sorted(shapes.units, key=lambda unit: place[unit.parameters[0]], reverse=True)
    stays = sum(unit.numel for unit in units if unit.stays)
    moments, before = [], 0
    for unit, ahead in zip(units, [*units[1:], None], strict=True):
        first, last = (place[unit.parameters[end]] for end in (0, -1))
        if reshard:
            gathered = sum(one.numel for one in (unit, ahead) if one is not None and not one.stays) + stays
        else:
            gathered = shapes.numel - behind[last + 1]
        moments.append(_Moment(behind[last + 1], behind[first], gathered + unit.numel + before))
        before = unit.numel
    return moments


def _zero12(engine: Engine, shapes: Shapes, profile: Profile, question: Question, batch: int, more: bool) -> _Passes:
    size, shards = DTYPES[question.precision].itemsize, engine.shards(question)
    bucket = engine.settings.reduce_bucket
    # communication_data_type is fp32 in our JSONs: a bucket is flattened, and converted, before it is sent.
    # A gradient that is larger than a bucket is sent alone.
    sending = min(max(bucket, max(p.numel for p in shapes.parameters)), shapes.numel) * (
        size + (SINGLE if size != SINGLE else 0)
    )
    if engine.kind == "zero2":
        activations, gradients = _split(profile, batch, size / shards)
        gradients += size * shapes.numel / shards if more else 0
        return activations, bucket * size * (2 if engine.settings.overlap else 1) + sending, gradients
    if more:
        return profile.live(batch), bucket * size, size * shapes.numel
    activations, gradients = _split(profile, batch, size)
    sent = size * shapes.numel + sending
    return (activations, bucket * size, gradients) if activations + gradients > sent else (0.0, bucket * size, sent)


def _zero3(engine: Engine, shapes: Shapes, profile: Profile, question: Question, batch: int, more: bool) -> _Passes:
    size, settings = DTYPES[question.precision].itemsize, engine.settings
    shared = shapes.numel - persistent(shapes, engine)
    gathered = min(shared, settings.max_live) + min(shared, settings.prefetch)
    own = held(engine, shapes, question)
    gradients = 0 if own.on_host else own.gradients
    buckets = settings.reduce_bucket + min(settings.reduce_bucket, shapes.numel)
    return profile.live(batch), size * gathered + SINGLE * buckets, gradients
