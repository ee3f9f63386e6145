"""The recipe: every setting of a run, as one nested dataclass that YAML and the command line fill."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from robust_dist.private import HIDDEN, hidden
from robust_dist.train.data_config import STREAMED, DataConfig
from robust_dist.train.settings import require as _require
from robust_dist.train.settings import require_number as _require_number


@dataclass
class ModelConfig:
    """Which classifier is trained.

    Attributes:
        name: resnet8/20/32/44/56/110, resnet18_cifar, resnet34_cifar, a torchvision model or timm/NAME.
        options: Further keyword arguments of the model's constructor.
        channels_last: Keep images, and weights that no engine shards, in torch.channels_last.
        sync_batchnorm: Normalise over the batches of all ranks (torch.nn.SyncBatchNorm; GPUs only).
    """

    name: str = "resnet20"
    options: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    sync_batchnorm: bool = False


# What the transports and the system count in milliseconds of 32 bits: 23 days.
_MOST_SECONDS = 2_000_000

OptimizerName = Literal[
    "RAdaBeliefW", "nag", "adam", "adamw", "radam", "adabelief", "nadamw", "schedulefree_adamw", "prodigy"
]


@dataclass
class OptimizerConfig:
    """The optimizer's settings (PAPER: betas, eps and weight decay are RAdaBeliefW's defaults).

    Attributes:
        name: RAdaBeliefW; the paper's baselines nag, adam, adamw, radam, adabelief; nadamw (torch's),
            schedulefree_adamw and prodigy (of the extra "study"). robust_dist/train/optimizers.py says what each is.
        lr: Learning rate before the schedule.
        betas: Decay rates of the two moments; nag has only the first, as its momentum.
        beta2: In place of the second of betas: a number, or auto: 1 - max(0.001, beta2_steps/total_steps).
        beta2_steps: What auto divides by the run's optimizer steps.
        eps: Added to the variance every step, and under the root.
        weight_decay: Decoupled decay, until the switch; nag adds it to the gradient, adam has none.
        no_decay: What is not decayed: "bias", "norm" or a part of a parameter's name. The paper decays all.
        clip_norm: Largest norm of the whole gradient; none clips nothing.
        options: Further keyword arguments of the optimizer (prodigy: d_coef, schedulefree_adamw: r, ...). With
            RAdaBeliefW, exp_avg_dtype: bfloat16 keeps the first moment in half the memory, rounded to the nearest, or
            by chance with stochastic_rounding: true (and a seed).
    """

    name: OptimizerName = "RAdaBeliefW"
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    beta2: float | Literal["auto"] | None = None
    beta2_steps: float = 7.5
    eps: float = 1e-8
    weight_decay: float = 0.01
    no_decay: list[str] = field(default_factory=list)
    clip_norm: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_number("optimizer.lr", self.lr, 0)
        _require_number("optimizer.eps", self.eps, 0)
        _require_number("optimizer.weight_decay", self.weight_decay, 0)
        for beta in self.betas:
            _require(0 <= beta < 1, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        if isinstance(self.beta2, (int, float)):
            _require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, 'in [0, 1), "auto" or null')
        _require(0 < self.beta2_steps < math.inf, "optimizer.beta2_steps", self.beta2_steps, "a finite number above 0")
        if self.clip_norm is not None:
            _require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "above 0, or null")


@dataclass
class ScheduleConfig:
    """Learning-rate decay and the weight-decay switch.

    Attributes:
        name: cosine (paper, eq. 17, per step); step: a tenth from 50 % of all steps and a hundredth from 75 % on (the
            paper's baseline); constant.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay_off_at: Share of all steps after which weight decay is 0 (paper: 0.75).
        min_lr_ratio: Where the cosine ends, as a share of the learning rate.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay_off_at: float = 0.75
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _require_number("schedule.warmup_steps", self.warmup_steps, 0)
        _require_number("schedule.weight_decay_off_at", self.weight_decay_off_at, 0, 1)
        _require_number("schedule.min_lr_ratio", self.min_lr_ratio, 0, 1)
        if self.name != "cosine":
            _require(self.min_lr_ratio == 0, "schedule.min_lr_ratio", self.min_lr_ratio, f"0 with name={self.name!r}")


@dataclass
class AugmentConfig:
    """The training pipeline: crop, flip, TrivialAugment, CutMix, in this order.

    Attributes:
        crop: Pixels of padding before the random crop; null takes the data set's own, 0 crops nothing.
        flip: Mirror half of the images; null takes the data set's own (never for digits).
        trivial: TrivialAugment, a draw per sample.
        num_bins: Strengths of TrivialAugment.
        interpolation: nearest or bilinear, for TrivialAugment's warps.
        cutmix: CutMix.
        cutmix_mode: elem (a box and a partner per sample, independent of the world size) or batch (one box).
        cutmix_alpha: Parameter of Beta(alpha, alpha), from which the share is drawn.
        cutmix_p: Probability of CutMix.
        compile: Run the pipeline through torch.compile.
    """

    crop: int | None = None
    flip: bool | None = None
    trivial: bool = True
    num_bins: int = 31
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    cutmix: bool = True
    cutmix_mode: Literal["elem", "batch"] = "elem"
    cutmix_alpha: float = 1.0
    cutmix_p: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.crop is not None:
            _require_number("augment.crop", self.crop, 0)
        _require_number("augment.num_bins", self.num_bins, 2, 65_536)
        _require(0 < self.cutmix_alpha < math.inf, "augment.cutmix_alpha", self.cutmix_alpha, "a finite number above 0")
        _require_number("augment.cutmix_p", self.cutmix_p, 0, 1)


@dataclass
class PrecisionConfig:
    """Number formats.

    Attributes:
        mixed: Autocast of the forward pass: no, bf16 or fp16 (fp16 scales the loss, and is refused on a CPU).
        deterministic: Choose kernels that give the same bits every time, so that a resumed run is the same run.
    """

    mixed: Literal["no", "bf16", "fp16"] = "no"
    deterministic: bool = True


@dataclass
class CheckpointConfig:
    """When the run is saved.

    Attributes:
        every_epochs: Save at the end of every so many epochs; the last epoch is always saved.
        every_steps: Also save every so many optimizer steps, in mid-epoch.
        keep: How many of the newest checkpoints stay.
        keep_best: How many of those with the highest eval_accuracy stay beside them.
        background: Stage a checkpoint in the host's memory and write it while training goes on; where it does not fit
            there, training waits as with false.
        staging: Folder of each host to stage in (variables such as $TMPDIR are filled in); null is /dev/shm.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2
    keep_best: int = 0
    background: bool = True
    staging: str | None = None

    def __post_init__(self) -> None:
        _require_number("checkpoint.every_epochs", self.every_epochs, 1)
        _require_number("checkpoint.keep", self.keep, 1)
        _require_number("checkpoint.keep_best", self.keep_best, 0)
        if self.every_steps is not None:
            _require_number("checkpoint.every_steps", self.every_steps, 1)


@dataclass
class TrackingConfig:
    """What is shown and recorded beside `metrics.jsonl`.

    Attributes:
        trackers: Accelerate's trackers: tensorboard, wandb, mlflow, trackio, ...
        project: The trackers' project (MLflow: experiment; TensorBoard: a folder under `trackers/`).
        options: Further keyword arguments of a tracker's start, by its name: {wandb: {entity: us}}.
        progress: A progress bar on the main process.
        peak_tflops: What one device does at most, for MFU; null takes a known GPU's data sheet, and no MFU elsewhere.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "robust_dist"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: bool = True
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        _require(bool(self.project), "tracking.project", self.project, "a name")
        place = PurePath(self.project)
        inside = ".." not in place.parts and not ("tensorboard" in self.trackers and place.is_absolute())
        _require(inside, "tracking.project", self.project, "a name, or a path below the run's folder")
        for name, given in self.options.items():
            wanted = "of one of tracking.trackers"
            _require(name in self.trackers, f"tracking.options.{name}", hidden(given, name), wanted)
            _require(isinstance(given, dict), f"tracking.options.{name}", hidden(given, name), "a mapping of options")
        if self.peak_tflops is not None:
            fits = 0 < self.peak_tflops < math.inf
            _require(fits, "tracking.peak_tflops", self.peak_tflops, "a finite number above 0, or null")


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        data: The images.
        model: The classifier.
        optimizer: RAdaBeliefW, or what it is compared with.
        schedule: Learning rate and decay over the run.
        augment: What is done to training images.
        precision: Number formats.
        checkpoint: When the run is saved.
        tracking: What is shown.
        epochs: Passes over the training images.
        batch_size: Global batch: images per optimizer step over all ranks and accumulated parts.
        accumulation: Parts into which a rank cuts its share of a batch.
        micro_batch_size: Most images that a rank holds at once: accumulation is then computed from it and the number of
            ranks at every start, and batch_size stays. Null leaves accumulation as it is.
        label_smoothing: Share of the target spread over all classes (paper: 0).
        ema_decay: Evaluate an exponential moving average of the weights; null (paper) evaluates the weights.
        cuda_graph: Replay a whole optimizer step (augmentation, forward and backward pass, clipping, update) as one
            CUDA graph, with the same numbers. For one process on one GPU, without accumulation.
        seed: Seed of the initial weights, the order and every draw.
        run_dir: The folder of the run; the same command on the same folder goes on where it stopped.
        num_processes: Ranks that must be there; any number where null.
        timeout_seconds: How long a rank waits for the others (a download among them) before it gives up; a step, a
            batch of evaluation or a checkpoint must take less.
        profile: Write a torch.profiler trace of a few steps into the run's folder: true, or [steps to skip, steps].
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    epochs: int = 300
    batch_size: int = 128
    accumulation: int = 1
    micro_batch_size: int | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    cuda_graph: bool = False
    seed: int = 0
    run_dir: str = "runs/run"
    num_processes: int | None = None
    timeout_seconds: float = 600.0
    profile: bool | tuple[int, int] = False

    def __post_init__(self) -> None:
        self.run_dir = os.path.expanduser(self.run_dir)
        wanted = "a folder, below a home that is there where it begins with ~"
        _require(bool(self.run_dir) and not self.run_dir.startswith("~"), "run_dir", self.run_dir, wanted)
        _require_number("epochs", self.epochs, 1)
        _require_number("batch_size", self.batch_size, 1)
        _require_number("accumulation", self.accumulation, 1)
        if self.micro_batch_size is not None:
            _require_number("micro_batch_size", self.micro_batch_size, 1)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        if self.ema_decay is not None:
            _require(0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1), or null")
        _require_number("seed", self.seed, 0, 2**63 - 1)
        if self.num_processes is not None:
            _require_number("num_processes", self.num_processes, 1)
        _require_number("timeout_seconds", self.timeout_seconds, 1, _MOST_SECONDS)
        self._check_crop()
        if not isinstance(self.profile, bool):
            fits = self.profile[0] >= 1 and self.profile[1] >= 1
            _require(fits, "profile", self.profile, "true, false or [steps to skip, steps], both at least 1")

    def _check_crop(self) -> None:
        """Refuse padding that leaves next to nothing of an image."""
        if not self.augment.crop:
            return
        from robust_dist.data import DATASETS

        # An unknown name is told where the set is opened.
        named = DATASETS.get(self.data.name)
        side = named.size if named else self.data.size if self.data.name in STREAMED else None
        if side is not None:
            wanted = f"at most {2 * side}, twice the side of the images of data.name={self.data.name}"
            _require(self.augment.crop <= 2 * side, "augment.crop", self.augment.crop, wanted)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of plain YAML values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return {key: plain(value) for key, value in asdict(recipe).items()}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; an empty dict leaves no key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# Settings that may change between two starts of one run: they move no weight by more than rounding.
FREE = (
    *("run_dir", "num_processes", "timeout_seconds", "checkpoint.", "tracking.", "profile", "data.root"),
    *("data.download", "data.workers", "data.prefetch", "data.max_bad_share", "data.index_dir", "data.spool_dir"),
    *("data.keep_on", "data.own_files", "cuda_graph"),
    *("accumulation", "micro_batch_size"),
)


def conflicts(ours: dict[str, Any], theirs: dict[str, Any], where: str = "the folder") -> list[str]:
    """Settings that differ between two recipes and change the result, one line each.

    Args:
        ours: `recipe_dict` of the run that starts.
        theirs: `recipe_dict` of the run that the folder holds; keys that an older version did not have
            count as their defaults.
        where: What holds it, for the lines.
    """
    defaults = flatten(recipe_dict(Recipe()))
    here, there = flatten(hidden(ours)), defaults | flatten(hidden(theirs))
    keys = sorted(k for k in here.keys() | there.keys() if not k.startswith(FREE))
    # No file tells which secret a run had, and the next start may have it from the environment.
    keys = [k for k in keys if HIDDEN not in (here.get(k), there.get(k))]
    missing = "(not set)"
    return [
        f"{key}: {here.get(key, missing)!r} here, {there.get(key, missing)!r} in {where}"
        for key in keys
        if here.get(key, missing) != there.get(key, missing)
    ]


def parse_recipe(args: Sequence[str] | None = None) -> Recipe:
    """A recipe from a command line: `--config FILE.yaml` and `--optimizer.lr 0.05`-like overrides.

    A recipe is data: nothing that it says is imported or called.

    Args:
        args: Command-line words; `sys.argv` where None.

    Raises:
        SystemExit: An unknown key, an empty one or a wrong type; the message names the key, and the file's line.
        ValueError: A file that is no recipe (a key twice, no YAML, ...), options that name code to run, or a value out
            of its range.
    """
    from robust_dist.train.command_line import parse

    return cast(Recipe, parse(Recipe, args))


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file, with the defaults for what it leaves out."""
    return parse_recipe(["--config", str(path)])
