"""Every engine at its best micro batch, and the one to take."""

from dataclasses import dataclass

from robust_dist.plan.clock import Clock, clock
from robust_dist.plan.engines import ENGINES, Engine, unfit
from robust_dist.plan.memory import Memory, memory
from robust_dist.plan.profile import Profile, profile_for
from robust_dist.plan.question import Question
from robust_dist.plan.shapes import Shapes, build_on_meta, read_shapes
from robust_dist.plan.wire import Collective, traffic

# Estimates that lie closer than this do not make an engine the faster one.
TIE = 0.02


@dataclass(frozen=True)
class Estimate:
    """One engine.

    Attributes:
        engine: It.
        micro_batch: Images at a time and GPU.
        accumulation: Micro batches a step.
        memory: Of the rank that holds most.
        traffic: Of an optimizer step.
        clock: Estimated seconds.
        fits: Whether the peak leaves the margin free.
    """

    engine: Engine
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
        estimates: Of the engines that can be used on these machines.
        unfit: Why the others cannot, by name.
        best: The proposal; None where nothing fits.
    """

    question: Question
    shapes: Shapes
    flops_per_image: float
    estimates: list[Estimate]
    unfit: dict[str, str]
    best: Estimate | None


def plan(question: Question) -> Plan:
    """Compare all engines for a job, and propose one.

    Raises:
        ValueError: An unknown model, or one that does not take these images.
    """
    shapes = read_shapes(
        build_on_meta(question.model, question.num_classes, in_channels=question.in_channels, **question.options)
    )
    reasons = {engine.name: unfit(engine, question) for engine in ENGINES}
    usable = [engine for engine in ENGINES if reasons[engine.name] is None]
    profiles = {engine.name: profile_for(engine, question) for engine in usable}
    estimates = [estimate(engine, shapes, profiles[engine.name], question) for engine in usable]
    flops = profiles[usable[0].name].flops(question.rank_batch) / question.rank_batch
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return Plan(question, shapes, flops, estimates, refused, _best(estimates))


def estimate(engine: Engine, shapes: Shapes, profile: Profile, question: Question) -> Estimate:
    """One engine at the largest micro batch that fits, or at the smallest where none does."""
    room = (1 - question.margin) * question.memory_bytes
    sizes = [question.micro_batch] if question.micro_batch else micro_batches(question.rank_batch)
    for size in sizes:
        found = memory(engine, shapes, profile, question, size)
        if found.peak <= room:
            break
    accumulation = question.accumulation(size)
    sent = traffic(engine, shapes, question, accumulation)
    time = clock(engine, question, profile.flops(question.rank_batch), sent, found.held)
    return Estimate(engine, size, accumulation, found, sent, time, found.peak <= room)


def micro_batches(rank_batch: int) -> list[int]:
    """Sizes of a micro batch for 1, 2, 3, ... parts, largest first; none twice."""
    return sorted({-(-rank_batch // parts) for parts in range(1, rank_batch + 1)}, reverse=True)


def _best(estimates: list[Estimate]) -> Estimate | None:
    fitting = [one for one in estimates if one.fits]
    if not fitting:
        return None
    fastest = min(one.clock.step for one in fitting)
    return next(one for one in fitting if one.clock.step <= (1 + TIE) * fastest)
