"""The records of DeepSpeed's engines, ZeRO 0 to 3, under Accelerate."""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robust_dist.documents import read_json
from robust_dist.engines.deepspeed.variant import ZeroVariant
from robust_dist.engines.engine import Engine, RunSettings

if TYPE_CHECKING:
    from robust_dist.checkpoint.space import Sizes
    from robust_dist.checkpoint.training_state import TrainingState

_MASTER_BYTES = 4


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
    loads_on_any_ranks: bool = False
    extra: str | None = "deepspeed"

    def runs(self, accelerator: Any) -> bool:
        """Whether Accelerate hands the model to DeepSpeed with this stage."""
        if accelerator.distributed_type.value != "DEEPSPEED":
            return False
        config = accelerator.deepspeed_plugin.deepspeed_config
        return int(config.get("zero_optimization", {}).get("stage", 0)) == self.stage

    def fit(self, accelerator: Any, settings: RunSettings) -> None:
        """Fill the open values of the DeepSpeed JSON, and take optimizer and schedule out of it: the run makes them.

        Raises:
            ValueError: The JSON is wrong, or contradicts the run's settings.
        """
        from robust_dist.engines.deepspeed import check_config, register

        register()
        # Of a duplicate key Accelerate has silently kept the last; reading the file again refuses it.
        named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
        if os.path.isfile(named):
            read_json(named)
        config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
            # Otherwise Accelerate puts DeepSpeedCPUAdam in the place of the run's optimizer.
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
        """Like `accelerator.save_state`, but a rank that cannot write finishes, so that no other rank waits for it.

        Raises:
            Exception: The first write that failed on this rank.
        """
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
        """Write DeepSpeed's own files, which it loads with the JSON as it is."""
        from robust_dist.checkpoint.zero_write import write_zero

        write_zero(state, folder, stage=self.stage, world_size=world_size)
        return []

    def saved_bytes(self, sizes: "Sizes", rank: int, world_size: int, *, whole: bool = False) -> int:
        """Weights on the first rank (stage 3: a share on each), float32 weights and moments in shares."""
        first = rank == 0
        if self.stage == 0:
            # Under bf16 there are float32 weights beside the moments.
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
    """Take an optimizer or scheduler out of the JSON: the recipe makes it, and must not be contradicted."""
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
        # It keeps process groups of the first run, which end with it.
        trains_once=True,
        variants=tuple(variant for variant in _VARIANTS if variant.stage == stage),
    )
    for stage in range(4)
)
