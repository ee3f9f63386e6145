"""The engines that a plan compares: which file of configs/accelerate starts them, and how they shard."""

from dataclasses import dataclass
from typing import Literal

from robust_dist.plan.question import Question

Kind = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class ZeroSettings:
    """What of configs/deepspeed/*.json decides on memory and traffic (a test compares them with the files).

    Attributes:
        reduce_bucket: Elements of a bucket of gradients.
        prefetch: Elements that ZeRO-3 gathers ahead.
        persistent: ZeRO-3 leaves parameters of at most so many elements gathered.
        max_live: Elements that ZeRO-3 may have gathered at a time, and the distance up to which it keeps them.
        overlap: Whether gradients are sent while the backward pass runs; it doubles the bucket under ZeRO-2.
    """

    reduce_bucket: int = 50_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    max_live: int = 1_000_000_000
    overlap: bool = True


@dataclass(frozen=True)
class Engine:
    """One engine as its config makes it.

    Attributes:
        name: For the table.
        kind: Whose rules hold.
        file: Of configs/accelerate, without .yaml; of several nodes `multinode_` before it where there is one.
        reshard: FSDP2: give gathered parameters back after the forward pass.
        in_nodes: FSDP2: shard over the GPUs of a node, replicate over nodes (HSDP).
        offload: ZeRO-3: parameters, gradients and optimizer in the host's memory.
        settings: Of ZeRO.
        words: Further words of `accelerate launch`.
    """

    name: str
    kind: Kind
    file: str
    reshard: bool = True
    in_nodes: bool = False
    offload: bool = False
    settings: ZeroSettings = ZeroSettings()
    words: tuple[str, ...] = ()

    def shards(self, question: Question) -> int:
        """Ranks that share one copy of what the engine shards."""
        if self.kind == "ddp":
            return 1
        return question.gpus_per_node if self.in_nodes else question.world_size


_MULTINODE = ("ddp", "fsdp2", "hsdp", "zero2", "zero3")

# Simplest first: of two that are equally fast the plan proposes the earlier one.
ENGINES: tuple[Engine, ...] = (
    Engine("DDP", "ddp", "ddp"),
    Engine("HSDP", "fsdp2", "hsdp", in_nodes=True),
    Engine("FSDP2, no reshard", "fsdp2", "fsdp2", reshard=False, words=("--fsdp_reshard_after_forward", "false")),
    Engine("FSDP2", "fsdp2", "fsdp2"),
    Engine("ZeRO-1", "zero1", "zero1", settings=ZeroSettings(overlap=False)),
    Engine("ZeRO-2", "zero2", "zero2"),
    Engine("ZeRO-3", "zero3", "zero3"),
    Engine("ZeRO-3, offload", "zero3", "zero3_offload", offload=True),
)


def unfit(engine: Engine, question: Question) -> str | None:
    """Why an engine is no candidate for these machines, or None."""
    if question.world_size == 1 and engine.kind != "ddp":
        return "one GPU has nobody to share with" if not engine.offload else None
    if engine.in_nodes and question.nodes == 1:
        return "one node has nothing to replicate between: FSDP2 does the same"
    if engine.in_nodes and question.gpus_per_node == 1:
        return "nodes of one GPU have nothing to shard inside: DDP does the same"
    return None


def config_file(engine: Engine, question: Question) -> str:
    """The path of the engine's config for one node or several."""
    prefix = "multinode_" if question.nodes > 1 and engine.file in _MULTINODE else ""
    return f"configs/accelerate/{prefix}{engine.file}.yaml"


def launch_line(engine: Engine, question: Question, accumulation: int) -> str:
    """The whole command, to be typed on every node."""
    words = ["accelerate launch", f"--config_file {config_file(engine, question)}"]
    words += [f"--num_processes {question.world_size}"]
    if question.nodes > 1:
        words += [f"--num_machines {question.nodes}", "--machine_rank $NODE_RANK", "--main_process_ip $MASTER_ADDR"]
        words += ["--main_process_port 29500"]
    if engine.in_nodes:
        words += [f"--parallelism_config_dp_replicate_size {question.nodes}"]
        words += [f"--parallelism_config_dp_shard_size {question.gpus_per_node}"]
    words += [*engine.words, "launch/train.py"]
    words += [f"--config {question.recipe}"] if question.recipe else [f"--model.name {question.model}"]
    words += [f"--batch_size {question.batch_size}", f"--accumulation {accumulation}"]
    words += [f"--precision.mixed {question.precision}"]
    return " ".join(words)
