"""The recipe: every setting of a run, as one nested dataclass filled from YAML and the command line."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, cast

import torch
from torch import nn

from robust_dist.own_code import check_form, is_name
from robust_dist.private import HIDDEN, hidden
from robust_dist.schedule.curve import DECAYS
from robust_dist.train.augment_config import AugmentConfig
from robust_dist.train.data_config import DataConfig
from robust_dist.train.keys import (
    COSTLY,
    FREE,
    NAMES_CODE,
    flatten,
    keys_of,
    recipe_dict,
    require,
    require_number,
    values_of,
)
from robust_dist.train.metrics import EarlyStoppingConfig
from robust_dist.train.optimizers import OptimizerConfig
from robust_dist.train.parse import parse

# Constructor arguments of a model that the run itself provides.
_GIVEN = {
    **dict.fromkeys(("pretrained", "weights", "pretrained_cfg", "checkpoint_path"), "use model.weights"),
    **dict.fromkeys(("num_classes", "in_channels", "in_chans"), "it follows from the data"),
    "name": "use model.name",
    "model_name": "use model.name",
}
__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "Recipe",
    "ScheduleConfig",
    "TrackingConfig",
    "conflicts",
    "flatten",
    "load_recipe",
    "parse_recipe",
    "recipe_dict",
]
# 23 days: transports and the system count milliseconds in 32 bits.
_MOST_SECONDS = 2_000_000


@dataclass
class ModelConfig:
    """The classifier.

    Attributes:
        name: resnet8/20/32/44/56/110, resnet18_cifar, resnet34_cifar, a torchvision model or timm/NAME; or your own
            class, or function of the number of classes, as MODULE:NAME.
        options: Further keyword arguments of the model's constructor.
        weights: Initial weights of a new run: DEFAULT or a name of torchvision's or timm's weights for this model; or a
            path: a run's folder, an export, a checkpoint, or a .safetensors or .pt file of a state dict. If their
                classes
            differ, the head is new. null draws all weights by the seed.
        channels_last: Keep images, and weights that no engine shards, in torch.channels_last.
        sync_batchnorm: Normalise over the batches of all ranks (torch.nn.SyncBatchNorm; GPUs only).
    """

    name: str = field(default="resnet20", metadata=NAMES_CODE)
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    channels_last: bool = False
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        if is_name(self.name):
            check_form("model.name", self.name)
        refused = [
            f"model.options.{name}={value!r} cannot be set: {_GIVEN[name]}"
            for name, value in self.options.items()
            if name in _GIVEN
        ]
        if refused:
            raise ValueError("; ".join(refused) + "; leave it out")

    def build(self, num_classes: int, channels: int, *, seed: int, contiguous: bool = False) -> nn.Module:
        """The model, with the same initial weights on every rank; `weights` are loaded later (`weights.begin`).

        `contiguous` is for engines that only take contiguous weights; then only images are channels_last.

        Raises:
            ValueError: Unknown model, options that it does not accept, or batch normalisation over ranks on a CPU.
        """
        from robust_dist.models import build_model
        from robust_dist.models.registry import OptionsError
        from robust_dist.models.weights import implied_options

        options = implied_options(self.name, self.weights) | self.options
        torch.manual_seed(seed)
        try:
            model = build_model(self.name, num_classes, in_channels=channels, **options)
        except (OptionsError, RuntimeError) as error:
            if not self.options:
                raise
            raise ValueError(self._of_options(getattr(error, "reason", str(error)))) from error
        if self.sync_batchnorm:
            if not torch.cuda.is_available():
                raise ValueError("model.sync_batchnorm=True needs GPUs (torch.nn.SyncBatchNorm); set it to false")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.channels_last and not contiguous:
            return model.to(memory_format=torch.channels_last)
        return model

    def _of_options(self, reason: str) -> str:
        """A model's words about its options, under the names that the recipe has for them."""
        named = [name for name in self.options if reason.startswith(f"{name}=")]
        settings = ", ".join(f"model.options.{name}={self.options[name]!r}" for name in named or self.options)
        return f"{settings} with model.name={self.name!r}: {reason}"


@dataclass
class ScheduleConfig:
    """Learning-rate schedule and the weight-decay switch.

    Attributes:
        name: cosine (paper, eq. 17, per step); step: a tenth from 50 % of all steps and a hundredth from 75 % on (the
            paper's baseline); constant; or your own function of step and total steps, as MODULE:NAME, which returns the
            fraction of the learning rate after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay_off_at: Fraction of all steps after which weight decay is 0 (paper: 0.75).
        min_lr_ratio: Final value of the cosine, as a fraction of the learning rate.
    """

    name: str = field(default="cosine", metadata=NAMES_CODE)
    warmup_steps: int = 0
    weight_decay_off_at: float = 0.75
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if is_name(self.name):
            check_form("schedule.name", self.name)
        else:
            wanted = f"one of {', '.join(DECAYS)}, or your own function as MODULE:NAME"
            require(self.name in DECAYS, "schedule.name", self.name, wanted)
        require_number("schedule.warmup_steps", self.warmup_steps, 0)
        require_number("schedule.weight_decay_off_at", self.weight_decay_off_at, 0, 1)
        require_number("schedule.min_lr_ratio", self.min_lr_ratio, 0, 1)
        if self.name != "cosine":
            require(self.min_lr_ratio == 0, "schedule.min_lr_ratio", self.min_lr_ratio, f"0 with name={self.name!r}")

    @property
    def arguments(self) -> dict[str, Any]:
        """The section under RobustSchedule's names, as plain values."""
        return values_of(self, ScheduleConfig, "name") | {"decay": self.name}


