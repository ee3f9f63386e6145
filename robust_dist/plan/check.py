"""Predicted beside measured: `robust-dist plan --check`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robust_dist.measure.memory import MIB
from robust_dist.measure.table import table
from robust_dist.plan.engines import ENGINES, Engine, ZeroSettings, unfit
from robust_dist.plan.measure import Measured, measure
from robust_dist.plan.memory import Memory, memory
from robust_dist.plan.profile import profile_for
from robust_dist.plan.question import Question
from robust_dist.plan.shapes import build_on_meta, read_shapes

# How far a predicted peak may lie from the measured one.
TOLERANCE = 0.15
# A process's pages count once they are written, so ZeRO's buckets must be small enough to be filled.
_BUCKET = 1_000_000


@dataclass(frozen=True)
class Compared:
    """One engine: the plan for rank 0 and what rank 0 was seen to hold."""

    engine: Engine
    predicted: Memory
    measured: Measured

    @property
    def exact(self) -> bool:
        """Whether parameters, masters, gradients and state are the predicted ones to the byte."""
        ours, theirs = self.predicted.held, self.measured
        return (ours.parameters, ours.masters, ours.gradients, ours.state) == (
            theirs.parameters,
            theirs.masters,
            theirs.gradients,
            theirs.state,
        )

    @property
    def peaks(self) -> tuple[float, float]:
        """Predicted and measured peak, bytes."""
        return self.predicted.peak, max(self.measured.passes, self.measured.step)

    @property
    def error(self) -> float:
        """Of the predicted peak, as a share of the measured one."""
        predicted, measured = self.peaks
        return predicted / measured - 1


def with_small_buckets(engine: Engine) -> Engine:
    """The engine with buckets that a small model fills."""
    ours: ZeroSettings = replace(engine.settings, reduce_bucket=_BUCKET)
    return replace(engine, settings=ours)


def compare(question: Question, micro_batch: int, engines: Sequence[Engine] | None = None) -> list[Compared]:
    """Plan for CPU ranks, run them, and put both side by side.

    Args:
        question: The job; `nodes` x `gpus_per_node` gloo ranks are started on this machine.
        micro_batch: Images at a time and rank.
        engines: Which; None: all that fit these ranks and need no GPU.
    """
    chosen = ENGINES if engines is None else engines
    small = [with_small_buckets(e) for e in chosen if not e.offload and unfit(e, question) is None]
    question = replace(question, batch_size=micro_batch * question.world_size)
    shapes = read_shapes(
        build_on_meta(question.model, question.num_classes, in_channels=question.in_channels, **question.options)
    )
    found = measure(small, question, micro_batch)
    predicted = [memory(e, shapes, profile_for(e, question), question, micro_batch, rank=0, on_cpu=True) for e in small]
    return [Compared(e, ours, ranks[0]) for e, ours, ranks in zip(small, predicted, found, strict=True)]


def show(rows: Sequence[Compared]) -> str:
    """The table, in Markdown; MiB of rank 0."""
    head = ["engine", "parameters + masters", "gradients", "state", "to the byte"]
    head += ["peak predicted", "measured", "off by"]
    return table(head, map(_cells, rows))


def _cells(row: Compared) -> list[str]:
    own, (predicted, measured) = row.predicted.held, row.peaks
    cells = [row.engine.name, f"{(own.parameters + own.masters) / MIB:.1f}", f"{own.gradients / MIB:.1f}"]
    cells += [f"{own.state / MIB:.1f}", "yes" if row.exact else "NO", f"{predicted / MIB:.0f}"]
    return [*cells, f"{measured / MIB:.0f}", f"{row.error:+.1%}"]
