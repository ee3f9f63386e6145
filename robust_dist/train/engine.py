"""Whether the engine can do what the recipe asks."""

from accelerate import Accelerator
from torch import nn

from robust_dist.engines.engine import BATCH_NORMS, RunSettings, engine_of
from robust_dist.train.graph import check_graph
from robust_dist.train.optimizers import adam_arguments, chosen
from robust_dist.train.recipe import Recipe


def fit_engine(accelerator: Accelerator, recipe: Recipe) -> None:
    """Refuse what the engine cannot do, and complete its own configuration from the recipe.

    Raises:
        EngineError: The engine is none that is known here.
        ValueError: The recipe asks for what the engine cannot do, or the engine's configuration contradicts it.
    """
    engine = engine_of(accelerator)
    if recipe.ema_decay is not None and engine.shards_weights:
        raise ValueError(
            f"ema_decay={recipe.ema_decay} averages whole weights, and {engine.kind} shards them; set ema_decay to "
            "null, or use DDP or ZeRO 0 to 2"
        )
    if chosen(recipe.optimizer).needs_whole_parameters and not engine.steps_whole_parameters:
        raise ValueError(
            f"optimizer.name={recipe.optimizer.name!r} needs whole parameters, and {engine.kind} does not give them: "
            "use DDP"
        )
    if recipe.precision.mixed == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "precision.mixed='fp16' needs a GPU; this run is on a CPU, where Accelerate would train in float32: set "
            "precision.mixed to bf16 or no"
        )
    check_graph(accelerator, recipe)
    engine.fit(accelerator, _settings(recipe))


def check_model(accelerator: Accelerator, recipe: Recipe, model: nn.Module) -> None:
    """Refuse a model that torch cannot run under the engine.

    Raises:
        ValueError: Batch normalisation on a CPU under an engine that casts its weights and not its running statistics.
    """
    engine, low = engine_of(accelerator), accelerator.mixed_precision
    if accelerator.device.type != "cpu" or low == "no" or not engine.casts_batch_norm(accelerator):
        return
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise ValueError(
            f"precision.mixed={low!r}: model.name={recipe.model.name!r} normalises batches, which torch does on a CPU "
            f"with float32 weights alone, and {engine.title(accelerator)} casts them; on a CPU set "
            "precision.mixed to no, or use DDP or FSDP1"
        )


def _settings(recipe: Recipe) -> RunSettings:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    betas = optimizer.betas if optimizer.beta2 is None else (optimizer.betas[0], optimizer.beta2)
    return RunSettings(
        optimizer=optimizer.name,
        optimizer_params=adam_arguments(optimizer, betas) | {"betas": list(betas)},
        schedule_params=schedule.arguments,
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        clip_norm=optimizer.clip_norm,
    )
