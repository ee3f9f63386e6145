"""The reasons in words: why the proposal, why not the others, and what would help where nothing fits."""

from collections.abc import Iterator
from dataclasses import replace

from robust_dist.engines.variant import Variant
from robust_dist.measure.memory import GIB
from robust_dist.plan.choose import Estimate, Plan, estimate, variants
from robust_dist.plan.profile import profile_for
from robust_dist.plan.question import Question

_MOST_NODES = 1024


def reason(plan: Plan) -> str:
    """The reasons for this engine, in two or three sentences."""
    best = plan.best
    assert best is not None
    question, clock = plan.question, best.clock
    room = (1 - question.margin) * question.memory_bytes / GIB
    parts = "in one part" if best.accumulation == 1 else f"in {best.accumulation} parts"
    memory = (
        f"It needs {best.memory.peak / GIB:.1f} of the {room:.1f} GiB that a margin of {question.margin:.0%} leaves, "
        f"with each GPU's {question.rank_batch} images {parts}."
    )
    if question.world_size == 1:
        return f"One GPU trains alone. {memory}"
    slower = [one for one in plan.estimates if one.fits and one is not best]
    speed = f"It is estimated to calculate for {clock.efficiency:.0%} of a step ({1000 * clock.step:.1f} ms)"
    if not slower:
        return f"It is the only engine that fits. {memory} {speed}."
    fastest = min(slower, key=lambda one: one.clock.step)
    beside = f"; the next, {fastest.variant.name}, takes {1000 * fastest.clock.step:.1f} ms"
    if fastest.clock.step <= best.clock.step * 1.02:
        beside += ", which is no difference for an estimate, and is less simple"
    return f"{memory} {speed}{beside}."


def others(plan: Plan) -> Iterator[tuple[str, str]]:
    """For every other engine its name and why it was not taken."""
    for one in plan.estimates:
        if one is not plan.best:
            yield one.variant.name, _against(one, plan)
    yield from plan.unfit.items()


def _against(one: Estimate, plan: Plan) -> str:
    room = (1 - plan.question.margin) * plan.question.memory_bytes / GIB
    if not one.fits:
        return f"needs {one.memory.peak / GIB:.1f} GiB at {one.micro_batch} images, {room:.1f} are free"
    assert plan.best is not None
    ratio = one.clock.step / plan.best.clock.step - 1
    sent = sum(collective.sent for collective in one.traffic) / GIB
    if ratio < 0.02:
        return f"as fast by the estimate, and less simple; sends {sent:.2f} GiB a step"
    return f"{ratio:.0%} slower by the estimate; sends {sent:.2f} GiB a step"


def remedies(plan: Plan) -> list[str]:
    """Changes that would make the job fit, each with the figure it rests on."""
    question = plan.question
    least = min(plan.estimates, key=lambda one: one.memory.peak)
    activations = least.memory.activations / GIB
    found = [
        f"The least is {least.variant.name} with {least.memory.peak / GIB:.1f} GiB at {least.micro_batch} images, of "
        f"which {activations:.1f} GiB are activations."
    ]
    if question.micro_batch and question.micro_batch > 1:
        found.append("Leave --micro-batch out, or give a smaller one.")
    if question.precision == "no":
        found.append("--precision bf16 halves most activations, and what ZeRO and FSDP2 gather.")
    nodes = _enough_nodes(plan)
    if nodes is not None:
        images = max(question.batch_size, nodes * question.gpus_per_node)
        found.append(f"{nodes} nodes of {question.gpus_per_node} GPUs would do, with {images} images a step.")
    if activations > least.memory.resident / GIB:
        found.append(
            "Activation checkpointing (fsdp_activation_checkpointing: true in the FSDP files) trades them for a second "
            "forward pass; smaller images shrink them."
        )
    else:
        found.append(f"A GPU with at least {least.memory.peak / (1 - question.margin) / GIB:.0f} GiB would do.")
    return found


def _enough_nodes(plan: Plan) -> int | None:
    """The smallest doubling of the nodes at which a sharding engine fits, or None."""
    nodes = 2 * plan.question.nodes
    while nodes <= _MOST_NODES:
        world = nodes * plan.question.gpus_per_node
        more = replace(plan.question, nodes=nodes, batch_size=max(plan.question.batch_size, world))
        if any(_fits(variant, plan, more) for variant in variants() if variant.unfit(more) is None):
            return nodes
        nodes *= 2
    return None


def _fits(variant: Variant, plan: Plan, question: Question) -> bool:
    return estimate(variant, plan.shapes, profile_for(variant, question), question).fits
