"""Memory and traffic of one rank among thousands: `robust-dist bench scale`, with torch's fake process group."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_dist.engines.fsdp.engine import VARIANTS
from robust_dist.measure.dispatch import Collectives
from robust_dist.measure.memory import MIB, storage_bytes
from robust_dist.measure.table import table
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule

BYTES_PER_PARAMETER = 12  # float32: the parameter and the optimizer's two moments
HSDP_SHARDS = 8
# Names of variants, simplest first, and whether their shards stay in a group of 8 ranks.
LAYOUTS = {kind.name: kind.in_nodes for kind in sorted(VARIANTS, key=lambda kind: kind.in_nodes) if kind.reshard}
_HEAD = ["parameters", "layout", "ranks", "largest parameter's shard, first / last rank", "empty shards", "MiB"]
_HEAD += ["MiB if shared equally", "state placed otherwise", "collectives: a step", "the switch, a run"]
_SWITCH_RUN = 8  # optimizer steps of the run in which the switch's collectives are counted

Shape = tuple[int, ...]


def _conv_and_norm(c_in: int, c_out: int, kernel: int) -> list[Shape]:
    return [(c_out, c_in, kernel, kernel), (c_out,), (c_out,)]


def resnet50() -> list[Shape]:
    """Shapes of ResNet-50's 161 parameters, 25.6 million elements."""
    shapes = _conv_and_norm(3, 64, 7)
    c_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_and_norm(c_in, width, 1) + _conv_and_norm(width, width, 3)
            shapes += _conv_and_norm(width, 4 * width, 1)
            shapes += _conv_and_norm(c_in, 4 * width, 1) if block == 0 else []
            c_in = 4 * width
    return [*shapes, (1000, c_in), (1000,)]


def vit_large() -> list[Shape]:
    """Shapes of ViT-L/16's 296 parameters, 304 million elements."""
    width, hidden = 1024, 4096
    shapes: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(24):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    return [*shapes, (width,), (width,), (1000, width), (1000,)]


SETS = {"ResNet-50": resnet50, "ViT-L/16": vit_large}


@dataclass(frozen=True)
class Held:
    """One rank's memory after an optimizer step, and the step's traffic.

    Attributes:
        shapes: Shapes of the rank's shards, one for each parameter.
        bytes: Bytes of the shards with FSDP2's padding, and of the optimizer's state with `step`.
        misplaced: Moments whose mesh or placements differ from their parameter's.
        collectives: Collectives of one `RAdaBeliefW.step()`.
    """

    shapes: list[Shape]
    bytes: int
    misplaced: int
    collectives: int

    @property
    def empty(self) -> int:
        """The number of shards without elements."""
        return sum(0 in shape for shape in self.shapes)


