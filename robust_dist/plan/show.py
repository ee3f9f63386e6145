"""A plan as Markdown for a person, with its reasons, or as plain values for a machine."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from robust_dist.measure.memory import GIB, MIB
from robust_dist.measure.table import table
from robust_dist.plan.choose import ALLOWANCE, HOP, LINK_SHARE, START, Estimate, Plan, estimate, variants
from robust_dist.plan.profile import profile_for

_MOST_NODES = 1024


def as_text(plan: Plan) -> str:
    """The whole answer in Markdown."""
    parts = [_head(plan), _memory(plan), _speed(plan), _proposal(plan), _notes(plan)]
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    question, gpu = plan.question, plan.question.hardware
    return (
        f"{question.model}: {plan.shapes.numel:,} parameters in {len(plan.shapes.parameters)} tensors, "
        f"{plan.flops_per_image / 1e9:.1f} GFLOP an image of {question.image_size}x{question.image_size}, forward and "
        f"backward.\n{question.nodes} x {question.gpus_per_node} {question.gpu} with "
        f"{question.memory_bytes / GIB:g} GiB ({gpu.source}), global batch {question.batch_size}, "
        f"precision {question.precision}."
    )


def _memory(plan: Plan) -> str:
    head = ["GiB a GPU", "micro batch", "parameters, masters", "gradients", "optimizer state", "activations"]
    head += ["gathered, buckets", "optimizer's step", "peak", "fits"]
    return table(head, [_memory_row(row) for row in plan.estimates])


def _memory_row(row: Estimate) -> list[str]:
    memory = row.memory
    own = memory.held
    on_device = 0 if own.on_host else 1
    values: list[float] = [own.parameters + on_device * own.masters, on_device * own.gradients, on_device * own.state]
    values += [memory.activations, memory.in_flight, memory.step, memory.peak]
    batch = f"{row.micro_batch}" if row.accumulation == 1 else f"{row.micro_batch} x {row.accumulation}"
    cells = [f"{value / GIB:.2f}" for value in values]
    host = f" (+ {memory.host / GIB:.1f} of the host's)" if own.on_host else ""
    return [row.variant.name, batch, *cells, ("yes" if row.fits else "NO") + host]


def _speed(plan: Plan) -> str:
    head = ["a step", "sent by a GPU, GiB", "of it between nodes", "collectives", "calculates, ms", "sends, ms"]
    head += ["step, ms (estimate)", "efficiency", "images/s (estimate)"]
    return table(head, [_speed_row(row, plan) for row in plan.estimates])


def _speed_row(row: Estimate, plan: Plan) -> list[str]:
    clock = row.clock
    sent = sum(collective.sent for collective in row.traffic)
    away = sum(collective.sent for collective in row.traffic if collective.between_nodes)
    count = sum(collective.count for collective in row.traffic)
    cells = [f"{sent / GIB:.3f}", f"{away / GIB:.3f}", f"{count}", f"{1000 * clock.compute:.1f}"]
    cells += [f"{1000 * clock.communication:.1f}", f"{1000 * clock.step:.1f}", f"{clock.efficiency:.0%}"]
    return [row.variant.name, *cells, f"{plan.question.batch_size / clock.step:,.0f}"]


def _proposal(plan: Plan) -> str:
    if plan.best is None:
        lines = ["**Nothing fits.**", *(f"- {line}" for line in remedies(plan))]
        return "\n".join(lines)
    best, question = plan.best, plan.question
    lines = [f"**Take {best.variant.name}** (`{best.variant.config_file(question)}`). {reason(plan)}", "", "```bash"]
    lines += [best.variant.launch_line(question, best.accumulation), "```", ""]
    if best.traffic:
        head = ["its collectives a step", "operation", "count", "payload, MiB", "ranks", "sent by each, MiB", "hidden"]
        lines += [table(head, [_collective(item) for item in best.traffic]), ""]
    lines += [f"- not {name}: {why}" for name, why in others(plan)]
    return "\n".join(lines)


def _collective(item: Any) -> list[str]:
    payload, sent = (f"{value / MIB:.2f}" for value in (item.payload, item.sent))
    hidden = "yes" if item.overlaps else "no"
    return [item.what, item.operation, f"{item.count}", payload, f"{item.ranks}", sent, hidden]


def _notes(plan: Plan) -> str:
    question = plan.question
    intra = question.intra_gbps or question.hardware.intra_gbps
    inter = question.inter_gbps or question.hardware.inter_gbps
    return (
        "Parameters, masters, gradients, state and payloads are exact; activations are measured on fake tensors; the "
        f"rest is estimated. Assumed: {question.mfu:.0%} of the peak rate, links of {intra:g} Gbit/s in a node and "
        f"{inter:g} between nodes a GPU and direction at {LINK_SHARE:.0%}, {1e6 * START:.0f} us a collective and "
        f"{1e6 * HOP:.0f} more for each doubling of its ranks, {ALLOWANCE / GIB:g} GiB a GPU for CUDA and NCCL. "
        "The optimizer's own arithmetic and the data are not counted. The switch of weight decay adds no collective."
    )


def as_values(plan: Plan) -> dict[str, Any]:
    """The answer as dicts, lists and numbers: bytes and seconds."""
    best = plan.best
    return {
        "question": asdict(plan.question),
        "parameters": plan.shapes.numel,
        "flops_per_image": plan.flops_per_image,
        "engines": [_values(row, plan) for row in plan.estimates],
        "unfit": plan.unfit,
        "best": None if best is None else best.variant.name,
        "reason": None if best is None else reason(plan),
        "not_taken": {} if best is None else dict(others(plan)),
        "remedies": remedies(plan) if best is None else [],
    }


def _values(row: Estimate, plan: Plan) -> dict[str, Any]:
    return {
        "engine": row.variant.name,
        "config": row.variant.config_file(plan.question),
        "launch": row.variant.launch_line(plan.question, row.accumulation),
        "micro_batch": row.micro_batch,
        "accumulation": row.accumulation,
        "fits": row.fits,
        "memory": asdict(row.memory) | {"resident": row.memory.resident, "peak": row.memory.peak},
        "traffic": [asdict(collective) | {"sent": collective.sent} for collective in row.traffic],
        "seconds": asdict(row.clock) | {"efficiency": row.clock.efficiency},
    }


def reason(plan: Plan) -> str:
    """The reasons for this engine, in two or three sentences."""
    best = plan.best
    assert best is not None
    question, clock = plan.question, best.clock
    room = (1 - question.margin) * question.memory_bytes / GIB
    parts = "in one part" if best.accumulation == 1 else f"in {best.accumulation} parts"
    memory = (
        f"It needs {best.memory.peak / GIB:.1f} of the {room:.1f} GiB that a margin of {question.margin:.0%} leaves, "
        f"with each GPU's {_images(question.rank_batch)} {parts}."
    )
    if question.world_size == 1:
        return f"One GPU trains alone. {memory}"
    slower = [other for other in plan.estimates if other.fits and other is not best]
    speed = f"It is estimated to calculate for {clock.efficiency:.0%} of a step ({1000 * clock.step:.1f} ms)"
    if not slower:
        return f"It is the only engine that fits. {memory} {speed}."
    fastest = min(slower, key=lambda other: other.clock.step)
    beside = f"; the next, {fastest.variant.name}, takes {1000 * fastest.clock.step:.1f} ms"
    if fastest.clock.step <= best.clock.step * 1.02:
        beside += ", which is no difference for an estimate, and is less simple"
    return f"{memory} {speed}{beside}."


def others(plan: Plan) -> Iterator[tuple[str, str]]:
    """Every other engine's name, and why it was not chosen."""
    for other in plan.estimates:
        if other is not plan.best:
            yield other.variant.name, _against(other, plan)
    yield from plan.unfit.items()