@dataclass
class PrecisionConfig:
    """Number formats.

    Attributes:
        mixed: Autocast of the forward pass: no, bf16 or fp16 (fp16 scales the loss, and is not allowed on a CPU).
        deterministic: Use kernels that give the same bits every time, so that a resumed run is reproduced exactly.
    """

    mixed: Literal["no", "bf16", "fp16"] = "no"
    deterministic: bool = True


@dataclass
class CheckpointConfig:
    """Checkpoints of the run.

    Attributes:
        every_epochs: Save every this many epochs; the last epoch is always saved.
        every_steps: Also save every this many optimizer steps, in mid-epoch.
        keep: Number of newest checkpoints to keep.
        keep_best: Number of checkpoints with the highest eval_accuracy to keep in addition.
        background: Stage a checkpoint in the host's memory and write it while training continues; if it does not fit
            there, training waits as with false.
        staging: Staging folder on each host (variables such as $TMPDIR are expanded); null is /dev/shm.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2
    keep_best: int = 0
    background: bool = True
    staging: str | None = None

    def __post_init__(self) -> None:
        require_number("checkpoint.every_epochs", self.every_epochs, 1)
        require_number("checkpoint.keep", self.keep, 1)
        require_number("checkpoint.keep_best", self.keep_best, 0)
        if self.every_steps is not None:
            require_number("checkpoint.every_steps", self.every_steps, 1)


@dataclass
class TrackingConfig:
    """Trackers and display, besides `metrics.jsonl`.

    Attributes:
        trackers: Accelerate's trackers: tensorboard, wandb, mlflow, trackio, ...
        project: The trackers' project (MLflow: experiment; TensorBoard: a folder under `trackers/`).
        options: Further keyword arguments for starting a tracker, by its name: {wandb: {entity: us}}.
        progress: Show a progress bar on the main process.
        peak_tflops: Peak performance of one device, for MFU; null uses a known GPU's data sheet, and shows no MFU
            elsewhere.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "robust_dist"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: bool = True
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.project), "tracking.project", self.project, "a name")
        place = PurePath(self.project)
        inside = ".." not in place.parts and not ("tensorboard" in self.trackers and place.is_absolute())
        require(inside, "tracking.project", self.project, "a name, or a path below the run's folder")
        for name, given in self.options.items():
            wanted = "for one of tracking.trackers"
            require(name in self.trackers, f"tracking.options.{name}", hidden(given, name), wanted)
            require(isinstance(given, dict), f"tracking.options.{name}", hidden(given, name), "a mapping of options")
        if self.peak_tflops is not None:
            fits = 0 < self.peak_tflops < math.inf
            require(fits, "tracking.peak_tflops", self.peak_tflops, "a finite number above 0, or null")


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        data: The images.
        model: The classifier.
        optimizer: RAdaBeliefW, or an optimizer to compare it with.
        schedule: Learning rate and weight decay over the run.
        augment: Augmentation of training images.
        precision: Number formats.
        checkpoint: When the run is saved.
        tracking: What is displayed and logged.
        early_stopping: Whether the run may end before its last epoch.
        epochs: Passes over the training images.
        batch_size: Global batch: images per optimizer step over all ranks and micro-batches.
        accumulation: Number of micro-batches into which a rank divides its share of a batch.
        micro_batch_size: Largest number of images that a rank holds at once: accumulation is then computed from it and
            the number of ranks at every start, and batch_size stays. Null leaves accumulation unchanged.
        label_smoothing: Fraction of the target spread over all classes (paper: 0).
        ema_decay: Evaluate an exponential moving average of the weights; null (paper) evaluates the weights.
        cuda_graph: Replay a whole optimizer step (augmentation, forward and backward pass, clipping, update) as one
            CUDA graph, with the same numbers. For one process on one GPU, without accumulation.
        seed: Seed of the initial weights, the order and every draw.
        init_from: A run's folder, or an export: start from its weights, batch statistics and (if both have one) moving
            average, with a new optimizer and schedule. The classes must be the same; otherwise use model.weights.
        init_checkpoint: The checkpoint to use of the run named by init_from or model.weights: last, best (by logged
            accuracy) or a step.
        run_dir: The folder of the run; the same command on the same folder resumes it.
        num_processes: Required number of ranks; null allows any number.
        timeout_seconds: How long a rank waits for the others (including downloads) before it gives up; a step, an
            evaluation batch or a checkpoint must take less.
        profile: Write a torch.profiler trace of a few steps into the run's folder: true, or [steps to skip, steps].
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig, metadata=COSTLY)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig, metadata=COSTLY)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig, metadata=COSTLY)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=FREE)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig, metadata=FREE)
    epochs: int = 300
    batch_size: int = field(default=128, metadata=COSTLY)
    accumulation: int = field(default=1, metadata=FREE)
    micro_batch_size: int | None = field(default=None, metadata=FREE)
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    cuda_graph: bool = field(default=False, metadata=FREE)
    seed: int = 0
    init_from: str | None = None
    init_checkpoint: str = "last"
    run_dir: str = field(default="runs/run", metadata=FREE)
    num_processes: int | None = field(default=None, metadata=FREE)
    timeout_seconds: float = field(default=600.0, metadata=FREE)
    profile: bool | tuple[int, int] = field(default=False, metadata=FREE)

    def __post_init__(self) -> None:
        self.run_dir = os.path.expanduser(self.run_dir)
        wanted = "a folder, below an existing home if it begins with ~"
        require(bool(self.run_dir) and not self.run_dir.startswith("~"), "run_dir", self.run_dir, wanted)
        require_number("epochs", self.epochs, 1)
        require_number("batch_size", self.batch_size, 1)
        require_number("accumulation", self.accumulation, 1)
        if self.micro_batch_size is not None:
            require_number("micro_batch_size", self.micro_batch_size, 1)
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        if self.ema_decay is not None:
            require(0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1), or null")
        require_number("seed", self.seed, 0, 2**63 - 1)
        if self.num_processes is not None:
            require_number("num_processes", self.num_processes, 1)
        self._check_start()
        require_number("timeout_seconds", self.timeout_seconds, 1, _MOST_SECONDS)
        self._check_crop()
        if not isinstance(self.profile, bool):
            fits = self.profile[0] >= 1 and self.profile[1] >= 1
            require(fits, "profile", self.profile, "true, false or [steps to skip, steps], both at least 1")

    def _check_start(self) -> None:
        """Reject two sources of initial weights, and a checkpoint without a source."""
        weights, source = self.model.weights, self.init_from
        require(source != "", "init_from", source, "a run's folder, or null")
        wanted = f"left out with model.weights={weights!r}, or set that to null"
        require(source is None or weights is None, "init_from", source, wanted)
        fits = self.init_checkpoint in ("last", "best") or self.init_checkpoint.isdigit()
        require(fits, "init_checkpoint", self.init_checkpoint, "last, best or a step")
        named = source is not None or weights is not None or self.init_checkpoint == "last"
        require(named, "init_checkpoint", self.init_checkpoint, "last, as neither init_from nor model.weights is set")

    def _check_crop(self) -> None:
        """Reject padding that leaves next to nothing of an image."""
        # The size of the user's own data is known only when they are read.
        if not self.augment.crop or is_name(self.data.name):
            return
        from robust_dist.data import DATASETS

        # An unknown name is reported when the set is opened.
        named = DATASETS.get(self.data.name)
        side = named.size if named else self.data.size if self.data.source else None
        if side is not None:
            wanted = f"at most {2 * side}, twice the side of the images of data.name={self.data.name}"
            require(self.augment.crop <= 2 * side, "augment.crop", self.augment.crop, wanted)


