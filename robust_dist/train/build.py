"""From a recipe to a run's engine, model, optimizer and pipeline, and whether they fit together."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from torch.func import functional_call
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from robust_dist import own_code
from robust_dist.augment import RobustAugment
from robust_dist.documents import DocumentError
from robust_dist.engines.accelerate import make_accelerator
from robust_dist.engines.engine import BATCH_NORMS, RunSettings, engine_of
from robust_dist.models.registry import check_output, own_model
from robust_dist.models.weights import head_of
from robust_dist.optim import param_groups
from robust_dist.ranks.claim import host_id
from robust_dist.schedule import RobustSchedule
from robust_dist.schedule.curve import OwnDecay
from robust_dist.train.augment_config import own_stage
from robust_dist.train.folder import RunFolder
from robust_dist.train.graph import check_graph
from robust_dist.train.keys import flatten, keys_of, recipe_dict
from robust_dist.train.optimizers import (
    OptimizerConfig,
    adam_arguments,
    check_fits,
    chosen,
    decay_of,
    make_optimizer,
    own_choice,
)
from robust_dist.train.recipe import Recipe
from robust_dist.train.sources import check_own_data, preprocessing_of

# Number of steps at which a user's schedule is tried.
TRIED = 1000
_SCHEME = "robust-dist"
_meetings = itertools.count()
# Functions that autocast runs in the lower dtype and that may take images first; then those that only reshape images.
_CASTING = frozenset(("conv1d", "conv2d", "conv3d", "linear", "matmul", "addmm", "mm"))
_VIEWING = frozenset(("flatten", "view", "reshape", "contiguous", "permute", "transpose", "unflatten", "squeeze"))
_ASKING = frozenset(
    ("size", "dim", "stride", "is_contiguous", "shape", "ndim", "requires_grad", "device", "is_floating_point")
)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The engine of the run; an EngineError for a configuration with GPUs or ranks that do not exist."""
    torch.backends.cudnn.deterministic = recipe.precision.deterministic
    torch.backends.cudnn.benchmark = not recipe.precision.deterministic
    return make_accelerator(
        mixed_precision=recipe.precision.mixed,
        accumulation=recipe.accumulation,
        folder=recipe.run_dir,
        timeout=timedelta(seconds=recipe.timeout_seconds),
        init_method=init_method(),
    )


def build_augment(
    recipe: Recipe, num_classes: int, *, evaluation: bool = False, dtype: torch.dtype = torch.float32
) -> RobustAugment:
    """The training pipeline, with the data set's own crop and flip if the recipe leaves them open.

    Evaluation uses only its `normalize`. `dtype` is that of the returned images; see `images_dtype`.
    """
    image = preprocessing_of(recipe.data, evaluation=evaluation)
    kept = {"block": recipe.data.block, "channels_last": recipe.model.channels_last}
    config = replace(recipe.augment, before=[], after=[]) if evaluation else recipe.augment
    return config.build(
        num_classes, image.size, image.mean, image.std, crop=image.crop, flip=image.flip, dtype=dtype, **kept
    )


def build_classifier(recipe: Recipe, num_classes: int, channels: int, *, contiguous: bool = False) -> nn.Module:
    """The model of the recipe; see `ModelConfig.build`. The user's own must return one logit per class."""
    model = recipe.model.build(num_classes, channels, seed=recipe.seed, contiguous=contiguous)
    if own_code.is_name(recipe.model.name):
        side = preprocessing_of(recipe.data).size
        check_output("model.name", recipe.model.name, model, (channels, side, side), num_classes)
    return model


def build_optimizer(recipe: Recipe, model: nn.Module, total_steps: int, *, num_classes: int | None = None) -> Optimizer:
    """The recipe's optimizer over the parameters of a model not yet wrapped by an engine.

    `total_steps` is for the whole run (for `optimizer.beta2: auto`); `num_classes` determines which layer is the head.
    """
    check_fits(recipe)
    decay = decay_of(recipe.optimizer, total_steps)
    groups = param_groups(model, decay, no_decay=tuple(recipe.optimizer.no_decay))
    if recipe.optimizer.head_lr_mult != 1:
        groups = _with_head_apart(groups, model, recipe.optimizer, num_classes)
    return make_optimizer(recipe.optimizer, groups, total_steps)


def _with_head_apart(
    groups: list[dict[str, Any]], model: nn.Module, config: OptimizerConfig, num_classes: int | None
) -> list[dict[str, Any]]:
    """The groups without the head's parameters, then the head's with its own rate; never an empty group."""
    names = head_of(model, num_classes)
    head = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    assert config.lr != "auto"  # check_fits
    rate = config.lr * config.head_lr_mult
    body, heads = (
        [group | {"params": [p for p in group["params"] if (id(p) in head) == is_head]} for group in groups]
        for is_head in (False, True)
    )
    found = [group for group in body if group["params"]], [group | {"lr": rate} for group in heads if group["params"]]
    if not all(found):
        what = "no linear layer with as many outputs as classes" if not names else "nothing but its head"
        raise ValueError(
            f"optimizer.head_lr_mult={config.head_lr_mult} needs a head with trainable parameters of its own, but the "
            f"model has {what}; set it to 1"
        )
    return [*found[0], *found[1]]


