"""An engine's layout of a job over ranks: a rank's memory, its traffic, and the launch command.

`robust-dist plan` compares the variants of all engines; `Variant` itself shards nothing, like DDP.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robust_dist.measure.memory import MIB, storage_bytes
from robust_dist.optim import RAdaBeliefW

if TYPE_CHECKING:
    from robust_dist.plan.profile import Profile, Shapes
    from robust_dist.plan.question import Question

SINGLE = 4  # bytes of float32
MOMENTS = 8  # bytes of an element's two moments
STEP = 4  # bytes of a step count
ALONE = "there is no other GPU to share with"
# torch's DistributedDataParallel: bucket_cap_mb, and a first bucket of 1 MiB.
_BUCKET, _FIRST_BUCKET = 25 * MIB, MIB

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]


@dataclass(frozen=True)
class Held:
    """Bytes on one rank between the end of the backward pass and the step.

    Attributes:
        parameters: Parameters as the model holds them between steps.
        masters: Float32 copies that the optimizer steps instead of the parameters.
        gradients: Gradients that the optimizer will read.
        state: The optimizer's state.
        elements: Number of elements that this rank's optimizer steps.
        on_host: Whether masters, gradients, state and most parameters are in host memory.
    """

    parameters: int
    masters: int
    gradients: int
    state: int
    elements: int
    on_host: bool = False

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.parameters + self.masters + self.gradients + self.state


class Passes(NamedTuple):
    """Bytes at the peak of a forward and backward pass, in addition to parameters and state.

    Attributes:
        activations: The model's activations.
        in_flight: Gathered parameters and buckets.
        gradients: Gradients that exist at that time.
    """

    activations: float
    in_flight: float
    gradients: float


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in an optimizer step.

    Attributes:
        what: The data that is sent.
        operation: The kind of collective.
        payload: Bytes of the complete data, over all of them.
        ranks: Number of ranks in each.
        count: Number of collectives.
        between_nodes: Whether their ring crosses nodes.
        overlaps: Whether they overlap with the forward and backward pass.
    """

    what: str
    operation: Operation
    payload: float
    ranks: int
    count: int
    between_nodes: bool
    overlaps: bool

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives."""
        if self.operation == "broadcast":
            return self.payload
        once = self.payload * (self.ranks - 1) / self.ranks
        return 2 * once if self.operation == "all-reduce" else once


def of_all(
    job: "Question", what: str, operation: Operation, payload: float, count: int, *, overlaps: bool
) -> Collective:
    """A collective of all ranks; the other arguments are `Collective`'s fields."""
    return Collective(what, operation, payload, job.world_size, count, job.nodes > 1, overlaps)


def split(profile: "Profile", batch: int, bytes_per_born: float) -> tuple[float, float]:
    """Bytes of a micro-batch's activations, and of the gradients at the same time, at the peak.

    `bytes_per_born` bytes remain for each element of a finished gradient.
    """
    both, alone = profile.live(batch, bytes_per_born), profile.live(batch)
    return min(alone, both), max(both - alone, 0.0)


