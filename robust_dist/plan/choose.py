"""Every engine's variants at their best micro batch, what they send, and the one to take."""

from dataclasses import dataclass

from robust_dist.engines.engine import engines
from robust_dist.engines.variant import SINGLE, Collective, Variant, of_all
from robust_dist.plan.clock import Clock, clock
from robust_dist.plan.memory import Memory, memory
from robust_dist.plan.profile import Profile, profile_for
from robust_dist.plan.question import Question
from robust_dist.plan.shapes import Shapes, build_on_meta, read_shapes

# Estimates that lie closer than this do not make an engine the faster one.
TIE = 0.02


@dataclass(frozen=True)
class Estimate:
    """One variant of an engine.

    Attributes:
        variant: The engine's way of launching.
        micro_batch: Images at a time and GPU.
        accumulation: Micro batches a step.
        memory: Of the rank that holds most.
        traffic: Of an optimizer step.
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
    """The answer.

    Attributes:
        question: What was asked.
        shapes: Of the model.
        flops_per_image: Forward and backward pass.
        estimates: Of the variants that can be used on these machines.
        unfit: Why the others cannot, by name.
        best: The proposal; None where nothing fits.
    """

    question: Question
    shapes: Shapes
    flops_per_image: float
    estimates: list[Estimate]
    unfit: dict[str, str]
    best: Estimate | None


def variants() -> list[Variant]:
    """All engines' variants; of two that are equally fast the plan proposes the earlier one."""
    return [variant for engine in engines() for variant in engine.variants]


def plan(question: Question) -> Plan:
    """Compare all engines for a job, and propose one.

    Raises:
        ValueError: An unknown model, or one that does not take these images.
    """
    shapes = read_shapes(
        build_on_meta(question.model, question.num_classes, in_channels=question.in_channels, **question.options)
    )
    reasons = {variant.name: variant.unfit(question) for variant in variants()}
    usable = [variant for variant in variants() if reasons[variant.name] is None]
    profiles = {variant.name: profile_for(variant, question) for variant in usable}
    estimates = [estimate(variant, shapes, profiles[variant.name], question) for variant in usable]
    flops = profiles[usable[0].name].flops(question.rank_batch) / question.rank_batch
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return Plan(question, shapes, flops, estimates, refused, _best(estimates))


def estimate(variant: Variant, shapes: Shapes, profile: Profile, question: Question) -> Estimate:
    """One variant at the largest micro batch that fits, or at the smallest where none does."""
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
    """Every collective of an optimizer step, the training loop's own included.

    Bytes are a ring's, which is what NCCL's bandwidth figures are made of (NVIDIA nccl-tests, doc/PERFORMANCE.md): of a
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
    return [one for one in found if one.payload]


def micro_batches(rank_batch: int) -> list[int]:
    """Sizes of a micro batch for 1, 2, 3, ... parts, largest first; none twice."""
    return sorted({-(-rank_batch // parts) for parts in range(1, rank_batch + 1)}, reverse=True)


def _best(estimates: list[Estimate]) -> Estimate | None:
    fitting = [one for one in estimates if one.fits]
    if not fitting:
        return None
    fastest = min(one.clock.step for one in fitting)
    return next(one for one in fitting if one.clock.step <= (1 + TIE) * fastest)
