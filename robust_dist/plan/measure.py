"""What gloo ranks on this machine really hold: every engine's bytes, walked and seen by the kernel."""

import ctypes
import gc
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from robust_dist.models import build_model
from robust_dist.optim import RAdaBeliefW
from robust_dist.plan.allocations import storage_bytes
from robust_dist.plan.engines import Engine
from robust_dist.plan.question import DTYPES, Question
from robust_dist.plan.shapes import unit_modules

# Of glibc's mallopt: with a fixed threshold every large tensor is mapped for itself, and its pages go when it goes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD = -1, -3, 1 << 16
# The first steps start what is lazy: DDP makes its buckets again after one, ZeRO-3 learns its order in one.
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
        RuntimeError: This is no Linux with glibc, whose allocator and /proc are read.
    """
    if not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "mallopt"):
        raise RuntimeError("memory is measured by Linux's /proc and glibc's mallopt, which are not here")
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        spawn(_rank, (tuple(engines), question, micro_batch, port, out), nprocs=question.world_size)
        found = [json.loads(Path(out, f"{r}.json").read_text()) for r in range(question.world_size)]
    return [[Measured(**ranks[i]) for ranks in found] for i in range(len(engines))]


def _rank(rank: int, engines: tuple[Engine, ...], question: Question, batch: int, port: int, out: str) -> None:
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": question.world_size, "LOCAL_SIZE": question.world_size}
    os.environ.update({key: str(value) for key, value in env.items()} | {"DS_ACCELERATOR": "cpu"})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    try:
        small = replace(question, model="resnet8", image_size=32, options={})
        for engine in engines:
            # Imports and pools of the engine must not count.
            _train(engine, small, batch)
        _once(question, batch)
        found = [asdict(_train(engine, question, batch)) for engine in engines]
        Path(out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _resident(key: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _highest_from_here() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _once(question: Question, batch: int) -> None:
    """One pass of the model alone: what the kernels keep for later must not count, either."""
    model = build_model(question.model, question.num_classes, in_channels=question.in_channels, **question.options)
    images = torch.zeros(batch, question.in_channels, question.image_size, question.image_size)
    model(images).sum().backward()


def _train(engine: Engine, question: Question, batch: int) -> Measured:
    gc.collect()
    before = _resident()
    torch.manual_seed(0)
    model = build_model(question.model, question.num_classes, in_channels=question.in_channels, **question.options)
    kind = _Zero if engine.kind.startswith("zero") else _Torch
    run: _Run = kind(engine, question, batch, model)
    shape = (batch, question.in_channels, question.image_size, question.image_size)
    labels = torch.zeros(batch, dtype=torch.long)
    for _ in range(_STEPS):
        _highest_from_here()
        run.passes(torch.zeros(shape), labels)
        passes, gradients = _resident("VmHWM") - before, run.gradients()
        _highest_from_here()
        run.step()
        step = _resident("VmHWM") - before
    gc.collect()
    found = Measured(run.parameters(), run.masters(), gradients, run.state(), _resident() - before, passes, step)
    del run, model
    gc.collect()
    return found


class _Run:
    """A model and its optimizer under one engine."""

    model: Any
    optimizer: Any
    precision: str

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        dtype = DTYPES[self.precision]
        casting = torch.autocast("cpu", dtype=dtype) if self.casts and self.precision != "no" else nullcontext()
        with casting:
            logits = self.model(images if self.casts else images.to(dtype))
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    casts = True

    def passes(self, images: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def parameters(self) -> int:
        return storage_bytes(self.model.parameters())

    def masters(self) -> int:
        return 0

    def gradients(self) -> int:
        return storage_bytes(p.grad for p in self.model.parameters())

    def state(self) -> int:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return storage_bytes(t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor))


class _Torch(_Run):
    """DDP, FSDP2 and HSDP."""

    def __init__(self, engine: Engine, question: Question, batch: int, model: nn.Module) -> None:
        self.precision = question.precision
        if engine.kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            self.model = shard(model, build_mesh(engine, question), engine.reshard, question.precision)
        self.optimizer = RAdaBeliefW(self.model.parameters(), lr=1e-4)

    def passes(self, images: Tensor, labels: Tensor) -> None:
        self.forward(images, labels).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_mesh(engine: Engine, question: Question) -> Any:
    """FSDP2's mesh: all ranks, or (nodes, GPUs of a node) for HSDP."""
    from torch.distributed.device_mesh import init_device_mesh

    if engine.in_nodes:
        shape = (question.nodes, question.gpus_per_node)
        return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (question.world_size,))


def shard(model: nn.Module, mesh: Any, reshard: bool, precision: str) -> nn.Module:
    """`fully_shard` a model as Accelerate does with configs/accelerate/fsdp2.yaml; returns the model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = DTYPES[precision]
    policy = MixedPrecisionPolicy(dtype, dtype, dtype) if precision != "no" else MixedPrecisionPolicy()
    for module, reshards in unit_modules(model):
        # The root is left to torch, as Accelerate does, which keeps it gathered.
        after = None if module is model else reshards and reshard
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=after)
    return model


class _Zero(_Run):
    """DeepSpeed."""

    casts = False

    def __init__(self, engine: Engine, question: Question, batch: int, model: nn.Module) -> None:
        self.precision = question.precision
        with _silence():
            import deepspeed

            from robust_dist.engines.deepspeed import register

            register()
            optimizer = RAdaBeliefW(model.parameters(), lr=1e-4)
            config = deepspeed_config(engine, question, batch)
            self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def passes(self, images: Tensor, labels: Tensor) -> None:
        self.model.backward(self.forward(images, labels))

    def step(self) -> None:
        self.model.step()

    def parameters(self) -> int:
        if hasattr(self.optimizer, "lp_param_buffer"):
            kept = [p for p in self.model.parameters() if p.numel()]
            return storage_bytes([self.optimizer.lp_param_buffer, *kept])
        return super().parameters()

    def masters(self) -> int:
        name = "fp32_partitioned_groups_flat" if self._is_3() else "single_partition_of_fp32_groups"
        return storage_bytes(getattr(self.optimizer, name))

    def gradients(self) -> int:
        if self._is_3():
            return storage_bytes([self.optimizer.grad_partitions_flat_buffer])
        return storage_bytes(t for group in self.optimizer.averaged_gradients.values() for t in group or ())

    def _is_3(self) -> bool:
        return hasattr(self.optimizer, "grad_partitions_flat_buffer")


def deepspeed_config(engine: Engine, question: Question, batch: int) -> dict[str, Any]:
    """What configs/deepspeed/*.json says, with the engine's bucket sizes and the recipe's values."""
    settings, stage = engine.settings, int(engine.kind[-1])
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": settings.reduce_bucket,
        "overlap_comm": settings.overlap,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": settings.prefetch,
            "stage3_param_persistence_threshold": settings.persistent,
            "stage3_max_live_parameters": settings.max_live,
            "stage3_max_reuse_distance": settings.max_live,
        }
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": question.precision == "bf16"},
        "communication_data_type": "fp32",
        "train_batch_size": batch * question.world_size,
        "train_micro_batch_size_per_gpu": batch,
        "steps_per_print": 10**9,
    }


@contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed logs every setting at its start."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
