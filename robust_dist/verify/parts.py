"""The parts of a verification, in order of value, and the process that each runs in."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from robust_dist.verify.claims import Claims


@dataclass(frozen=True)
class Part:
    """One step of the verification.

    Attributes:
        name: Of the part.
        where: module:function, called with a `Scene`.
        seconds: After which it counts as hanging.
        ranks: "all" have a process group; "each" runs alone on every rank; "first" on rank 0 only.
        phases: Processes that it takes, one after the other, each told its phase; the last one checks.
        killed: Phases that end themselves by SIGKILL.
    """

    name: str
    where: str
    seconds: float
    ranks: str = "each"
    phases: tuple[str, ...] = ("",)
    killed: tuple[str, ...] = ()


def _engine(name: str, seconds: float = 90.0) -> Part:
    where = f"robust_dist.verify.together:{name}"
    return Part(name, where, seconds, "all", ("killed", "continued"), ("killed",))


PARTS = (
    Part("machine", "robust_dist.verify.correct:machine", 60),
    Part("optimizer", "robust_dist.verify.correct:optimizer", 90),
    Part("augmentation", "robust_dist.verify.correct:augmentation", 90),
    Part("ranks", "robust_dist.verify.together:ranks", 60, "all"),
    _engine("ddp"),
    _engine("fsdp2"),
    _engine("zero2", 150.0),
    Part("optimizer speed", "robust_dist.verify.speed:optimizer", 90, "first"),
    Part("augmentation speed", "robust_dist.verify.speed:augmentation", 90, "first"),
    Part("training step", "robust_dist.verify.speed:step", 120, "first"),
    _engine("zero3", 150.0),
    _engine("zero1", 150.0),
)


@dataclass(frozen=True)
class Scene:
    """The surroundings of a part's process.

    Attributes:
        claims: Where its claims go.
        device: Of this rank.
        rank: This process among those of the part.
        world_size: How many there are.
        phase: Which of the part's processes this is.
        folder: Shared by the phases, and by all ranks.
    """

    claims: Claims
    device: torch.device
    rank: int
    world_size: int
    phase: str
    folder: Path


def run_part(name: str, phase: str, local_rank: int, claims: Path, folder: Path) -> None:
    """Run a phase of a part in this process, one of the part's ranks.

    Args:
        name: Of the part.
        phase: One of its phases.
        local_rank: This process among those of its host.
        claims: The file for its claims.
        folder: For what its phases leave to each other.
    """
    part = next(part for part in PARTS if part.name == name)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    rank, world_size = 0, 1
    if part.ranks == "all":
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=part.seconds)))
        # The launcher's store outlives the group of every part: each has names of its own there.
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore(f"verify/{name}/{phase}", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=part.seconds),
        )
    module, _, function = part.where.partition(":")
    call: Callable[[Scene], None] = getattr(import_module(module), function)
    call(Scene(Claims(claims), device, rank, world_size, phase, folder))
    if dist.is_initialized():
        dist.destroy_process_group()