@contextmanager
def fake_rank(world_size: int, rank: int) -> Iterator[None]:
    """Make this process one of many ranks whose collectives return at once.

    Args:
        world_size: Number of ranks.
        rank: Of this process, from 0.

    Raises:
        RuntimeError: This process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already; run it without a launcher"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_mesh(layout: str, world_size: int) -> Any:
    """The DeviceMesh of a layout: one dimension for FSDP2, (world_size / 8, 8) for HSDP.

    Args:
        layout: Among `LAYOUTS`.
        world_size: Number of ranks, a multiple of 8.

    Raises:
        ValueError: An unknown layout, or a world size that is no multiple of 8.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; it must be one of {', '.join(map(repr, LAYOUTS))}")
    if world_size < HSDP_SHARDS or world_size % HSDP_SHARDS:
        raise ValueError(f"world_size={world_size} must be a multiple of {HSDP_SHARDS}: HSDP shards over that many")
    if not LAYOUTS[layout]:
        return init_device_mesh("cpu", (world_size,))
    return init_device_mesh("cpu", (world_size // HSDP_SHARDS, HSDP_SHARDS), mesh_dim_names=("replicate", "shard"))


def sharded(shapes: Sequence[Shape], mesh: Any) -> list[nn.Parameter]:
    """This rank's parameters and gradients under `fully_shard`, which shards one parameter of each shape.

    The others copy it, padding included: at 16,384 ranks `fully_shard` needs 30 ms for each.

    Args:
        shapes: One for each parameter, float32.
        mesh: The layout's DeviceMesh.
    """
    from torch.distributed.fsdp import fully_shard

    unique = list(dict.fromkeys(shapes))
    module = nn.Module()
    module.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in unique)
    fully_shard(module, mesh=mesh)
    found = dict(zip(unique, module.parameters(), strict=True))
    params = [_like(found[shape]) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def _like(param: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    local = _local(param)
    stored = torch.zeros(local.untyped_storage().nbytes() // local.element_size())
    twin = DTensor.from_local(
        stored[: local.numel()].view(local.shape),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return nn.Parameter(twin)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor
    return local


def step_once(params: Sequence[nn.Parameter]) -> Held:
    """A rank's memory after one optimizer step on sharded parameters, and the step's traffic."""
    optimizer = RAdaBeliefW(params)
    with Collectives() as counter:
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    tensors = [*params, *(value for state in states for value in state.values())]
    return Held(
        shapes=[tuple(_local(param).shape) for param in params],
        # The steps of many parameters share one storage.
        bytes=storage_bytes(tensors),
        misplaced=sum(
            _layout(state[name]) != _layout(param)
            for param, state in zip(params, states, strict=True)
            for name in ("exp_avg", "exp_avg_sq")
        ),
        collectives=len(counter.names),
    )


def _layout(tensor: Any) -> tuple[Any, ...]:
    return tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape), tuple(_local(tensor).shape)


def switch_collectives(mesh: Any) -> list[str]:
    """The collectives in a whole run of RAdaBeliefW and RobustSchedule, including the switch."""
    optimizer = RAdaBeliefW(sharded([(64, 4), (64,)], mesh))
    schedule = RobustSchedule(optimizer, _SWITCH_RUN)
    with Collectives() as counter:
        for _ in range(_SWITCH_RUN):
            optimizer.step()
            schedule.step()
    if schedule.weight_decay_switch is None or not schedule.weight_decay_switch.is_off:
        raise AssertionError("the run ended with its decay on")
    return counter.names


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: Of the set of parameters.
        layout: Among `LAYOUTS`: FSDP2 or HSDP.
        world_size: Number of ranks.
        first: Rank 0's memory.
        last: The last rank's memory.
        switch: Collectives of the switch in a whole run.
        mesh_seconds: Time to build the mesh.
    """

    name: str
    layout: str
    world_size: int
    first: Held
    last: Held
    switch: int
    mesh_seconds: float

    @property
    def ideal_bytes(self) -> float:
        """12 bytes per parameter, in equal shares."""
        elements = sum(torch.Size(shape).numel() for shape in SETS[self.name]())
        return BYTES_PER_PARAMETER * elements / (HSDP_SHARDS if LAYOUTS[self.layout] else self.world_size)


def measure(layout: str, world_size: int, names: Sequence[str] | None = None) -> list[Case]:
    """The memory of the first rank and the last one after a step on every set of parameters.

    Args:
        layout: Among `LAYOUTS`: FSDP2 or HSDP.
        world_size: Number of ranks, a multiple of 8.
        names: Which sets; None is all of `SETS`.

    Raises:
        ValueError: An unknown layout, or an impossible world size.
        RuntimeError: This process is in a process group already.
    """
    names = tuple(SETS) if names is None else names
    held: list[list[Held]] = []
    seconds, switch = 0.0, 0
    for rank in (0, world_size - 1):
        with fake_rank(world_size, rank):
            start = time.perf_counter()
            mesh = build_mesh(layout, world_size)
            seconds = max(seconds, time.perf_counter() - start)
            held.append([step_once(sharded(SETS[name](), mesh)) for name in names])
            switch = max(switch, len(switch_collectives(mesh)))
    return [
        Case(name, layout, world_size, first, last, switch, seconds)
        for name, first, last in zip(names, *held, strict=True)
    ]


def bench_scale(world_sizes: Sequence[int] = (8, 64, 1024, 16384)) -> str:
    """A rank's memory and traffic at the given numbers of ranks, as a Markdown table.

    Every number comes from a real `RAdaBeliefW.step()` on `fully_shard`'s DTensors, in the first and in the last rank
    of a fake process group; nothing is sent, and no other rank is needed.

    Args:
        world_sizes: Numbers of ranks, multiples of 8.

    Returns:
        The table and a line about it. MiB are of parameters and optimizer state on one rank.

    Raises:
        ValueError: A world size that is no multiple of 8.
        RuntimeError: This process is in a process group already.
    """
    cases = [case for size in world_sizes for layout in LAYOUTS for case in measure(layout, size)]
    cases.sort(key=lambda case: list(SETS).index(case.name))
    slowest = max((case.mesh_seconds for case in cases), default=0.0)
    note = f"Building a mesh took at most {1000 * slowest:.0f} ms."
    return "\n".join([table(_HEAD, map(_cells, cases)), "", note])


def _cells(case: Case) -> list[str]:
    shapes = SETS[case.name]()
    largest = max(range(len(shapes)), key=lambda i: torch.Size(shapes[i]).numel())
    both = (case.first, case.last)
    return [
        case.name,
        case.layout,
        f"{case.world_size:,}",
        " / ".join("x".join(map(str, held.shapes[largest])) for held in both),
        " / ".join(str(held.empty) for held in both) + f" of {len(shapes)}",
        " / ".join(f"{held.bytes / MIB:.2f}" for held in both),
        f"{case.ideal_bytes / MIB:.2f}",
        str(case.first.misplaced + case.last.misplaced),
        str(max(held.collectives for held in both)),
        str(case.switch),
    ]