def _against(other: Estimate, plan: Plan) -> str:
    room = (1 - plan.question.margin) * plan.question.memory_bytes / GIB
    if not other.fits:
        return f"needs {other.memory.peak / GIB:.1f} GiB at {_images(other.micro_batch)}, {room:.1f} are free"
    assert plan.best is not None
    ratio = other.clock.step / plan.best.clock.step - 1
    sent = sum(collective.sent for collective in other.traffic) / GIB
    if ratio < 0.02:
        return f"as fast by the estimate, and less simple; sends {sent:.2f} GiB a step"
    return f"{ratio:.0%} slower by the estimate; sends {sent:.2f} GiB a step"


def remedies(plan: Plan) -> list[str]:
    """Changes that would make the job fit, each with the figure it is based on."""
    question = plan.question
    least = min(plan.estimates, key=lambda other: other.memory.peak)
    activations = least.memory.activations / GIB
    found = [
        f"The least is {least.variant.name} with {least.memory.peak / GIB:.1f} GiB at {_images(least.micro_batch)}, of "
        f"which {activations:.1f} GiB are activations."
    ]
    if question.micro_batch and question.micro_batch > 1:
        found.append("Leave --micro-batch out, or give a smaller one.")
    if question.precision == "no":
        found.append("--precision bf16 halves most activations, and what ZeRO and FSDP2 gather.")
    nodes = _enough_nodes(plan)
    if nodes is not None:
        images = max(question.batch_size, nodes * question.gpus_per_node)
        found.append(f"{nodes} nodes of {question.gpus_per_node} GPUs would do, with {_images(images)} a step.")
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
        usable = (variant for variant in variants() if variant.unfit(more) is None)
        if any(estimate(variant, plan.shapes, profile_for(variant, more), more).fits for variant in usable):
            return nodes
        nodes *= 2
    return None


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
