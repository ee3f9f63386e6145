"""Every engine's variants at their best micro batch: memory, traffic, seconds; and the one to choose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robust_dist.engines.engine import engines
from robust_dist.engines.variant import MOMENTS, SINGLE, Collective, Held, Variant, of_all
from robust_dist.measure.memory import GIB
from robust_dist.optim.foreach import CPU_BLOCK
from robust_dist.plan.profile import Profile, Shapes, profile_for, shapes_of
from robust_dist.plan.question import Question

# CUDA's context, the libraries' workspaces and NCCL's channels: an allowance, not measured here.
ALLOWANCE = int(1.5 * GIB)
# All of these are assumptions: the share of its rate that a link carries, and the least cost of a collective.
LINK_SHARE = 0.8
START, HOP = 20e-6, 5e-6  # seconds, the second for each doubling of the ranks
# RAdaBeliefW in the host's memory: bytes moved per element, and the host's bytes per second for one GPU's rank.
HOST_BYTES, HOST_RATE = 28, 20e9
# Estimates that differ by less than this count as equal.
TIE = 0.02


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        held: Parameters, masters, gradients and state.
        buffers: The model's buffers (BatchNorm's statistics).
        activations: The most that forward and backward pass need for a micro batch.
        in_flight: Gathered parameters and buckets at that moment.
        gradients_then: Gradients at the same moment.
        step: Gradients and temporaries of the optimizer's step.
        allowance: An allowance for what is not the model's.
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
        """The bytes that stay from step to step."""
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
    variant: Variant,
    shapes: Shapes,
    profile: Profile,
    question: Question,
    micro_batch: int,
    *,
    rank: int | None = None,
    on_cpu: bool = False,
) -> Memory:
    """One rank's memory at a micro batch.

    Args:
        variant: The engine's variant.
        shapes: Of the model.
        profile: The model's profile in the variant's dtypes.
        question: The job.
        micro_batch: Number of images at a time.
        rank: The rank's number; None: the rank that holds most.
        on_cpu: No CUDA, and an optimizer that works in pieces.
    """
    own = variant.held(shapes, question, variant.worst_rank(shapes, question) if rank is None else rank)
    accumulates = question.accumulation(micro_batch) > 1
    passes = variant.passes(shapes, profile, question, micro_batch, accumulates=accumulates)
    temporaries = step_temporaries(own.elements, on_cpu=on_cpu)
    moved = own.masters + own.gradients + own.state + question.itemsize * own.elements
    return Memory(
        held=own,
        buffers=shapes.buffer_bytes,
        activations=passes.activations,
        in_flight=passes.in_flight,
        gradients_then=passes.gradients,
        step=0.0 if own.on_host else variant.step_bytes(own, question, temporaries),
        allowance=0 if on_cpu else ALLOWANCE,
        host=moved if own.on_host else 0,
    )


def step_temporaries(elements: int, *, on_cpu: bool = False) -> int:
    """Bytes that RAdaBeliefW's foreach step needs besides gradients: two float32 lists; on a CPU, of one piece."""
    return MOMENTS * (min(elements, CPU_BLOCK) if on_cpu else elements)


@dataclass(frozen=True)
class Clock:
    """Estimated seconds of an optimizer step.

    Attributes:
        compute: Forward and backward pass.
        communication: All collectives.
        offload: Transfers to the host and the step there.
        step: The whole step; what overlaps counts once.
    """

    compute: float
    communication: float
    offload: float
    step: float

    @property
    def efficiency(self) -> float:
        """The share of the step that is arithmetic."""
        return self.compute / self.step


def clock(variant: Variant, question: Question, flops: float, sent: Sequence[Collective], own: Held) -> Clock:
    """Estimate a step.

    Args:
        variant: The engine's variant.
        question: The job.
        flops: For a rank's share of the batch, forward and backward.
        sent: The collectives of the step.
        own: What the rank holds, for offload.
    """
    compute = flops / (1e12 * question.hardware.tflops(question.precision) * question.mfu)
    beside = sum(_seconds(collective, question) for collective in sent if collective.overlaps)
    after = sum(_seconds(collective, question) for collective in sent if not collective.overlaps)
    hidden = min(beside, variant.overlap * compute)
    offload = _offload(own, question)
    return Clock(compute, beside + after, offload, compute + beside - hidden + after + offload)


