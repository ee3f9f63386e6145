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

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.checkpoint.conversion import read_weights
from robust_dist.checkpoint.plain import load_file
from robust_dist.checkpoint.store import ACCURACY, Manifest, read_manifest, verify
from robust_dist.documents import DocumentError, read_json, typed
from robust_dist.engines.engine import UNNOTED, engine_named
from robust_dist.inference.preprocess import Pixels, Preprocess, is_own, pixels_noted, pixels_of
from robust_dist.own_code import OwnCodeError
from robust_dist.train.folder import RunFolder
from robust_dist.train.optimizers import choice_of
from robust_dist.train.parse import Settings
from robust_dist.train.recipe import Recipe
from robust_dist.train.settings import OWN
from robust_dist.yaml_file import Document, read_yaml

Own = nn.Module | Callable[[int], nn.Module]
WEIGHTS, RECORD = "model.safetensors", "model.json"
# Accelerate's name for the moving average, the one object that a run registers with it.
AVERAGE = "custom_checkpoint_0.pkl"
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
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
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
    raise ValueError(f"{folder}: {_why_none(folder)}")


def _why_none(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    above = next((one for one in folder.absolute().parents if (one / "recipe.yaml").is_file()), None)
    hint = "" if above is None else f"; it belongs to a run: name {above}"
    return f"holds no recipe.yaml of a run and no {RECORD} of an export{hint}"


def _read_run(folder: Path, checkpoint: str | int, own: Own | None, kind: type[Recipe]) -> Trained:
    run = RunFolder(folder)
    document = read_yaml(folder / "recipe.yaml")
    recipe = typed(document.data, dict[str, Any], document.name)
    settings = settings_of(document, kind)
    data = _data(run)
    place, manifest = choose(run, checkpoint)
    engine = str(manifest.metadata.get("engine", UNNOTED))
    _check_evaluated(place, manifest, recipe)
    channels_last = settings.model.channels_last
    own_data = is_own(settings.data)
    pixels = pixels_noted(data, settings.data, channels_last) if own_data else pixels_of(settings.data, channels_last)
    classes = tuple(typed(data.get("classes"), list[str], f"{run.data_path}: classes"))
    model = build(settings, len(classes), len(pixels.mean), engine, own)
    _fill(model, _weights(place, settings, model), place, settings.model.name)
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


def _data(run: RunFolder) -> dict[str, Any]:
    try:
        data: dict[str, Any] = read_json(run.data_path, dict[str, Any])
    except FileNotFoundError:
        raise ValueError(
            f"{run.path} has no data.json, which names the classes: start the run's command once more, which writes it"
        ) from None
    return data


def choose(run: RunFolder, checkpoint: str | int) -> tuple[Path, Manifest]:
    """A run's checkpoint and its manifest.

    Args:
        run: The folder.
        checkpoint: "last", "best", or a step.

    Raises:
        CheckpointError: There is none, not this one, or it is torn.
        ValueError: `checkpoint` is none of these.
    """
    store = CheckpointStore(run.checkpoints)
    steps = store.steps()
    if not steps:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint yet")
    there = f"there are those of step {', '.join(map(str, steps))}"
    if checkpoint == "best":
        step = _best(store, steps, run)
    elif checkpoint == "last":
        step = steps[-1]
    elif str(checkpoint).isdigit():
        step = int(checkpoint)
    else:
        raise ValueError(f"checkpoint={checkpoint!r} is none of last, best and a step; {there}")
    if step not in steps:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of step {step}; {there}")
    try:
        verify(store.path_of(step))
        return store.path_of(step), read_manifest(store.path_of(step))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another checkpoint, {there}") from None


def _best(store: CheckpointStore, steps: list[int], run: RunFolder) -> int:
    scored = []
    for step in steps:
        try:
            accuracy = read_manifest(store.path_of(step)).metadata.get(ACCURACY)
        except CheckpointError:
            continue
        if accuracy is not None:
            scored.append((accuracy, step))
    if not scored:
        raise CheckpointError(f"{run.checkpoints} holds no whole checkpoint of an epoch's end, so none has an accuracy")
    return max(scored)[1]


def _check_evaluated(place: Path, manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Refuse the weights that a schedule-free optimizer trains, in place of their average."""
    if manifest.metadata.get(ACCURACY) is not None:
        return
    name = (recipe.get("optimizer") or {}).get("name", "")
    choice = choice_of(name) if name else None
    if choice is not None and choice.averages_weights:
        raise CheckpointError(
            f"{place}: was saved within an epoch, so it holds the weights that optimizer.name={name!r} trains and not "
            "the average that is evaluated, whose batch statistics need training data: name a checkpoint of an epoch's "
            "end, or let the run reach one"
        )


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
                raise OwnCodeError(
                    f"{error}; in Python, robust_dist.load(RUN, model=...) takes the model itself"
                ) from None
    return model.eval().requires_grad_(False)


def _weights(place: Path, settings: Recipe, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the run evaluated: the moving average where the recipe has one."""
    if settings.ema_decay is None:
        return read_weights(place, model.state_dict())
    entries = typed(load_file(place / AVERAGE), dict[str, Any], str(place / AVERAGE))
    return {name.removeprefix("module."): value for name, value in entries.items() if name != "n_averaged"}


def _fill(model: nn.Module, weights: dict[str, Tensor], place: Path, name: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        own = model.state_dict()
        lacking, strange = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
        said = {"lacks": lacking, "has beyond it": strange, "has in other shapes": sorted(shapes)}
        listed = "; ".join(f"it {what} {', '.join(names[:3])}" for what, names in said.items() if names)
        raise DocumentError(f"{place}: its weights are not those of model.name={name!r}: {listed}") from None


def _version() -> str:
    import robust_dist

    return robust_dist.__version__
