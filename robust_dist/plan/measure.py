"""What gloo ranks on this machine really hold: every engine's bytes, walked and seen by the kernel."""

import ctypes
import gc
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from robust_dist.measure.memory import resident, restart_peak
from robust_dist.models import build_model
from robust_dist.plan.engines import Engine
from robust_dist.plan.question import Question
from robust_dist.plan.runs import Run, TorchRun, ZeroRun

# Of glibc's mallopt: with a fixed threshold every large tensor is mapped for itself, and its pages go when it goes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD = -1, -3, 1 << 16
# What is lazy is there after a step; but DDP makes its buckets again in the second, and ZeRO-3 learns an order in one.
_STEPS = 3
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Measured:
    """One engine on one rank, bytes.

    Attributes:
        parameters: Walked: storages of the parameters between steps.
        masters: Walked: ZeRO's float32 copies.
        gradients: Walked, after the backward pass.
        state: Walked: the optimizer's.
        resident: Memory that the process took more than before the model was built, after a step.
        passes: The highest moment of a forward and backward pass.
        step: The highest moment of an optimizer step.
    """

    parameters: int
    masters: int
    gradients: int
    state: int
    resident: int
    passes: int
    step: int


def measure(engines: Sequence[Engine], question: Question, micro_batch: int) -> list[list[Measured]]:
    """Train a few steps under each engine on `question.world_size` gloo ranks; for each engine the ranks' findings.

    Ranks of a node are consecutive; nothing but their number decides how they are laid out.

    Raises:
        RuntimeError: As `measure_here`.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        spawn(_rank, (tuple(engines), question, micro_batch, port, out), nprocs=question.world_size)
        found = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(question.world_size)]
    return [[Measured(**ranks[i]) for ranks in found] for i in range(len(engines))]


def _rank(rank: int, engines: tuple[Engine, ...], question: Question, batch: int, port: int, out: str) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": question.world_size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    try:
        found = [asdict(one) for one in measure_here(engines, question, batch)]
        Path(out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure_here(engines: Sequence[Engine], question: Question, batch: int) -> list[Measured]:
    """This rank's findings, one for each engine; call it on every rank of a process group of CPU ranks.

    Raises:
        RuntimeError: This is no Linux with glibc, whose allocator and /proc are read.
    """
    libc = ctypes.CDLL(None)
    if not restart_peak() or not hasattr(libc, "mallopt"):
        raise RuntimeError("memory is measured by Linux's /proc and glibc's mallopt, which are not here")
    libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
    # DeepSpeed asks for both.
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(question.world_size))
    small = replace(question, model="resnet8", image_size=32, options={})
    for engine in engines:
        # Imports and pools of the engine must not count.
        _train(engine, small, batch, steps=1)
    _once(question, batch)
    return [_train(engine, question, batch, steps=_STEPS) for engine in engines]


def _resident(*, peak: bool = False) -> int:
    size = resident(peak=peak)
    assert size is not None
    return size


def _once(question: Question, batch: int) -> None:
    """One pass of the model alone: what the kernels keep for later must not count, either."""
    images = torch.zeros(batch, question.in_channels, question.image_size, question.image_size)
    _model(question)(images).sum().backward()


def _model(question: Question) -> nn.Module:
    torch.manual_seed(0)
    return build_model(question.model, question.num_classes, in_channels=question.in_channels, **question.options)


def _train(engine: Engine, question: Question, batch: int, steps: int) -> Measured:
    gc.collect()
    before = _resident()
    kind = ZeroRun if engine.kind.startswith("zero") else TorchRun
    run: Run = kind(engine, question, batch, _model(question))
    images = torch.zeros(batch, question.in_channels, question.image_size, question.image_size)
    labels = torch.zeros(batch, dtype=torch.long)
    for _ in range(steps):
        restart_peak()
        run.passes(images, labels)
        passes, gradients = _resident(peak=True) - before, run.gradients()
        restart_peak()
        run.step()
        step = _resident(peak=True) - before
    gc.collect()
    found = Measured(run.parameters(), run.masters(), gradients, run.state(), _resident() - before, passes, step)
    del run
    gc.collect()
    return found