class Run:
    """A model and its RAdaBeliefW as prepared by the engine on this CPU rank, and their memory."""

    def __init__(self, model: Any, optimizer: Any = None) -> None:
        self.model = model
        self.optimizer: Any = RAdaBeliefW(model.parameters(), lr=1e-4) if optimizer is None else optimizer

    def backward(self, loss: Tensor) -> None:
        """Backward pass from a 0-d loss."""
        loss.backward()

    def step(self) -> None:
        """The optimizer's step; gradients are gone after it."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> int:
        """Bytes of the parameters' storages."""
        return storage_bytes(self.model.parameters())

    def masters(self) -> int:
        """Bytes of the float32 copies that the optimizer steps instead of the parameters."""
        return 0

    def gradients(self) -> int:
        """Bytes of the gradients that the optimizer will read."""
        return storage_bytes(p.grad for p in self.model.parameters())

    def state(self) -> int:
        """Bytes of the optimizer's state."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return storage_bytes(t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to launch an engine, with a file of configs/accelerate.

    Attributes:
        name: Name in the table.
        file: File in configs/accelerate, without .yaml.
        multinode: Whether there is a file for several nodes, with the prefix `multinode_`.
        overlap: Fraction of the forward and backward pass with which the collectives overlap.
        broadcasts_buffers: Whether the engine sends the first rank's buffers before each forward pass; otherwise the
            training loop does so once per step.
        offload: Whether parameters, gradients and optimizer are in host memory.
    """

    name: str
    file: str
    multinode: bool = True
    overlap: float = 2 / 3
    broadcasts_buffers: bool = True
    offload: bool = False

    def unfit(self, job: "Question") -> str | None:
        """The reason why this does not suit these machines, or None."""
        return None

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtypes of gathered weights and of autocast (None: off) if the job computes in `dtype`."""
        return torch.float32, None if dtype == torch.float32 else dtype

    def held(self, shapes: "Shapes", job: "Question", rank: int = 0) -> Held:
        """Exact bytes that a rank holds."""
        numel, count = shapes.numel, len(shapes.parameters)
        return Held(SINGLE * numel, 0, SINGLE * numel, MOMENTS * numel + STEP * count, numel)

    def worst_rank(self, shapes: "Shapes", job: "Question") -> int:
        """The rank that holds the most bytes."""
        return 0

    def passes(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int, *, accumulates: bool) -> Passes:
        """The peak of the passes over one micro-batch; `accumulates`: a step has several of them."""
        if job.world_size == 1 and not accumulates:
            activations, gradients = split(profile, batch, SINGLE)
            return Passes(activations, 0.0, gradients)
        # On several ranks the buckets, of which gradients are views, always exist.
        return Passes(profile.live(batch), 0.0, SINGLE * shapes.numel)

    def step_bytes(self, own: Held, job: "Question", temporaries: int) -> float:
        """Peak bytes of gradients and of the optimizer's temporaries in its step."""
        return own.gradients + temporaries

    def collectives(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """The engine's traffic in an optimizer step of `accumulation` micro-batches."""
        yield of_all(job, "gradients", "all-reduce", SINGLE * shapes.numel, _buckets(shapes), overlaps=True)

    def words(self, job: "Question") -> list[str]:
        """Additional arguments of `accelerate launch`."""
        return []

    def with_buckets(self, elements: int) -> "Variant":
        """The same variant with buckets of so many elements, if the engine's can be set."""
        return self

    def start(self, model: nn.Module, job: "Question", batch: int) -> Run:
        """The unsharded float32 model under this engine on the CPU ranks of the process group.

        Raises:
            ImportError: The engine's package is not installed.
        """
        return Run(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))

    def config_file(self, job: "Question") -> str:
        """The path of the config for one node or several."""
        prefix = "multinode_" if job.nodes > 1 and self.multinode else ""
        return f"configs/accelerate/{prefix}{self.file}.yaml"

    def launch_line(self, job: "Question", accumulation: int) -> str:
        """The launch command, to be run on every node."""
        words = ["accelerate launch", f"--config_file {self.config_file(job)}", f"--num_processes {job.world_size}"]
        if job.nodes > 1:
            words += [f"--num_machines {job.nodes}", "--machine_rank $NODE_RANK", "--main_process_ip $MASTER_ADDR"]
            words += ["--main_process_port 29500"]
        words += [*self.words(job), "launch/train.py"]
        words += [f"--config {job.recipe}"] if job.recipe else [f"--model.name {job.model}"]
        words += [f"--batch_size {job.batch_size}", f"--accumulation {accumulation}"]
        return " ".join([*words, f"--precision.mixed {job.precision}"])


def _buckets(shapes: "Shapes") -> int:
    """The number of DDP's gradient buckets, filled from the last parameter on."""
    count, filled, limit = 0, 0, _FIRST_BUCKET
    for parameter in reversed(shapes.parameters):
        filled += SINGLE * parameter.numel
        if filled >= limit:
            count, filled, limit = count + 1, 0, _BUCKET
    return count + (filled > 0)
