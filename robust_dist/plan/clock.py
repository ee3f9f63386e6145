"""Seconds of a step: an estimate from peak rates and stated shares of them, never a measurement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robust_dist.engines.variant import Collective, Held, Variant
from robust_dist.plan.question import Question

# Assumptions, all of them: what a link carries of its rate, and what a collective costs at least.
LINK_SHARE = 0.8
START, HOP = 20e-6, 5e-6  # seconds, the second for each doubling of the ranks
# RAdaBeliefW in the host's memory: bytes it moves an element, and the host's bytes a second for one GPU's rank.
HOST_BYTES, HOST_RATE = 28, 20e9


@dataclass(frozen=True)
class Clock:
    """Estimated seconds of an optimizer step.

    Attributes:
        compute: Forward and backward pass.
        communication: Of all collectives.
        offload: Transfers to the host and the step there.
        step: All of it, with what overlaps.
    """

    compute: float
    communication: float
    offload: float
    step: float

    @property
    def efficiency(self) -> float:
        """Share of the step that is arithmetic."""
        return self.compute / self.step


def clock(variant: Variant, question: Question, flops: float, sent: Sequence[Collective], own: Held) -> Clock:
    """Estimate a step.

    Args:
        variant: The engine's variant.
        question: The job.
        flops: Of a rank's share of the batch, forward and backward.
        sent: The collectives of the step.
        own: What the rank holds, for offload.
    """
    compute = flops / (1e12 * question.hardware.tflops(question.precision) * question.mfu)
    beside = sum(_seconds(one, question) for one in sent if one.overlaps)
    after = sum(_seconds(one, question) for one in sent if not one.overlaps)
    hidden = min(beside, variant.overlap * compute)
    offload = _offload(own, question)
    return Clock(compute, beside + after, offload, compute + beside - hidden + after + offload)


def _seconds(one: Collective, question: Question) -> float:
    intra = question.intra_gbps or question.hardware.intra_gbps
    inter = question.inter_gbps or question.hardware.inter_gbps
    rate = LINK_SHARE * 1e9 / 8 * (min(intra, inter) if one.between_nodes else intra)
    return one.sent / rate + one.count * (START + HOP * math.log2(one.ranks))


def _offload(own: Held, question: Question) -> float:
    if not own.on_host:
        return 0.0
    # Parameters come and gradients go once a step, at least.
    moved = 2 * own.gradients / (LINK_SHARE * 1e9 / 8 * question.hardware.host_gbps)
    return moved + HOST_BYTES * own.elements / HOST_RATE
