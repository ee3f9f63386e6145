"""A trained model, read from a run's folder or from what `robust-dist export` wrote."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from robust_dist.checkpoint.layout import kinds_in
from robust_dist.checkpoint.store import ACCURACY
from robust_dist.documents import DocumentError, read_json, typed
from robust_dist.engines.engine import BATCH_NORMS, UNNOTED, engine_named
from robust_dist.inference.preprocess import Pixels, Preprocess, is_own, pixels_noted, pixels_of
from robust_dist.own_code import OwnCodeError
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import OWN
from robust_dist.train.parse import Settings
from robust_dist.train.recipe import Recipe
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
from robust_dist.yaml_file import Document, read_yaml

Own = nn.Module | Callable[[int], nn.Module]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Sections that a model in use does without; a package that they name need not be installed.
_FOR_TRAINING = ("optimizer", "schedule", "tracking", "checkpoint")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that weights come from.

    Attributes:
        step: Optimizer steps done.
        eval_accuracy: That the run logged at this step; None within an epoch.
        engine: The kind of engine that trained.
        num_processes: Its ranks.
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
        preprocessing: What is done to an image.
        checkpoint: Where the weights come from.
        recipe: The run's recipe, without secrets and trackers.
        data: The run's `data.json`: the images that it was trained and evaluated on.
    """

    robust_dist: str
    classes: list[str]
    preprocessing: Pixels
    checkpoint: Origin
    recipe: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model with what its use needs to know.

    Attributes:
        path: The folder that it was read from.
        model: In eval mode, on the CPU, in float32.
        preprocess: From an image to its input.
        settings: The recipe, with defaults for the sections on training.
        record: What `model.json` holds of it.
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
    """The forward pass as the run's engine evaluates it: autocast, weights of a lower dtype, or neither.

    Args:
        trained: The model; it is copied where its weights are cast.
        device: Where it runs.
    """

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
    """The model with weights of a lower dtype, but for those of batch normalisation, as FSDP1 leaves them."""
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
        checkpoint: Of a run: "last", "best" (of the checkpoints that are there, by logged accuracy), or a step.
        model: Of a run whose model is no recipe's: the module that `fit` was given, or the function of the number of
            classes. A module is filled with the weights and put into eval mode.
        kind: The recipe's class, for a run of a class of your own.

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
    """Whether a folder is a checkpoint that belongs to no run of ours."""
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
    # An export is handed on; a tracker's options name accounts and hosts.
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
    """The recipe of a document, without what only training needs.

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
    """The recipe's model, or a run's own one, in eval mode; torch's generator is left as it was.

    Raises:
        ValueError: The model is no recipe's, and none is given.
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
