"""DeepSpeed's ZeRO 0 to 3: their records under Accelerate, and their memory and traffic in a plan.

The plan follows the code of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py).
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_dist.documents import read_json
from robust_dist.engines.engine import Engine, RunSettings
from robust_dist.engines.variant import (
    ALONE,
    MOMENTS,
    SINGLE,
    STEP,
    Collective,
    Held,
    Passes,
    Run,
    Variant,
    of_all,
    split,
)
from robust_dist.measure.memory import storage_bytes
from robust_dist.optim import RAdaBeliefW

if TYPE_CHECKING:
    from robust_dist.checkpoint.background import Sizes
    from robust_dist.checkpoint.training_state import TrainingState
    from robust_dist.plan.profile import Profile, Shapes
    from robust_dist.plan.question import Question

# The all-gather of each rank's part starts at a multiple of 4 bytes of float16.
_ALIGNMENT = 2
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ZeroVariant(Variant):
    """A ZeRO stage with the settings of configs/deepspeed/*.json (a test compares them with the files).

    Attributes:
        stage: 1, 2 or 3.
        reduce_bucket: Elements in a bucket of gradients.
        prefetch: Elements that stage 3 gathers in advance.
        persistent: Stage 3 keeps parameters of at most so many elements gathered.
        max_live: Elements that stage 3 may gather at a time, and the reuse distance up to which it keeps them.
    """

    stage: int
    reduce_bucket: int = 50_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    max_live: int = 1_000_000_000
    broadcasts_buffers: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether gradients are sent while the backward pass runs; it doubles the bucket under stage 2."""
        return self.overlap > 0

    def unfit(self, job: "Question") -> str | None:
        """The reason why this does not suit these machines, or None."""
        return ALONE if job.world_size == 1 and not self.offload else None

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """The whole model is cast; there is no autocast."""
        return dtype, None

    def held(self, shapes: "Shapes", job: "Question", rank: int = 0) -> Held:
        """Stages 1 and 2: a part of one flat group; stage 3: a part of each parameter. All have float32 masters."""
        size, shards = job.itemsize, job.world_size
        if self.stage == 3:
            own = sum(-(-p.numel // shards) for p in shapes.parameters)
            on_device = (0 if self.offload else own) + self._kept(shapes)
            return Held(size * on_device, SINGLE * own, size * own, MOMENTS * own + STEP, own, self.offload)
        own = partition(shapes.numel, shards)
        gradients = size * _touched(shapes, own, rank)
        return Held(size * own * shards, SINGLE * own, gradients, MOMENTS * own + STEP, own)

    def worst_rank(self, shapes: "Shapes", job: "Question") -> int:
        """The first; under stages 1 and 2, the one whose part overlaps the largest gradients."""
        if self.stage == 3:
            return 0
        return max(range(job.world_size), key=lambda rank: self.held(shapes, job, rank).total)

    def passes(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int, *, accumulates: bool) -> Passes:
        """Activations together with buckets, and under stage 3 with gathered parameters."""
        if self.stage == 3:
            return self._passes_of_3(shapes, profile, job, batch)
        size, bucket = job.itemsize, self.reduce_bucket
        # communication_data_type is fp32 in our JSONs: a bucket is flattened and converted before it is sent.
        # A gradient that is larger than a bucket is sent alone.
        sending = min(max(bucket, max(p.numel for p in shapes.parameters)), shapes.numel) * (
            size + (SINGLE if size != SINGLE else 0)
        )
        if self.stage == 2:
            activations, gradients = split(profile, batch, size / job.world_size)
            gradients += size * shapes.numel / job.world_size if accumulates else 0
            return Passes(activations, bucket * size * (2 if self.overlaps else 1) + sending, gradients)
        if accumulates:
            return Passes(profile.live(batch), bucket * size, size * shapes.numel)
        activations, gradients = split(profile, batch, size)
        sent = size * shapes.numel + sending
        if activations + gradients > sent:
            return Passes(activations, bucket * size, gradients)
        return Passes(0.0, bucket * size, sent)

    def _passes_of_3(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int) -> Passes:
        shared = shapes.numel - self._kept(shapes)
        gathered = min(shared, self.max_live) + min(shared, self.prefetch)
        own = self.held(shapes, job)
        buckets = self.reduce_bucket + min(self.reduce_bucket, shapes.numel)
        in_flight = job.itemsize * gathered + SINGLE * buckets
        return Passes(profile.live(batch), in_flight, 0 if own.on_host else own.gradients)

    def step_bytes(self, own: Held, job: "Question", temporaries: int) -> float:
        """Averaged gradients are converted to float32, in addition to the optimizer's temporaries."""
        if self.stage == 3:
            return own.gradients + SINGLE * (own.elements + self.reduce_bucket) + temporaries
        # They are flattened first; both are freed before the optimizer runs.
        size = job.itemsize
        making = own.gradients + size * own.elements + (SINGLE * own.elements if size != SINGLE else 0)
        return max(making, SINGLE * own.elements + temporaries)

    def collectives(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """Stage 3 gathers parameters for every micro-batch; 1 and 2 all-reduce float32 buckets, 2 for each of them."""
        if self.stage == 3:
            yield from self._collectives_of_3(shapes, job, accumulation)
            return
        times = accumulation if self.stage == 2 else 1
        flat = partition(shapes.numel, job.world_size) * job.world_size
        count = times * -(-shapes.numel // self.reduce_bucket)
        payload = times * SINGLE * shapes.numel
        yield of_all(job, "gradients", "all-reduce", payload, count, overlaps=self.overlaps)
        yield of_all(job, "parameters, after the step", "all-gather", job.itemsize * flat, 1, overlaps=False)

    def _collectives_of_3(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """Parameters stay gathered from forward to backward if the model is below max_live, else are sent twice."""
        world, size = job.world_size, job.itemsize
        shared = [p for p in shapes.parameters if p.numel > self.persistent]
        flat = sum(-(-p.numel // world) * world for p in shared)
        every = sum(-(-p.numel // world) * world for p in shapes.parameters)
        gathers = accumulation * (1 if flat <= self.max_live else 2)
        count = gathers * -(-flat // self.prefetch)
        yield of_all(job, "parameters", "all-gather", gathers * size * flat, count, overlaps=True)
        count = accumulation * -(-every // self.reduce_bucket)
        yield of_all(job, "gradients", "reduce-scatter", accumulation * SINGLE * every, count, overlaps=True)
        kept = size * self._kept(shapes)
        yield of_all(job, "small parameters, after the step", "all-gather", kept, 1, overlaps=False)

    def _kept(self, shapes: "Shapes") -> int:
        """Elements of the parameters that stage 3 keeps gathered."""
        return sum(p.numel for p in shapes.parameters if p.numel <= self.persistent)

    def with_buckets(self, elements: int) -> "ZeroVariant":
        """The same variant with buckets of so many elements."""
        return replace(self, reduce_bucket=elements)

    def start(self, model: nn.Module, job: "Question", batch: int) -> Run:
        """`deepspeed.initialize` with this variant's settings."""
        # DeepSpeed requires both.
        os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(job.world_size))
        with _silence():
            import deepspeed

            from robust_dist.engines.deepspeed import register

            register()
            optimizer = RAdaBeliefW(model.parameters(), lr=1e-4)
            config = self._config(job, batch)
            return _ZeroRun(*deepspeed.initialize(model=model, optimizer=optimizer, config=config)[:2])

    def _config(self, job: "Question", batch: int) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.reduce_bucket,
            "overlap_comm": self.overlaps,
            "contiguous_gradients": True,
        }
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": self.prefetch,
                "stage3_param_persistence_threshold": self.persistent,
                "stage3_max_live_parameters": self.max_live,
                "stage3_max_reuse_distance": self.max_live,
            }
        return {
            "zero_optimization": zero,
            "bf16": {"enabled": job.dtype == torch.bfloat16},
            "communication_data_type": "fp32",
            "train_batch_size": batch * job.world_size,
            "train_micro_batch_size_per_gpu": batch,
            "steps_per_print": 10**9,
        }


def partition(numel: int, shards: int) -> int:
    """Elements of one rank's part of a flat group under stages 1 and 2, padding included."""
    return -(-numel // (_ALIGNMENT * shards)) * _ALIGNMENT


def _touched(shapes: "Shapes", own: int, rank: int) -> int:
    """Elements of all gradients that a part overlaps: a view of a piece keeps the whole gradient alive."""
    begin, end, start, elements = rank * own, (rank + 1) * own, 0, 0
    for parameter in shapes.parameters:
        stop = start + parameter.numel
        elements += parameter.numel if start < end and stop > begin else 0
        start = stop
    return elements + max(0, end - max(start, begin))


class _ZeroRun(Run):
    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def parameters(self) -> int:
        """Bytes between steps, when stage 3 has only small parameters gathered."""
        if hasattr(self.optimizer, "lp_param_buffer"):
            kept = [p for p in self.model.parameters() if p.numel()]
            return storage_bytes([self.optimizer.lp_param_buffer, *kept])
        return super().parameters()

    def masters(self) -> int:
        name = "fp32_partitioned_groups_flat" if self._is_3() else "single_partition_of_fp32_groups"
        return storage_bytes(getattr(self.optimizer, name))

    def gradients(self) -> int:
        """Bytes of the averaged gradients of this rank's part."""
        if self._is_3():
            return storage_bytes([self.optimizer.grad_partitions_flat_buffer])
        return storage_bytes(t for group in self.optimizer.averaged_gradients.values() for t in group or ())

    def _is_3(self) -> bool:
        return hasattr(self.optimizer, "grad_partitions_flat_buffer")


@contextmanager
def _silence() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(Engine):
    """DeepSpeed with one stage of ZeRO.

    Attributes:
        stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
    """

    stage: int
    steps_whole_parameters: bool = False
    trains_any_memory_format: bool = False
    casts_weights: bool = True
    autocasts: bool = False
    steps_in_backward: bool = True
    loads_on_any_ranks: bool = False
    extra: str | None = "deepspeed"

    def runs(self, accelerator: Any) -> bool:
        """Whether Accelerate passes the model to DeepSpeed with this stage."""
        if accelerator.distributed_type.value != "DEEPSPEED":
            return False
        config = accelerator.deepspeed_plugin.deepspeed_config
        return int(config.get("zero_optimization", {}).get("stage", 0)) == self.stage

    def fit(self, accelerator: Any, settings: RunSettings) -> None:
        """Fill in the DeepSpeed JSON's open values, and remove optimizer and schedule, which the run creates.

        Raises:
            ValueError: The JSON is wrong, or contradicts the run's settings.
        """
        from robust_dist.engines.deepspeed import check_config, register

        register()
        # Accelerate has silently kept the last of duplicate keys; reading the file again rejects them.
        named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
        if os.path.isfile(named):
            read_json(named)
        config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
            # Otherwise Accelerate replaces the run's optimizer by DeepSpeedCPUAdam.
            config.setdefault("zero_force_ds_cpu_optimizer", False)
        check_config(config, auto=True)
        _drop_named(config, "optimizer", settings.optimizer, settings.optimizer_params)
        schedule = settings.schedule_params
        _drop_named(config, "scheduler", "RobustSchedule", schedule | {"cos_min_ratio": schedule["min_lr_ratio"]})
        _fill_batch(config, accelerator.num_processes, settings)

    def casts_batch_norm(self, accelerator: Any) -> bool:
        """True: DeepSpeed casts the whole model except its buffers."""
        return True

    def input_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype of the weights: DeepSpeed has no autocast."""
        return next(model.parameters()).dtype

    def save(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Like `accelerator.save_state`, but a rank that cannot write finishes before it raises."""
        from robust_dist.checkpoint.zero_files import LATEST, TAG
        from robust_dist.engines.deepspeed.check_checkpoint import writing_to_the_end

        with ExitStack() as stack:
            for model in accelerator._models:
                stack.enter_context(writing_to_the_end(model))
            # The first rank would write `latest` between two barriers.
            accelerator.save_state(str(folder), **{"save_latest": False, **options})
        if accelerator.is_main_process and not options.get("save_latest"):
            (folder / LATEST).write_text(TAG, encoding="utf-8")

    def write(self, state: "TrainingState", folder: Path, world_size: int, *, whole: bool = False) -> list[str]:
        """Write DeepSpeed's own files, which it loads with an unchanged JSON."""
        from robust_dist.checkpoint.zero_write import write_zero

        write_zero(state, folder, stage=self.stage, world_size=world_size)
        return []

    def saved_bytes(self, sizes: "Sizes", rank: int, world_size: int, *, whole: bool = False) -> int:
        """Weights on the first rank (stage 3: a share on each); float32 weights and moments in shares."""
        first = rank == 0
        if self.stage == 0:
            # Under bf16 there are float32 weights in addition to the moments.
            return sizes.elements * (sizes.bytes_each + sizes.moments + _MASTER_BYTES) * first
        share = -(-sizes.elements // world_size)
        weights = share if self.stage == 3 else sizes.elements * first
        return share * (_MASTER_BYTES + sizes.moments) + weights * sizes.bytes_each


def _fill_batch(config: dict[str, Any], ranks: int, settings: RunSettings) -> None:
    size, accumulation = settings.batch_size, settings.accumulation
    micro = max(1, size // (ranks * accumulation))
    _fill(config, "gradient_accumulation_steps", accumulation, "accumulation")
    _fill(config, "gradient_clipping", settings.clip_norm or 0.0, "optimizer.clip_norm")
    _fill(config, "train_micro_batch_size_per_gpu", micro, f"batch_size={size} on {ranks} ranks")
    _fill(config, "train_batch_size", micro * ranks * accumulation, f"batch_size={size}")


def _drop_named(config: dict[str, Any], section: str, name: str, params: dict[str, Any]) -> None:
    """Remove an optimizer or scheduler from the JSON: the recipe creates it, and must not be contradicted."""
    named = config.pop(section, None)
    if named is None:
        return
    if named.get("type") != name:
        raise ValueError(
            f"the DeepSpeed JSON's {section}.type={named.get('type')!r} is not the recipe's {name}: leave {section!r} "
            f"out of the JSON, or write {name!r}"
        )
    for key, value in named.get("params", {}).items():
        value = list(value) if isinstance(value, tuple) else value
        if value != "auto" and (key not in params or value != params[key]):
            ours = f"{key}={params[key]!r}" if key in params else f"{section}, which alone decides here"
            raise ValueError(
                f"the DeepSpeed JSON's {section}.params.{key}={value!r} contradicts the recipe's {ours}; write "
                '"auto" in the JSON, or leave it out, and set what you want in the recipe'
            )


def _fill(config: dict[str, Any], key: str, value: float, setting: str) -> None:
    given = config.get(key, "auto")
    if given != "auto" and not math.isclose(given, value):
        raise ValueError(
            f"the DeepSpeed JSON's {key}={given!r} contradicts the recipe, which makes it {value} ({setting} "
            f'decides); write "auto" in the JSON, or change the recipe'
        )
    config[key] = value


_VARIANTS = (
    ZeroVariant(name="ZeRO-1", file="zero1", stage=1, multinode=False, overlap=0.0),
    ZeroVariant(name="ZeRO-2", file="zero2", stage=2),
    ZeroVariant(name="ZeRO-3", file="zero3", stage=3, overlap=1.0),
    ZeroVariant(name="ZeRO-3, offload", file="zero3_offload", stage=3, overlap=1.0, multinode=False, offload=True),
)
ENGINES = tuple(
    DeepSpeed(
        kind=f"zero{stage}",
        stage=stage,
        shards_weights=stage == 3,
        forward_is_collective=stage == 3,
        # It keeps the first run's process groups, which end with that run.
        trains_once=True,
        variants=tuple(variant for variant in _VARIANTS if variant.stage == stage),
    )
    for stage in range(4)
)
