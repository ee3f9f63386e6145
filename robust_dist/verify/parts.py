"""The parts of a verification, most valuable first, the process that each runs in, and the claims that it makes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

Verdict = Literal["right", "wrong", "slow", "measured", "not checked"]


@dataclass(frozen=True)
class Claim:
    """One line of the report.

    Attributes:
        what: The claim in words.
        expected: The required measurement; empty if a figure is only reported.
        measured: What was measured.
        verdict: "right" or "wrong"; for speed, "slow", or "measured" if nothing is expected; or "not checked", with
            the reason in `measured`.
    """

    what: str
    expected: str
    measured: str
    verdict: Verdict


class Claims:
    """Claims of a part, each written to a file at once, so that a part that dies leaves what it found.

    Args:
        path: The file, one JSON object per line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, expected: object, measured: object, verdict: Verdict) -> None:
        """Keep a claim."""
        claim = Claim(what, str(expected), str(measured), verdict)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(claim)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check(self, what: str, expected: object, measured: object, right: bool) -> None:
        """Record a claim that is right or wrong."""
        self.add(what, expected, measured, "right" if right else "wrong")

    def equal(self, what: str, expected: object, measured: object) -> None:
        """Record a claim that is right if both are equal."""
        self.check(what, expected, measured, expected == measured)

    def skip(self, what: str, reason: str) -> None:
        """Record what could not be checked, and why."""
        self.add(what, "", reason, "not checked")

    @contextmanager
    def needing(self, what: str, *packages: str) -> Iterator[None]:
        """Skip the block, called `what` in the report, if one of `packages` is missing."""
        try:
            yield
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in packages:
                raise
            self.skip(what, f"{missing} is not installed")


@dataclass(frozen=True)
class Part:
    """One step of the verification.

    Attributes:
        name: Of the part.
        where: module:function, called with a `Scene`.
        seconds: Time after which it counts as hanging.
        ranks: "all" have a process group; "each" runs alone on every rank; "first" on rank 0 only.
        phases: Its processes, which run one after another, each told its phase; the last one checks.
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
        claims: Receives its claims.
        device: This rank's device.
        rank: This process among those of the part.
        world_size: Number of these processes.
        phase: This process's phase.
        folder: Shared by the phases and by all ranks.
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
        folder: Shared by the phases.
    """
    part = next(part for part in PARTS if part.name == name)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    rank, world_size = 0, 1
    if part.ranks == "all":
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=part.seconds)))
        # The launcher's store outlives the group of every part, so each part has its own names there.
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
