"""What the loop asks of the engine: its kind, how a DeepSpeed JSON and the recipe go together, what it cannot do."""

import math
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from robust_dist.documents import read_json
from robust_dist.train.graph import check_graph
from robust_dist.train.optimizers import adam_arguments, chosen
from robust_dist.train.recipe import Recipe

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def engine_kind(accelerator: Accelerator) -> str:
    """The kind of checkpoint that the engine writes: "ddp" (one process too), "fsdp" or "zero0" ... "zero3"."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        return f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    return "fsdp" if accelerator.distributed_type is DistributedType.FSDP else "ddp"


def forward_is_collective(accelerator: Accelerator) -> bool:
    """Whether a forward pass waits for the other ranks, which then must all make it."""
    return engine_kind(accelerator) in ("fsdp", "zero3")


def input_dtype(accelerator: Accelerator, model: nn.Module) -> torch.dtype | None:
    """What images must be cast to before the model, None where the engine casts by itself."""
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        return None
    return next(model.parameters()).dtype


def fit_engine(accelerator: Accelerator, recipe: Recipe) -> None:
    """Refuse what the engine cannot do, and fill a DeepSpeed JSON's open values from the recipe.

    Raises:
        ValueError: The engine is none that the loop knows, the recipe asks for what it cannot do, or the JSON
            contradicts the recipe.
    """
    kind = engine_kind(accelerator)
    if kind == "ddp" and accelerator.distributed_type not in _PLAIN:
        raise ValueError(
            f"launch/train.py was started under {accelerator.distributed_type.value}; it runs in one process and "
            "under DDP, FSDP and DeepSpeed: see configs/accelerate"
        )
    if recipe.ema_decay is not None and kind in ("fsdp", "zero3"):
        raise ValueError(
            f"ema_decay={recipe.ema_decay} averages whole weights, and {kind} shards them; set ema_decay to null, or "
            "use DDP or ZeRO 0 to 2"
        )
    if chosen(recipe.optimizer).needs_whole_parameters and kind != "ddp":
        raise ValueError(
            f"optimizer.name={recipe.optimizer.name!r} needs whole parameters, and {kind} does not give them: use DDP"
        )
    if recipe.precision.mixed == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "precision.mixed='fp16' needs a GPU; this run is on a CPU, where Accelerate would train in float32: set "
            "precision.mixed to bf16 or no"
        )
    check_graph(accelerator, recipe)
    if kind.startswith("zero"):
        _fit_deepspeed(accelerator.deepspeed_plugin.deepspeed_config, accelerator, recipe)


def check_model(accelerator: Accelerator, recipe: Recipe, model: nn.Module) -> None:
    """Refuse a model that torch cannot run under the engine.

    Raises:
        ValueError: Batch normalisation on a CPU under an engine that casts its weights and not its running statistics.
    """
    kind = engine_kind(accelerator)
    fsdp2 = kind == "fsdp" and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2
    low, on_cpu = accelerator.mixed_precision, accelerator.device.type == "cpu"
    if not ((fsdp2 or kind.startswith("zero")) and on_cpu and low != "no"):
        return
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(
            f"precision.mixed={low!r}: model.name={recipe.model.name!r} normalises batches, which torch does on a CPU "
            f"with float32 weights alone, and {'FSDP2' if fsdp2 else kind} casts them; on a CPU set "
            "precision.mixed to no, or use DDP or FSDP1"
        )


def _fit_deepspeed(config: dict[str, Any], accelerator: Accelerator, recipe: Recipe) -> None:
    from robust_dist.engines.deepspeed import check_config, register

    register()
    # Of a key that stands twice Accelerate has kept the last without a word.
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if os.path.isfile(named):
        read_json(named)
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        # Else Accelerate puts DeepSpeedCPUAdam in the place of the recipe's optimizer.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    check_config(config, auto=True)
    _drop_named(config, "optimizer", recipe.optimizer.name, _optimizer_params(recipe))
    _drop_named(config, "scheduler", "RobustSchedule", _schedule_params(recipe))
    ranks = accelerator.num_processes
    micro = max(1, recipe.batch_size // (ranks * recipe.accumulation))
    _fill(config, "gradient_accumulation_steps", recipe.accumulation, "accumulation")
    _fill(config, "gradient_clipping", recipe.optimizer.clip_norm or 0.0, "optimizer.clip_norm")
    _fill(config, "train_micro_batch_size_per_gpu", micro, f"batch_size={recipe.batch_size} on {ranks} ranks")
    _fill(config, "train_batch_size", micro * ranks * recipe.accumulation, f"batch_size={recipe.batch_size}")


def _optimizer_params(recipe: Recipe) -> dict[str, Any]:
    ours = recipe.optimizer
    betas = ours.betas if ours.beta2 is None else (ours.betas[0], ours.beta2)
    return adam_arguments(ours, betas) | {"betas": list(betas)}


def _schedule_params(recipe: Recipe) -> dict[str, Any]:
    return recipe.schedule.arguments | {"cos_min_ratio": recipe.schedule.min_lr_ratio}


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