def conflicts(
    ours: dict[str, Any], theirs: dict[str, Any], where: str = "the folder", kind: type = Recipe
) -> list[str]:
    """Settings that differ between two recipes and change the result, one per line.

    Args:
        ours: `recipe_dict` of the run being started.
        theirs: `recipe_dict` of what `where` names; keys that an older version did not have count as their defaults.
        where: For the lines.
        kind: The class of the recipe being started.
    """
    defaults = flatten(recipe_dict(kind()))
    known = keys_of(kind)
    here, there = flatten(hidden(ours)), known.in_our_words(defaults | flatten(hidden(theirs)))
    keys = sorted(k for k in here.keys() | there.keys() if not known.is_free(k))
    # No file records a run's secrets, and the next start may get them from the environment.
    keys = [k for k in keys if HIDDEN not in (here.get(k), there.get(k))]
    missing = "(not set)"
    return [
        f"{key}: {here.get(key, missing)!r} here, {there.get(key, missing)!r} in {where}"
        for key in keys
        if here.get(key, missing) != there.get(key, missing)
    ]


def parse_recipe(args: Sequence[str] | None = None, kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from a command line: `--config FILE.yaml`, and overrides such as `--optimizer.lr 0.05`.

    Reading it imports and calls nothing. The run that it starts imports what it names as `module:Name`, if that is the
    user's own code (`robust_dist.own_code`) or in a module allowed by `--import MODULE`.

    Args:
        args: Command-line words; None: `sys.argv`.
        kind: The recipe's class.

    Raises:
        SystemExit: An unknown or empty key or a wrong type; the message names it, and the file's line.
        ValueError: A file that is not a recipe, options that name code to run, or a value out of range.
    """
    return cast(Recipe, parse(kind, args))


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, with defaults for what it leaves out."""
    return parse_recipe(["--config", str(path)])