def build_schedule(recipe: Recipe, optimizer: Optimizer, total_steps: int) -> RobustSchedule:
    """Learning rate and weight decay of every step.

    Raises:
        ValueError: The optimizer, which may be the user's own, takes no learning rate, and the schedule changes it.
    """
    arguments = recipe.schedule.arguments
    if own_code.is_name(recipe.schedule.name):
        arguments["decay"] = own_decay(recipe.schedule.name, total_steps)
    try:
        return RobustSchedule(optimizer, total_steps, **arguments)
    except own_code.OwnCodeError:
        raise
    except ValueError as error:
        section = recipe.schedule
        raise ValueError(
            f"schedule.name={section.name!r} with schedule.warmup_steps={section.warmup_steps}: {error}"
        ) from error


def own_decay(name: str, total_steps: int) -> OwnDecay:
    """The schedule named as `module:Name`: from a step (from 0) and the total to the fraction of the base rate.

    Raises:
        OwnCodeError: It cannot be imported, is not a function of two numbers, or returns an invalid fraction.
    """
    key = "schedule.name"
    made = own_code.load(key, name)
    if isinstance(made, type) or not callable(made):
        wanted = "a function of step and total_steps that returns the fraction of the learning rate"
        raise own_code.wrong(key, name, made, wanted)
    for step in range(0, total_steps, -(-total_steps // TRIED)):
        share = own_code.call(key, name, made, step, total_steps)
        if not isinstance(share, (int, float)) or not 0 <= share < math.inf:
            raise own_code.OwnCodeError(
                f"{key}={name!r} returns {share!r} at step {step} of {total_steps}; it must be finite and at least 0"
            )
    decay: OwnDecay = made
    return decay


def init_method() -> str | None:
    """The init_method for `init_process_group`; None if no torch launcher started this rank.

    torch's static rendezvous (the default of `torchrun` and `accelerate launch`) keeps one store over all restarts,
    with gloo's and NCCL's addresses in it: restarted ranks then wait for dead ones (observed with torch 2.14).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # A second run in this process finds it registered.
    with contextlib.suppress(RuntimeError):
        register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://"


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """Like "env://", in a part of the store unused by earlier attempts."""
    for store, rank, world_size in rendezvous(url.replace(_SCHEME, "env", 1), timeout=timeout, **options):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # A store that remembers an earlier attempt of this launcher is shared by all its attempts.
        mine = f"robust_dist/{host_id()}/{os.getppid()}/{os.environ.get('LOCAL_RANK', '0')}"
        first = store.compare_set(mine, "", attempt).decode()
        part = store if first == attempt else PrefixStore(f"attempt-{attempt}", store)
        # A group that this process closed has left its keys in the store.
        number = next(_meetings)
        yield (PrefixStore(f"meeting-{number}", part) if number else part), rank, world_size


def fit_engine(accelerator: Accelerator, recipe: Recipe) -> None:
    """Reject what the engine cannot do, and complete its configuration from the recipe.

    Raises:
        EngineError: The engine is unknown.
        ValueError: The engine cannot do what the recipe asks for, or its configuration contradicts the recipe.
    """
    engine = engine_of(accelerator)
    if recipe.ema_decay is not None and engine.shards_weights:
        raise ValueError(
            f"ema_decay={recipe.ema_decay} averages whole weights, but {engine.kind} shards them; set ema_decay to "
            "null, or use DDP or ZeRO 0 to 2"
        )
    if chosen(recipe.optimizer).needs_whole_parameters and not engine.steps_whole_parameters:
        raise ValueError(
            f"optimizer.name={recipe.optimizer.name!r} needs whole parameters, which {engine.kind} does not provide: "
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
    """Reject batch normalisation on a CPU under an engine that casts its weights but not its running statistics."""
    engine, low = engine_of(accelerator), accelerator.mixed_precision
    if accelerator.device.type != "cpu" or low == "no" or not engine.casts_batch_norm(accelerator):
        return
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise ValueError(
            f"precision.mixed={low!r}: model.name={recipe.model.name!r} normalises batches, which torch does on a CPU "
            f"only with float32 weights, but {engine.title(accelerator)} casts them; on a CPU set "
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


def fit_ranks(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with the accumulation that `micro_batch_size` needs on these ranks, also set in the engine.

    Raises:
        ValueError: `micro_batch_size` is smaller than a block, or contradicts `accumulation`.
    """
    if recipe.micro_batch_size is None:
        return recipe
    needed = accumulation_for(recipe, accelerator.num_processes)
    if recipe.accumulation not in (1, needed):
        raise ValueError(
            f"accumulation={recipe.accumulation} contradicts micro_batch_size={recipe.micro_batch_size}, which gives "
            f"{needed} for batch_size={recipe.batch_size} on {accelerator.num_processes} ranks; set one of the two"
        )
    accelerator.gradient_accumulation_steps = needed
    return replace(recipe, accumulation=needed)


def accumulation_for(recipe: Recipe, num_processes: int) -> int:
    """The smallest number of parts of a rank's share of a batch with at most `micro_batch_size` images each."""
    most, block = recipe.micro_batch_size, recipe.data.block
    assert most is not None
    if most < min(block, recipe.batch_size):
        raise ValueError(
            f"micro_batch_size={most} is smaller than data.block={block}, which is never cut; set micro_batch_size to "
            f"{block} or more, or data.block to {most} or less"
        )
    share = -(-_blocks(recipe) // num_processes)
    return -(-share // max(1, most // block))


def largest_part(recipe: Recipe, num_processes: int) -> int:
    """The largest number of images that a rank holds at once."""
    share = -(-_blocks(recipe) // num_processes)
    return min(-(-share // recipe.accumulation) * recipe.data.block, recipe.batch_size)


def _blocks(recipe: Recipe) -> int:
    return -(-recipe.batch_size // recipe.data.block)


def images_dtype(mixed: str, model: nn.Module, channels: int, size: int) -> torch.dtype:
    """The dtype of training images: bfloat16 under bf16 autocast if that changes no bit, else float32.

    A convolution or matrix product under autocast casts its input first, so an image written in bfloat16 gives the same
    result with a fifth of the bytes. A model that first adds, scales or normalises images gets float32. The model
    (whole, not wrapped) is run on the meta device, on one image of `channels` x `size` x `size`.
    """
    if mixed != "bf16" or not _casts_first(model, torch.empty(1, channels, size, size, device="meta")):
        return torch.float32
    return torch.bfloat16


class _Uses(TorchFunctionMode):
    """Detects whether images reach anything but a function that casts them."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.cast, self.otherwise = [images], False, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and record what it does with the images."""
        result = func(*args, **(kwargs or {}))
        if any(one is image for one in _flat([args, kwargs or {}]) for image in self.images):
            self._note(_name(func), result)
        return result

    def _note(self, name: str, result: Any) -> None:
        if name in _CASTING:
            self.cast = True
        elif name in _VIEWING and isinstance(result, Tensor):
            self.images.append(result)
        elif name not in _ASKING:
            self.otherwise = True


def _flat(given: Any) -> Iterator[Any]:
    """All values in nested arguments."""
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _flat(one)
    elif isinstance(given, dict):
        yield from _flat(list(given.values()))
    else:
        yield given


def _name(func: Callable[..., Any]) -> str:
    """A function's name; for a property's getter, the property's."""
    name = func.__name__
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _casts_first(model: nn.Module, images: Tensor) -> bool:
    """Whether a model only casts its images; False if it does not run on the meta device."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = {module: module.training for module in model.modules()}
    # In evaluation mode one image is enough for batch normalisation.
    model.eval()
    try:
        with torch.no_grad(), _Uses(images) as uses:
            functional_call(model, tensors, (images,))
    except Exception:
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return uses.cast and not uses.otherwise


def own_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys and values of a recipe that have the form `module:Name`."""
    values, kind = flatten(recipe_dict(recipe)), cast(type, type(recipe))
    for key in sorted(keys_of(kind).names_code):
        found = values[key] if isinstance(values[key], list) else [values[key]]
        yield from ((key, value) for value in found if own_code.is_name(value))


def check_own(recipe: Recipe) -> None:
    """Import the user's own code named in a recipe, and check that it fits its key.

    Raises:
        OwnCodeError: Names the key, the value and what would be right.
    """
    for key, value in own_names(recipe):
        if key == "model.name":
            own_model(value)
        elif key == "optimizer.name":
            own_choice(value)
        elif key == "schedule.name":
            own_decay(value, TRIED)
        elif key == "data.name":
            check_own_data(recipe.data)
        else:
            own_stage(key, value)


def own_sources(recipe: Recipe) -> dict[str, dict[str, str]]:
    """File and SHA-256 of the source of each `module:Name`, by key and name."""
    found = {}
    for key, value in own_names(recipe):
        file, digest = own_code.source_of(value)
        found[f"{key}={value}"] = {"file": file, "sha256": digest}
    return found


def changed_sources(folder: RunFolder, here: dict[str, dict[str, str]]) -> list[str]:
    """Warnings about the user's own code that has changed since the run's last start."""
    try:
        starts: list[dict[str, Any]] = folder.starts()
    except DocumentError:
        return []
    there = (starts[-1].get("own_code") or {}) if starts else {}
    return [
        f"{name}: {now['file']} has changed since this run was last started; it continues with the current file"
        for name, now in here.items()
        if there.get(name, now)["sha256"] != now["sha256"]
    ]
