"""A model and RAdaBeliefW under each engine on CPU ranks, with what they hold."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robust_dist.measure.memory import storage_bytes
from robust_dist.optim import RAdaBeliefW
from robust_dist.plan.engines import Engine
from robust_dist.plan.question import DTYPES, Question
from robust_dist.plan.shapes import unit_modules


class Run:
    """A model and its optimizer under one engine."""

    model: Any
    optimizer: Any
    precision: str
    autocasts = True

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, in the engine's way to the precision."""
        dtype = DTYPES[self.precision]
        casts = self.autocasts and self.precision != "no"
        with torch.autocast("cpu", dtype=dtype) if casts else nullcontext():
            logits = self.model(images if self.autocasts else images.to(dtype))
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    def passes(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward pass."""
        raise NotImplementedError

    def step(self) -> None:
        """The optimizer's step; gradients are gone after it."""
        raise NotImplementedError

    def parameters(self) -> int:
        """Bytes of the parameters' storages."""
        return storage_bytes(self.model.parameters())

    def masters(self) -> int:
        """Bytes of the float32 copies that the optimizer steps in the parameters' place."""
        return 0

    def gradients(self) -> int:
        """Bytes of what the optimizer will read."""
        return storage_bytes(p.grad for p in self.model.parameters())

    def state(self) -> int:
        """Bytes of the optimizer's state."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return storage_bytes(t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor))


class TorchRun(Run):
    """DDP, FSDP2 and HSDP."""

    def __init__(self, engine: Engine, question: Question, batch: int, model: nn.Module) -> None:
        self.precision = question.precision
        if engine.kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            self.model = shard(model, build_mesh(engine, question), engine.reshard, question.precision)
        self.optimizer = RAdaBeliefW(self.model.parameters(), lr=1e-4)

    def passes(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward pass."""
        self.forward(images, labels).backward()

    def step(self) -> None:
        """The optimizer's step."""
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
        after: dict[str, Any] = {} if module is model else {"reshard_after_forward": reshards and reshard}
        fully_shard(module, mesh=mesh, mp_policy=policy, **after)
    return model


class ZeroRun(Run):
    """DeepSpeed."""

    autocasts = False

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
        """Forward and backward pass."""
        self.model.backward(self.forward(images, labels))

    def step(self) -> None:
        """The optimizer's step."""
        self.model.step()

    def parameters(self) -> int:
        """Bytes between steps, when ZeRO-3 has only small ones gathered."""
        if hasattr(self.optimizer, "lp_param_buffer"):
            kept = [p for p in self.model.parameters() if p.numel()]
            return storage_bytes([self.optimizer.lp_param_buffer, *kept])
        return super().parameters()

    def masters(self) -> int:
        """Bytes of the float32 parts."""
        name = "fp32_partitioned_groups_flat" if self._is_3() else "single_partition_of_fp32_groups"
        return storage_bytes(getattr(self.optimizer, name))

    def gradients(self) -> int:
        """Bytes of the averaged gradients of this rank's part."""
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