def _seconds(collective: Collective, question: Question) -> float:
    intra = question.intra_gbps or question.hardware.intra_gbps
    inter = question.inter_gbps or question.hardware.inter_gbps
    rate = LINK_SHARE * 1e9 / 8 * (min(intra, inter) if collective.between_nodes else intra)
    return collective.sent / rate + collective.count * (START + HOP * math.log2(collective.ranks))


def _offload(own: Held, question: Question) -> float:
    if not own.on_host:
        return 0.0
    # Parameters come and gradients go at least once a step.
    moved = 2 * own.gradients / (LINK_SHARE * 1e9 / 8 * question.hardware.host_gbps)
    return moved + HOST_BYTES * own.elements / HOST_RATE


@dataclass(frozen=True)
class Estimate:
    """One variant of an engine.

    Attributes:
        variant: The engine's way of launching.
        micro_batch: Images at a time and GPU.
        accumulation: Micro batches a step.
        memory: On the rank that holds most.
        traffic: In an optimizer step.
        clock: Estimated seconds.
        fits: Whether the peak leaves the margin free.
    """

    variant: Variant
    micro_batch: int
    accumulation: int
    memory: Memory
    traffic: list[Collective]
    clock: Clock
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer to a question.

    Attributes:
        question: The question.
        shapes: Of the model.
        flops_per_image: In the forward and backward pass.
        estimates: For the variants that can be used on these machines.
        unfit: Reasons why the others cannot be used, by name.
        best: The proposal; None if nothing fits.
    """

    question: Question
    shapes: Shapes
    flops_per_image: float
    estimates: list[Estimate]
    unfit: dict[str, str]
    best: Estimate | None


def variants() -> list[Variant]:
    """All engines' variants; of two equally fast ones the plan proposes the earlier."""
    return [variant for engine in engines() for variant in engine.variants]


def plan(question: Question) -> Plan:
    """Compare all engines for a job, and propose one.

    Raises:
        ValueError: An unknown model, or one that does not take these images.
    """
    shapes = shapes_of(question)
    reasons = {variant.name: variant.unfit(question) for variant in variants()}
    usable = [variant for variant in variants() if reasons[variant.name] is None]
    profiles = {variant.name: profile_for(variant, question) for variant in usable}
    estimates = [estimate(variant, shapes, profiles[variant.name], question) for variant in usable]
    flops = profiles[usable[0].name].flops(question.rank_batch) / question.rank_batch
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return Plan(question, shapes, flops, estimates, refused, _best(estimates))


def estimate(variant: Variant, shapes: Shapes, profile: Profile, question: Question) -> Estimate:
    """One variant at the largest micro batch that fits, or at the smallest if none does."""
    room = (1 - question.margin) * question.memory_bytes
    sizes = [question.micro_batch] if question.micro_batch else micro_batches(question.rank_batch)
    for size in sizes:
        found = memory(variant, shapes, profile, question, size)
        if found.peak <= room:
            break
    accumulation = question.accumulation(size)
    sent = traffic(variant, shapes, question, accumulation)
    time = clock(variant, question, profile.flops(question.rank_batch), sent, found.held)
    return Estimate(variant, size, accumulation, found, sent, time, found.peak <= room)


def traffic(variant: Variant, shapes: Shapes, question: Question, accumulation: int) -> list[Collective]:
    """Every collective of an optimizer step, including the training loop's own.

    Bytes are those of a ring, as in NCCL's bandwidth figures (NVIDIA nccl-tests, doc/PERFORMANCE.md): of a
    payload of S bytes over n ranks an all-gather or a reduce-scatter sends S (n - 1) / n of each rank, an all-reduce
    twice that, a broadcast S.
    """
    if question.world_size == 1:
        return []
    found = list(variant.collectives(shapes, question, accumulation))
    if shapes.float_buffers:
        count = accumulation if variant.broadcasts_buffers else 1
        payload = count * (shapes.buffer_bytes if variant.broadcasts_buffers else SINGLE * shapes.float_buffers)
        found.append(of_all(question, "BatchNorm statistics", "broadcast", payload, count, overlaps=False))
    return [collective for collective in found if collective.payload]


def micro_batches(rank_batch: int) -> list[int]:
    """Sizes of a micro batch for 1, 2, 3, ... parts, largest first, without repeats."""
    return sorted({-(-rank_batch // parts) for parts in range(1, rank_batch + 1)}, reverse=True)


def _best(estimates: list[Estimate]) -> Estimate | None:
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    fastest = min(estimate.clock.step for estimate in fitting)
    return next(estimate for estimate in fitting if estimate.clock.step <= (1 + TIE) * fastest)
