"""`robust-dist plan --check`: the plan compared with gloo ranks on this machine, by storages and the kernel's count."""

import ctypes
import gc
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from robust_dist.engines.variant import Run, Variant
from robust_dist.measure.memory import MIB, resident, restart_peak
from robust_dist.measure.table import table
from robust_dist.models import build_model
from robust_dist.plan.choose import Memory, memory, variants
from robust_dist.plan.profile import profile_for, shapes_of
from robust_dist.plan.question import Question
from robust_dist.train.step import summed_loss

# How far a predicted peak may lie from the measured one.
TOLERANCE = 0.15
# A process's pages count once they are written, so ZeRO's buckets must be small enough to be filled.
_BUCKET = 1_000_000
# For glibc's mallopt: with a fixed threshold every large tensor has its own mapping, whose pages are freed with it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD = -1, -3, 1 << 16
# Lazy state exists after one step; but DDP rebuilds its buckets in the second, and ZeRO-3 records an order in one.
_STEPS = 3
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Measured:
    """One variant on one rank, bytes: the first four by walking storages, the others as the kernel counts the process.

    Attributes:
        parameters: Between steps.
        masters: ZeRO's float32 copies.
        gradients: After the backward pass.
        state: The optimizer's.
        resident: After a step, beyond what the process had before the model was built.
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


@dataclass(frozen=True)
class Compared:
    """One variant: the plan for rank 0, and what was measured there."""

    variant: Variant
    predicted: Memory
    measured: Measured

    @property
    def exact(self) -> bool:
        """Whether parameters, masters, gradients and state are as predicted, to the byte."""
        names = ("parameters", "masters", "gradients", "state")
        return all(getattr(self.predicted.held, name) == getattr(self.measured, name) for name in names)

    @property
    def peaks(self) -> tuple[float, float]:
        """Predicted and measured peak, bytes."""
        return self.predicted.peak, max(self.measured.passes, self.measured.step)

    @property
    def error(self) -> float:
        """The error of the predicted peak, as a share of the measured one."""
        predicted, measured = self.peaks
        return predicted / measured - 1


def compare(question: Question, micro_batch: int) -> list[Compared]:
    """The plan beside measurements on CPU ranks, for the variants that fit them and need no GPU.

    Args:
        question: The job; `nodes` x `gpus_per_node` gloo ranks are started on this machine.
        micro_batch: Images at a time and rank.

    Raises:
        RuntimeError: As `measure_here`.
    """
    small = small_variants(question)
    question = replace(question, batch_size=micro_batch * question.world_size)
    shapes = shapes_of(question)
    found = _measure(small, question, micro_batch)
    predicted = [memory(v, shapes, profile_for(v, question), question, micro_batch, rank=0, on_cpu=True) for v in small]
    return list(map(Compared, small, predicted, found))


def small_variants(question: Question) -> list[Variant]:
    """The variants that fit these ranks and need no GPU, with buckets that a small model fills."""
    fit = [variant for variant in variants() if not variant.offload and variant.unfit(question) is None]
    return [variant.with_buckets(_BUCKET) for variant in fit]


def show(rows: Sequence[Compared]) -> str:
    """The table, in Markdown; MiB of rank 0."""
    head = ["engine", "parameters + masters", "gradients", "state", "to the byte"]
    head += ["peak predicted", "measured", "off by"]
    return table(head, map(_cells, rows))


def _cells(row: Compared) -> list[str]:
    own, (predicted, measured) = row.predicted.held, row.peaks
    cells = [row.variant.name, f"{(own.parameters + own.masters) / MIB:.1f}", f"{own.gradients / MIB:.1f}"]
    cells += [f"{own.state / MIB:.1f}", "yes" if row.exact else "NO", f"{predicted / MIB:.0f}"]
    return [*cells, f"{measured / MIB:.0f}", f"{row.error:+.1%}"]


def _measure(chosen: Sequence[Variant], question: Question, micro_batch: int) -> list[Measured]:
    """Train a few steps under each variant on `question.world_size` gloo ranks; what rank 0 found."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        spawn(_rank, (tuple(chosen), question, micro_batch, port, out), nprocs=question.world_size)
        return [Measured(**noted) for noted in json.loads(Path(out, "0.json").read_text(encoding="utf-8"))]


def _rank(rank: int, chosen: tuple[Variant, ...], question: Question, batch: int, port: int, out: str) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": question.world_size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    try:
        found = [asdict(measured) for measured in measure_here(chosen, question, batch)]
        if rank == 0:
            Path(out, "0.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure_here(chosen: Sequence[Variant], question: Question, batch: int) -> list[Measured]:
    """This rank's measurements of each variant; call it on every rank of a process group of CPU ranks.

    Raises:
        RuntimeError: The system is not Linux with glibc.
    """
    libc = ctypes.CDLL(None)
    if not restart_peak() or not hasattr(libc, "mallopt"):
        raise RuntimeError("measuring memory needs Linux's /proc and glibc's mallopt, which this system lacks")
    libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
    small = replace(question, model="resnet8", image_size=32, options={})
    for variant in chosen:
        # Imports and pools of the engine must not count.
        _train(variant, small, batch, steps=1)
    # Neither must what the kernels keep for later.
    _model(question)(_images(question, batch)).sum().backward()
    return [_train(variant, question, batch, steps=_STEPS) for variant in chosen]


def _images(question: Question, batch: int) -> Tensor:
    return torch.zeros(batch, question.in_channels, question.image_size, question.image_size)


def _model(question: Question) -> nn.Module:
    torch.manual_seed(0)
    return build_model(question.model, question.num_classes, in_channels=question.in_channels, **question.options)


def _resident(*, peak: bool = False) -> int:
    size = resident(peak=peak)
    assert size is not None
    return size


def _train(variant: Variant, question: Question, batch: int, steps: int) -> Measured:
    gc.collect()
    before = _resident()
    run = variant.start(_model(question), question, batch)
    images, labels = _images(question, batch), torch.zeros(batch, dtype=torch.long)
    for _ in range(steps):
        restart_peak()
        run.backward(_loss(run, variant.dtypes(question.dtype), images, labels))
        passes, gradients = _resident(peak=True) - before, run.gradients()
        restart_peak()
        run.step()
        step = _resident(peak=True) - before
    gc.collect()
    found = Measured(run.parameters(), run.masters(), gradients, run.state(), _resident() - before, passes, step)
    del run
    gc.collect()
    return found


def _loss(run: Run, dtypes: tuple[torch.dtype, torch.dtype | None], images: Tensor, labels: Tensor) -> Tensor:
    weights, autocast = dtypes
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        logits = run.model(images.to(weights) if autocast is None else images)
    return summed_loss(logits, labels, None, 0.0)
