"""The augmentations that are timed: ours with each backend, torchvision's, kornia's, DALI's, timm's."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, backends

BACKENDS = tuple(name for name in backends.BACKENDS if name != "auto")
CLASSES = 10
MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
PADDING = 4
OURS = "ours, "
LOOP = "torchvision, loop over samples, tensors"
PIL_LOOP = "torchvision, loop over samples, PIL"
ONE_BOX = "torchvision CutMix"
COPY = "limit: a copy"

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Contender:
    """A contender to be timed.

    Attributes:
        call: (images uint8 [B, 3, H, W], labels int64 [B]) to (images, soft targets [B, 10] or the labels).
        seen: Whether its work passes through torch's operators, so its bytes can be counted.
    """

    call: Callable[[Tensor, Tensor], Pair]
    seen: bool = True


# Makes a contender for the images that will be timed; another form of them is made here, before the clock starts.
Maker = Callable[[Tensor], Contender]


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline that are on; normalising always is.

    Attributes:
        crop_and_flip: Crop at random with padding, and flip.
        trivial: TrivialAugment.
        cutmix: CutMix.
    """

    crop_and_flip: bool = True
    trivial: bool = True
    cutmix: bool = True


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _v2() -> Any:
    return _module("torchvision.transforms.v2")


def _alone(augment: Callable[[Tensor], Tensor], *, seen: bool = True) -> Contender:
    return Contender(lambda images, labels: (augment(images), labels), seen)


def _backends(kind: type[nn.Module], compiled: bool) -> dict[str, Callable[..., Any]]:
    """Functions that make our module with each backend, by name; they raise if it cannot work."""
    found: dict[str, Callable[..., Any]] = {f"{OURS}{name}": partial(kind, backend=name) for name in BACKENDS}
    if compiled:
        plain = found[f"{OURS}torch"]
        found[f"{OURS}torch, compiled"] = lambda *a, **kw: torch.compile(plain(*a, **kw), fullgraph=True)
    return found


def _compiled_too(wanted: bool, name: str, make: Maker) -> dict[str, Maker]:
    """A peer through torch.compile, which may break its graph."""

    def compiled(images: Tensor) -> Contender:
        return Contender(torch.compile(make(images).call), seen=False)

    return {f"{name}, compiled": compiled} if wanted else {}


def _copy(dtype: torch.dtype) -> Maker:
    def make(images: Tensor) -> Contender:
        out = torch.empty_like(images, dtype=dtype)
        return _alone(out.copy_)

    return make


