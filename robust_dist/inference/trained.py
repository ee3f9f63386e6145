"""A trained model and its preprocessing, read from a run's folder or from what `robust-dist export` wrote."""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from robust_dist.augment import RobustAugment
from robust_dist.checkpoint.layout import kinds_in
from robust_dist.checkpoint.store import ACCURACY
from robust_dist.data.decode import as_rgb, decode_rgb, resize_center_crop, to_tensor
from robust_dist.data.errors import BadImageError
from robust_dist.data.registry import DATASETS
from robust_dist.data.source import Upright, turns_upright
from robust_dist.documents import Document, DocumentError, read_json, read_yaml, typed
from robust_dist.engines.engine import BATCH_NORMS, UNNOTED, engine_named
from robust_dist.own_code import OwnCodeError, is_name
from robust_dist.train.data_config import DataConfig
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import OWN
from robust_dist.train.parse import Settings
from robust_dist.train.recipe import Recipe
from robust_dist.train.sources import preprocessing_of
from robust_dist.train.weights import (
    RECORD,
    WEIGHTS,
    check_evaluated,
    choose,
    data_of,
    evaluated_weights,
    mismatches,
    run_of,
    why_none,
)

ImageLike = str | os.PathLike[str] | Image.Image | Tensor
Own = nn.Module | Callable[[int], nn.Module]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Sections that a trained model does not need; packages that they name need not be installed.
_FOR_TRAINING = ("optimizer", "schedule", "tracking", "checkpoint")


@dataclass(frozen=True)
class Pixels:
    """How an image becomes a model's input.

    Attributes:
        size: Height and width of the input, pixels.
        resize: The shorter side before the central crop; None takes an image of `size` as it is, and makes
            the shorter side of any other `size`.
        mean: Each channel's mean, on the scale 0 to 1.
        std: Each channel's standard deviation.
        upright: Whether images are rotated by their EXIF orientation.
        channels_last: Whether batches are in torch.channels_last.
    """

    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upright: bool = False
    channels_last: bool = False


def pixels_of(data: DataConfig, channels_last: bool) -> Pixels:
    """The preprocessing used in a recipe's evaluation."""
    image = preprocessing_of(data, evaluation=True)
    resize = data.eval_sides[1] if data.streamed else None
    upright = data.source is not None and turns_upright(str(data.exif), auto=data.name == "hub")
    return Pixels(image.size, resize, tuple(image.mean), tuple(image.std), upright, channels_last)


def is_own(data: DataConfig) -> bool:
    """Whether a run's images were the user's own, and so described by `data.json`; imports nothing."""
    return is_name(data.name) or (data.name not in DATASETS and data.source is None)


def pixels_noted(record: dict[str, Any], data: DataConfig, channels_last: bool) -> Pixels:
    """The preprocessing used in a run's evaluation, from its `data.json`."""
    noted: _Noted = typed(record.get("preprocessing"), _Noted, "data.json: preprocessing")
    upright = turns_upright(str(data.exif), auto=False)
    return Pixels(noted.eval_size, noted.eval_resize, noted.mean, noted.std, upright, channels_last)


@dataclass
class _Noted:
    """The preprocessing in `data.json`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_size: int
    eval_resize: int | None = None


class Preprocess:
    """Decode, resize, crop, normalise: an image to float32 [3, size, size].

    Args:
        classes: Names of the classes, by number.
        pixels: The settings.
    """

    def __init__(self, classes: tuple[str, ...], pixels: Pixels) -> None:
        self.classes, self.pixels = classes, pixels
        self.augment = RobustAugment(
            len(classes), pixels.size, pixels.mean, pixels.std, channels_last=pixels.channels_last
        ).eval()

    def __call__(self, image: ImageLike) -> Tensor:
        """One image, ready for `model(...[None])`.

        Args:
            image: A file's path, a PIL image, or uint8 [3, H, W].

        Returns:
            float32 [3, size, size].

        Raises:
            BadImageError: It cannot be decoded; names the file.
            ValueError: A tensor of another dtype or number of channels.
            OSError: The file cannot be read.
        """
        return self.normalize(self.levels(image)[None])[0]

    def levels(self, image: ImageLike) -> Tensor:
        """The image before normalisation, uint8 [3, size, size]."""
        if isinstance(image, Tensor):
            return self._cropped(_of_tensor(image, len(self.pixels.mean)))
        if isinstance(image, Image.Image):
            return self._cropped(as_rgb(image, upright=self.pixels.upright))
        kind = Upright if self.pixels.upright else bytes
        try:
            return self._cropped(decode_rgb(kind(Path(image).read_bytes())))
        except BadImageError as error:
            raise BadImageError(f"{os.fspath(image)}: {error}") from None

    def normalize(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std of uint8 [B, 3, size, size]."""
        return self.augment.normalize(images)

    def to(self, device: torch.device) -> "Preprocess":
        """The same preprocessing for images on another device."""
        self.augment.to(device)
        return self

    def __repr__(self) -> str:
        return f"Preprocess({len(self.classes)} classes, {self.pixels})"

    def _cropped(self, image: Image.Image) -> Tensor:
        size, resize = self.pixels.size, self.pixels.resize
        if resize is None and image.size == (size, size):
            return to_tensor(image)
        return resize_center_crop(image, size, resize or size)


