"""The peak of a rank's memory: what it holds (exact), and what passes and steps need besides (estimated)."""

from dataclasses import dataclass

from robust_dist.engines.variant import MOMENTS, Held, Variant
from robust_dist.measure.memory import GIB
from robust_dist.optim.foreach import CPU_BLOCK
from robust_dist.plan.profile import Profile
from robust_dist.plan.question import Question
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
    """One rank's memory at this micro batch.

    Args:
        variant: The engine's variant.
        shapes: Of the model.
        profile: Of the model in the variant's dtypes.
        question: The job.
        micro_batch: Images at a time.
        rank: Whose; None: that of the rank that holds most.
        on_cpu: Of a rank on a processor: no CUDA, and an optimizer that works in pieces.
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
    """Bytes that RAdaBeliefW's foreach step needs beside gradients: two float32 lists; on a processor of a piece."""
    return MOMENTS * (min(elements, CPU_BLOCK) if on_cpu else elements)