def _ready(images: Tensor, convert: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """`convert`, with its result for `images` made before the clock starts."""
    value = convert(images)
    return lambda given: value if given is images else convert(given)


def trivial_makers(compiled: bool) -> dict[str, Maker]:
    """TrivialAugment, or a peer's nearest equivalent, on uint8 images."""

    def by_backend(make: Callable[..., Any], _: Tensor) -> Contender:
        return _alone(make())

    ours = {name: partial(by_backend, make) for name, make in _backends(TrivialAugment, compiled).items()}
    return {
        COPY: _copy(torch.uint8),
        **ours,
        LOOP: _tv_loop,
        PIL_LOOP: lambda images: _alone(_pil_loop(images, _v2().TrivialAugmentWide()), seen=False),
        "torchvision, once per batch": lambda _: _alone(_v2().TrivialAugmentWide()),
        "kornia TrivialAugment, float": _kornia_trivial,
        **_compiled_too(compiled, "kornia TrivialAugment, float", _kornia_trivial),
        "DALI trivial_augment_wide": _dali_trivial,
        "timm RandAugment n=1, loop over samples, PIL": _timm_trivial,
    }


def _tv_loop(_: Tensor) -> Contender:
    transform = _v2().TrivialAugmentWide()
    return _alone(lambda images: torch.stack([transform(image) for image in images]))


def _pil_loop(images: Tensor, transform: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    v2 = _v2()
    pictures = _ready(images, lambda given: [v2.functional.to_pil_image(image.cpu()) for image in given])

    def augment(given: Tensor) -> Tensor:
        made = [v2.functional.pil_to_tensor(transform(picture)) for picture in pictures(given)]
        return torch.stack(made).to(given.device)

    return augment


def _timm_trivial(images: Tensor) -> Contender:
    transform = _module("timm.data.auto_augment").rand_augment_transform("rand-m10-n1-p1-mstd101-inc1", {})
    return _alone(_pil_loop(images, transform), seen=False)


def _to_levels(images: Tensor) -> Tensor:
    return images.mul(255).round_().to(torch.uint8)


def _kornia_trivial(images: Tensor) -> Contender:
    transform = _module("kornia.augmentation.auto").TrivialAugment()
    floats = _ready(images, lambda given: given / 255)
    return _alone(lambda given: _to_levels(transform(floats(given))))


def _dali_trivial(images: Tensor) -> Contender:
    dali, trivial = _module("nvidia.dali"), _module("nvidia.dali.auto_aug.trivial_augment")
    on_gpu = images.device.type == "cuda"

    @dali.pipeline_def(
        batch_size=max(64, len(images)),
        num_threads=torch.get_num_threads(),
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def pipeline() -> Any:
        samples = dali.fn.external_source(name="images", device="gpu" if on_gpu else "cpu", layout="HWC")
        return trivial.trivial_augment_wide(samples, fill_value=0, interp_type=dali.types.INTERP_NN)

    built = pipeline()
    built.build()
    # On a machine without a GPU it does not take torch's tensors.
    fed: Callable[[Tensor], Any] = (lambda rows: rows) if on_gpu else Tensor.numpy
    rows = _ready(images, lambda given: fed(given.permute(0, 2, 3, 1).contiguous()))

    def augment(given: Tensor) -> Tensor:
        built.feed_input("images", rows(given))
        (found,) = built.run()
        return torch.utils.dlpack.from_dlpack(found.as_tensor()).permute(0, 3, 1, 2)

    return _alone(augment, seen=False)


def mix_makers(compiled: bool) -> dict[str, Maker]:
    """CutMix on uint8 images, or on floating ones if a peer takes nothing else."""

    def by_backend(make: Callable[..., Any], mode: str, _: Tensor) -> Contender:
        return Contender(make(CLASSES, mode=mode))

    ours = {
        f'{name}, "{mode}"': partial(by_backend, make, mode)
        for name, make in _backends(CutMix, compiled).items()
        for mode in ("elem", "batch")
    }
    return {
        COPY: _copy(torch.uint8),
        **ours,
        ONE_BOX: lambda _: Contender(_v2().CutMix(num_classes=CLASSES)),
        **{f'timm Mixup "{mode}", float': partial(_timm_mix, mode) for mode in ("batch", "pair", "elem")},
        "kornia RandomCutMixV2, float": _kornia_mix,
    }


def _timm_mix(mode: str, images: Tensor) -> Contender:
    settings: dict[str, Any] = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "num_classes": CLASSES}
    mix = _module("timm.data.mixup").Mixup(mode=mode, **settings)
    floats = _ready(images, Tensor.float)
    # It writes into its argument.
    return Contender(lambda given, labels: mix(floats(given).clone(), labels))


def _kornia_cutmix() -> Callable[[Tensor, Tensor], Pair]:
    mix = _module("kornia.augmentation").RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)

    def call(images: Tensor, labels: Tensor) -> Pair:
        mixed, found = mix(images, labels)
        own, other, lam = found[0].unbind(1)
        share = lam.unsqueeze(1)
        return mixed, one_hot(own.long(), CLASSES) * share + one_hot(other.long(), CLASSES) * (1 - share)

    return call


def _kornia_mix(images: Tensor) -> Contender:
    mix, floats = _kornia_cutmix(), _ready(images, Tensor.float)
    return Contender(lambda given, labels: mix(floats(given), labels))


def pipeline_makers(side: int, dtype: torch.dtype, compiled: bool, stages: Stages | None = None) -> dict[str, Maker]:
    """Pipelines by name: crop, flip, TrivialAugment, CutMix, normalise, cast.

    Args:
        side: Height and width of the images, pixels.
        dtype: The output images' dtype.
        compiled: Whether `torch.compile`d ones are among them.
        stages: Which stages are on; None: all.
    """
    on = stages or Stages()
    settings: dict[str, Any] = {"crop": PADDING if on.crop_and_flip else None, "flip": on.crop_and_flip}
    settings |= {"trivial": on.trivial, "cutmix": on.cutmix, "dtype": dtype}

    def by_backend(make: Callable[..., Any], images: Tensor) -> Contender:
        return Contender(make(CLASSES, side, MEAN, STD, **settings))

    def kornia(images: Tensor) -> Contender:
        return _kornia_pipeline(images, side, dtype, on)

    ours = {name: partial(by_backend, make) for name, make in _backends(RobustAugment, compiled).items()}
    return {
        COPY: _copy(dtype),
        **ours,
        LOOP: lambda _: _tv_pipeline(_each_sample(_tv_geometry(side, on)), dtype, on),
        PIL_LOOP: lambda images: _tv_pipeline(_pil_loop(images, _tv_geometry(side, on)), dtype, on, seen=False),
        "torchvision, once per batch": lambda _: _tv_pipeline(_tv_geometry(side, on), dtype, on),
        "kornia, float": kornia,
        **_compiled_too(compiled, "kornia, float", kornia),
    }


def _each_sample(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.stack([transform(image) for image in images])


def _tv_geometry(side: int, on: Stages) -> Callable[[Any], Any]:
    v2 = _v2()
    found = [v2.RandomCrop(side, padding=PADDING), v2.RandomHorizontalFlip()] if on.crop_and_flip else []
    found += [v2.TrivialAugmentWide()] if on.trivial else []
    return v2.Compose(found) if found else v2.Identity()


def _tv_pipeline(
    augment: Callable[[Tensor], Tensor], dtype: torch.dtype, on: Stages, *, seen: bool = True
) -> Contender:
    v2 = _v2()
    mix = v2.CutMix(num_classes=CLASSES) if on.cutmix else None
    to_float, normalize = v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)

    def call(images: Tensor, labels: Tensor) -> Pair:
        images = augment(images)
        if mix is not None:
            images, labels = mix(images, labels)
        return normalize(to_float(images)).to(dtype), labels

    return Contender(call, seen)


def _kornia_pipeline(images: Tensor, side: int, dtype: torch.dtype, on: Stages) -> Contender:
    kornia, auto = _module("kornia.augmentation"), _module("kornia.augmentation.auto")
    stages: list[Callable[[Tensor], Tensor]] = []
    if on.crop_and_flip:
        stages += [kornia.RandomCrop((side, side), padding=PADDING), kornia.RandomHorizontalFlip(p=0.5)]
    stages += [auto.TrivialAugment()] if on.trivial else []
    mix = _kornia_cutmix() if on.cutmix else None
    normalize = kornia.Normalize(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    floats = _ready(images, lambda given: given / 255)

    def call(given: Tensor, labels: Tensor) -> Pair:
        found = floats(given)
        for stage in stages:
            found = stage(found)
        if mix is not None:
            found, labels = mix(found, labels)
        return normalize(found).to(dtype), labels

    return Contender(call)
