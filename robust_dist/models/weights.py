"""Published weights of torchvision's and timm's models, and the layer that produces a classifier's logits."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_dist.documents import first_line
from robust_dist.models.registry import SINGLE_OUTPUT, TIMM_PREFIX, timm_module, torchvision_models, torchvision_names

DEFAULT = "DEFAULT"
# Of googlenet and inception_v3, for training only; our models are built without them.
_FURTHER_HEADS = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class Published:
    """Published weights of a model.

    Attributes:
        title: A readable name.
        entries: The state dict.
        num_classes: Outputs of their head; 0 if they have none.
        mean: Per channel, of their training images, on the scale 0 to 1.
        std: Per channel, likewise.
    """

    title: str
    entries: dict[str, Tensor]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class FetchError(ValueError):
    """Weights that are not on this machine and could not be fetched; the message says what to put where."""


def head_of(model: nn.Module, num_classes: int | None = None) -> tuple[str, ...]:
    """Names of the modules that produce the logits; empty if no layer fits.

    They are those that timm names; otherwise the last linear layer or 1x1 convolution with `num_classes` outputs (None:
    any number).
    """
    named = getattr(model, "pretrained_cfg", None)
    given = named.get("classifier") if isinstance(named, dict) else None
    names = (given,) if isinstance(given, str) else tuple(given or ())
    modules = dict(model.named_modules())
    if names and all(isinstance(modules.get(name), (nn.Linear, nn.Conv2d)) for name in names):
        return names
    outputs = {name: _outputs(module) for name, module in modules.items()}
    fitting = [name for name, count in outputs.items() if count is not None and num_classes in (None, count)]
    return tuple(fitting[-1:])


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether a state dict entry belongs to one of the modules."""
    return any(not module or name.startswith(f"{module}.") for module in modules)


def published_names(name: str) -> list[str]:
    """The names of the weights published for a model; none for our own models or an unknown one."""
    if name.startswith(TIMM_PREFIX):
        bare = name.removeprefix(TIMM_PREFIX)
        return [tagged.removeprefix(f"{bare}.") for tagged in timm_module().list_pretrained(f"{bare}.*")]
    if name not in torchvision_names():
        return []
    return [entry.name for entry in torchvision_models().get_model_weights(name)]


def implied_options(name: str, weights: str | None) -> dict[str, Any]:
    """Options without which published weights give other outputs: googlenet and inception_v3 rescale their input."""
    if weights is None or name not in SINGLE_OUTPUT:
        return {}
    return {"transform_input": True} if _tag(weights) in (DEFAULT, *published_names(name)) else {}


def check_published(name: str, weights: str) -> None:
    """Reject a name of weights that is not published for a model.

    Raises:
        ValueError: The message lists the published names.
    """
    known = published_names(name)
    if not known or _tag(weights) not in (DEFAULT, *known):
        offered = f"DEFAULT, {', '.join(known)}, or " if known else ""
        none = "" if known else " (no weights are published for this model)"
        raise ValueError(
            f"model.weights={weights!r} with model.name={name!r}: no such weights{none}, file or folder; give {offered}"
            "the path of a run, an export, or a .safetensors or .pt file"
        )


def read_published(name: str, weights: str, num_classes: int, channels: int, options: dict[str, Any]) -> Published:
    """Published weights, from this machine's cache or fetched into it; torch's generator is unchanged.

    Args:
        name: The model's name, as for `build_model`.
        weights: One of `published_names`, or DEFAULT.
        num_classes: Outputs of the model they are for.
        channels: Channels of its images; timm's weights are adapted to them.
        options: Its constructor's options.

    Raises:
        FetchError: They are not here and cannot be fetched.
        ValueError: There are none with this name.
    """
    check_published(name, weights)
    tag = _tag(weights)
    with torch.random.fork_rng(devices=[]):
        if name.startswith(TIMM_PREFIX):
            return _of_timm(name.removeprefix(TIMM_PREFIX), tag, num_classes, channels, options)
        return _of_torchvision(name, tag)


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    # A wider one sees neighbours, so it does not classify pooled features.
    return module.out_channels if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) else None


def _tag(weights: str) -> str:
    """The name without its class, as in ResNet50_Weights.IMAGENET1K_V2."""
    return weights.rpartition("_Weights.")[2]


def _of_torchvision(name: str, tag: str) -> Published:
    choice = getattr(torchvision_models().get_model_weights(name), tag)
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(choice.url))
    title, is_here = f"torchvision's {choice}", file.is_file()
    if not is_here:
        print(f"fetching {title} from {choice.url} into {file}", flush=True)
    try:
        donor = torchvision_models().get_model(name, weights=choice, progress=False)
    except Exception as error:
        if is_here:
            raise ValueError(
                f"{file}: torn, or not {title} ({first_line(error)}); delete it to fetch it again"
            ) from None
        raise _cannot_fetch(title, choice.url, f"put it at {file}", error) from None
    made = choice.transforms()
    entries = {key: value for key, value in donor.state_dict().items() if not key.startswith(_FURTHER_HEADS)}
    return Published(title, entries, len(choice.meta["categories"]), tuple(made.mean), tuple(made.std))


def _of_timm(name: str, tag: str, num_classes: int, channels: int, options: dict[str, Any]) -> Published:
    timm = timm_module()
    full = name if tag == DEFAULT else f"{name}.{tag}"
    said = timm.models.get_pretrained_cfg(full)
    title = f"timm's {said.architecture}.{said.tag}" if said.tag else f"timm's {name}"
    url = f"https://huggingface.co/{said.hf_hub_id}/resolve/main/model.safetensors" if said.hf_hub_id else said.url
    try:
        donor = timm.create_model(full, pretrained=True, num_classes=num_classes, in_chans=channels, **options)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise _cannot_fetch(title, url, "put it anywhere", error) from None
        raise ValueError(f"model.weights={tag!r}: {title} does not fit model.options={options}: {error}") from None
    except Exception as error:
        raise _cannot_fetch(title, url, "put it anywhere", error) from None
    return Published(title, donor.state_dict(), said.num_classes, tuple(said.mean), tuple(said.std))


def _cannot_fetch(title: str, url: str, place: str, error: Exception) -> FetchError:
    return FetchError(
        f"{title} is not on this machine, and could not be fetched ({first_line(error)}). Fetch {url} where there is "
        f"a network, {place}, and start again; or name the file itself: model.weights=/path/{os.path.basename(url)}"
    )