def _of_tensor(image: Tensor, channels: int) -> Image.Image:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
        raise ValueError(
            f"an image must be uint8 [{channels}, H, W], got {str(image.dtype).removeprefix('torch.')} "
            f"{list(image.shape)}"
        )
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


@dataclass(frozen=True)
class Origin:
    """The checkpoint that weights come from.

    Attributes:
        step: Optimizer steps done.
        eval_accuracy: Logged by the run at this step; None within an epoch.
        engine: The kind of the engine that trained it.
        num_processes: Number of ranks.
    """

    step: int
    eval_accuracy: float | None
    engine: str
    num_processes: int


@dataclass(frozen=True)
class Record:
    """The content of `model.json`.

    Attributes:
        robust_dist: The version that wrote it.
        classes: Names of the classes, by number.
        preprocessing: Turns an image into the input.
        checkpoint: The origin of the weights.
        recipe: The run's recipe, without secrets and trackers.
        data: The run's `data.json`: the images for training and evaluation.
    """

    robust_dist: str
    classes: list[str]
    preprocessing: Pixels
    checkpoint: Origin
    recipe: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model with all that is needed to use it.

    Attributes:
        path: The folder from which it was read.
        model: In eval mode, on the CPU, in float32.
        preprocess: Turns an image into its input.
        settings: The recipe, with defaults in the sections on training.
        record: Its `model.json`.
    """

    path: Path
    model: nn.Module
    preprocess: Preprocess
    settings: Recipe
    record: Record

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return self.preprocess.classes

    def evaluating(self, device: torch.device) -> "Evaluating":
        """The forward pass of the run's own evaluation, in the recipe's precision."""
        return Evaluating(self, device)


class Evaluating:
    """The forward pass on a device as under the run's engine: autocast, weights of a lower dtype, or neither."""

    def __init__(self, trained: Trained, device: torch.device) -> None:
        engine, self.device = engine_named(trained.record.checkpoint.engine), device
        low = _DTYPES.get(trained.settings.precision.mixed)
        self.autocast = low if engine.autocasts else None
        self.dtype = low if engine.casts_weights else None
        model = trained.model
        if self.dtype is not None:
            model = _cast(copy.deepcopy(model), self.dtype)
        self.model = model.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of normalised images on the device."""
        scope: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            scope = torch.autocast(self.device.type, dtype=self.autocast)
        with torch.no_grad(), scope:
            logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with weights of a lower dtype, except those of batch normalisation, which FSDP1 keeps."""
    for module in model.modules():
        if not isinstance(module, BATCH_NORMS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


def load(path: str | Path, **options: Any) -> tuple[nn.Module, Preprocess]:
    """See `robust_dist.load`."""
    trained = read(path, **options)
    return trained.model, trained.preprocess


def read(
    path: str | Path, *, checkpoint: str | int = "last", model: Own | None = None, kind: type[Recipe] = Recipe
) -> Trained:
    """The model of a run, or of an export.

    Args:
        path: The folder.
        checkpoint: For a run: "last", "best" (of the existing checkpoints, by logged accuracy), or a step.
        model: For a run whose model was given to `fit`: the module, or the function of the number of classes. A module
            is filled with the weights and put into eval mode.
        kind: The recipe's class, for a run with a recipe class of your own.

    Raises:
        ValueError: There is no run and no export; no checkpoint, or a torn one; weights that are not the model's; or
            weights that were never evaluated and cannot be made so without training data.
    """
    folder = Path(path).expanduser()
    if (folder / RECORD).is_file():
        if checkpoint != "last":
            raise ValueError(f"{folder} is an export of one checkpoint: leave checkpoint={checkpoint!r} out")
        return _read_export(folder, model, kind)
    if (folder / "recipe.yaml").is_file():
        return _read_run(folder, checkpoint, model, kind)
    raise ValueError(f"{folder}: {why_none(folder)}")


def is_bare_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint that does not belong to a run of ours."""
    folder = Path(path).expanduser()
    known = (folder / RECORD).is_file() or run_of(folder) is not None
    return folder.is_dir() and not known and bool(kinds_in(folder))


def _read_run(folder: Path, checkpoint: str | int, own: Own | None, kind: type[Recipe]) -> Trained:
    run = RunFolder(folder)
    document = read_yaml(folder / "recipe.yaml")
    recipe = typed(document.data, dict[str, Any], document.name)
    settings = settings_of(document, kind)
    data = data_of(run)
    place, manifest = choose(run, checkpoint)
    engine = str(manifest.metadata.get("engine", UNNOTED))
    check_evaluated(place, manifest, recipe)
    channels_last = settings.model.channels_last
    own_data = is_own(settings.data)
    pixels = pixels_noted(data, settings.data, channels_last) if own_data else pixels_of(settings.data, channels_last)
    classes = tuple(typed(data.get("classes"), list[str], f"{run.data_path}: classes"))
    model = build(settings, len(classes), len(pixels.mean), engine, own)
    _fill(model, evaluated_weights(place, recipe, model.state_dict()), place, settings.model.name)
    ranks = int(manifest.metadata.get("num_processes", 1))
    origin = Origin(manifest.step, manifest.metadata.get(ACCURACY), engine, ranks)
    # An export is passed on to others; a tracker's options name accounts and hosts.
    shown = {key: value for key, value in recipe.items() if key != "tracking"}
    record = Record(_version(), list(classes), pixels, origin, shown, data)
    return Trained(folder, model, Preprocess(classes, pixels), settings, record)


def _read_export(folder: Path, own: Own | None, kind: type[Recipe]) -> Trained:
    record: Record = read_json(folder / RECORD, Record)
    settings = settings_of(Document(record.recipe, str(folder / RECORD)), kind)
    pixels = record.preprocessing
    model = build(settings, len(record.classes), len(pixels.mean), record.checkpoint.engine, own)
    try:
        load_model(model, str(folder / WEIGHTS))
    except FileNotFoundError:
        raise ValueError(f"{folder / WEIGHTS}: is missing") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{folder / WEIGHTS}: torn, or not of {settings.model.name} ({why})") from None
    return Trained(folder, model, Preprocess(tuple(record.classes), pixels), settings, record)


def settings_of(document: Document, kind: type[Recipe], words: Sequence[str] = ()) -> Recipe:
    """The recipe in a document, without what only training needs.

    Args:
        document: A recipe.
        kind: Its class.
        words: `--data.KEY VALUE` words that change it.

    Raises:
        ValueError: Keys that the recipe's class does not have, or values that they do not take.
    """
    settings = Settings(kind)
    data = {key: value for key, value in document.data.items() if key not in _FOR_TRAINING}
    settings.take(document, data, (), "")
    for name, value in zip(words[::2], words[1::2], strict=True):
        settings.word(name.removeprefix("--"), value)
    recipe: Recipe = settings.recipe()
    return recipe


def build(settings: Recipe, num_classes: int, channels: int, engine: str, own: Own | None = None) -> nn.Module:
    """The recipe's model, or the user's own, in eval mode; torch's generator is left unchanged.

    Raises:
        ValueError: The recipe does not name the model, and none is given.
    """
    if own is None and settings.model.name == OWN:
        raise ValueError(
            f"the run's model is your own (model.name={OWN!r}): give it in Python, robust_dist.load(RUN, model=...)"
        )
    section = replace(settings.model, sync_batchnorm=False)
    with torch.random.fork_rng(devices=[]):
        if own is not None:
            model = own if isinstance(own, nn.Module) else own(num_classes)
        else:
            contiguous = not engine_named(engine).trains_any_memory_format
            try:
                model = section.build(num_classes, channels, seed=0, contiguous=contiguous)
            except OwnCodeError as error:
                said = f"{error}; in Python, robust_dist.load(RUN, model=...) takes the model itself"
                raise OwnCodeError(said) from None
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, weights: dict[str, Tensor], place: Path, name: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        listed = "; ".join(mismatches(model.state_dict(), weights))
        raise DocumentError(f"{place}: its weights are not those of model.name={name!r}: {listed}") from None


def _version() -> str:
    import robust_dist

    return robust_dist.__version__
