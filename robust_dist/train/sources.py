"""From the recipe's section "data" to a run's image sets, and the preparation of their images."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dist import own_code
from robust_dist.data import load_dataset
from robust_dist.data.batches import Cut
from robust_dist.data.identity import fingerprint, source_fingerprint
from robust_dist.data.image_set import ImageSet, place
from robust_dist.data.loader import Loader
from robust_dist.data.registry import DATASETS, DatasetInfo, dataset_info
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import ImageSource, printable
from robust_dist.measure.memory import free_memory, text_of
from robust_dist.ranks.talk import agree, attempt, gather, on_rank_0, rank, taking_part
from robust_dist.train.data_config import IMAGENET_MEAN, IMAGENET_STD, Classes, DataConfig
from robust_dist.train.recipe import Recipe

if TYPE_CHECKING:
    from robust_dist.data.image_cache import ImageCache

# Number of a set's first images checked for an EXIF orientation.
LOOKED_AT = 16
_KEY = "data.name"
_read: dict[str, DatasetInfo] = {}


def load_sets(recipe: Recipe, accelerator: Accelerator) -> tuple[LabelledSet, LabelledSet]:
    """Training and evaluation images for this rank's device; one process per host downloads, the others wait.

    Raises:
        ValueError: On every rank: files are missing, torn, too large for the device, or not the same on all ranks.
    """
    first, device = accelerator.is_local_main_process, accelerator.device

    def load(download: bool) -> tuple[LabelledSet, LabelledSet]:
        return open_sets(recipe.data, device, download=download)

    began = time.monotonic()
    sets = attempt(lambda: load(recipe.data.download), here=first)
    others = attempt(lambda: load(False), here=not first)
    loaded = sets or others
    assert loaded is not None
    check_ranks_see_the_same(*loaded)
    if recipe.data.in_memory:
        images = sum(map(len, loaded))
        accelerator.print(f"decoded {images:,} images in {time.monotonic() - began:.1f} s; they stay in memory")
    on_rank_0(lambda: tell_exif(recipe.data, *loaded))
    on_rank_0(lambda: tell_decoder(loaded[0]))
    on_rank_0(lambda: tell_cache(*loaded))
    return loaded


def open_sets(data: DataConfig, device: torch.device, *, download: bool) -> tuple[LabelledSet, LabelledSet]:
    """Training and evaluation images: read during training, or kept in memory if `data.keep_on` says so."""
    if own_code.is_name(data.name):
        check_own_data(data)
    # Training images have priority: they are read more often.
    if data.source is None:
        sets = [_set_by_name(data, train=part, download=download) for part in (True, False)]
    else:
        train = open_source(data, "train", None, download=download)
        test = open_source(data, "eval", train.classes, download=download)
        if data.streamed:
            return _stream(data, device, train), _stream(data, device, test, evaluation=True)
        sets = [_decoded(data, train, data.size), _decoded(data, test, data.eval_sides[0])]
    first, second = place(sets, device, data.keep_on)
    return first, second


def open_eval_set(data: DataConfig, device: torch.device, classes: tuple[str, ...], *, download: bool) -> LabelledSet:
    """The evaluation images alone, as from `open_sets`; `classes` are those of the training images."""
    if data.source is None:
        return place([_set_by_name(data, train=False, download=download)], device, data.keep_on)[0]
    source = open_source(data, "eval", classes, download=download)
    if data.streamed:
        return _stream(data, device, source, evaluation=True)
    return place([_decoded(data, source, data.eval_sides[0])], device, data.keep_on)[0]


def _set_by_name(data: DataConfig, *, train: bool, download: bool) -> ImageSet:
    root = Path(data.root)
    if own_code.is_name(data.name):
        return info_of(data).loader(root, train, download)
    return load_dataset(data.name, root, train=train, download=download, own_files=data.own_files)


def _stream(data: DataConfig, device: torch.device, source: ImageSource, *, evaluation: bool = False) -> LabelledSet:
    """Images of one part, to be read during training; nothing is decoded yet.

    If they should be decoded on a GPU and cannot, that is a ValueError for training images; evaluation images are then
    decoded on the CPU, as a trained model is evaluated anywhere.
    """
    from robust_dist.data.decode import CentralCrop, RandomCrop
    from robust_dist.data.device_decode import decoder
    from robust_dist.data.stream_set import StreamSet

    assert data.crop_scale is not None
    crop = CentralCrop(*data.eval_sides) if evaluation else RandomCrop(data.size, data.crop_scale, data.crop_ratio)
    wanted = "auto" if evaluation and data.decode == "cuda" else data.decode
    return StreamSet(
        source,
        crop,
        device,
        workers=data.workers,
        prefetch=data.prefetch,
        shuffle_window=data.shuffle_window,
        decode=None if data.cache == "disk" else decoder(wanted, device),
        fast=_is_fast(data),
        cache=_cache(data, source, crop),
    )


def _cache(data: DataConfig, source: ImageSource, crop: Any) -> "ImageCache | None":
    from robust_dist.data.image_cache import cache_for

    if data.cache != "disk":
        return None
    folder = None if data.cache_dir is None else Path(data.cache_dir).expanduser()
    bound = int(data.cache_gib * 2**30)
    cache = cache_for(source, source_fingerprint(source), crop, fast=_is_fast(data), folder=folder, most_bytes=bound)
    cache.begin()
    return cache


def tell_cache(*sets: LabelledSet) -> None:
    """Print the cost of keeping decoded images."""
    from robust_dist.data.image_cache import bytes_kept

    cache = getattr(sets[0], "cache", None)
    if cache is None:
        return
    needed, used, free = sum(map(bytes_kept, sets)), cache.used(), shutil.disk_usage(cache.folder).free
    room = min(1.0, cache.most_bytes / max(needed, 1), (used + free) / max(needed, 1))
    print(
        f"data.cache=disk: the decoded images take about {text_of(needed)}; {printable(str(cache.folder))} holds "
        f"{text_of(used)} now and has room for {room:.0%} of them (data.cache_gib allows {text_of(cache.most_bytes)}; "
        f"{text_of(free)} are free)"
    )


def _is_fast(data: DataConfig) -> bool:
    """Whether images not decoded by the GPU are decoded by `fast_crop`."""
    return data.decode in ("fast", "auto")


def with_decoder(data: DataConfig, device: torch.device, noted: str | None) -> DataConfig:
    """The section with `decode: auto` resolved, identically on every rank.

    `noted` is `RunFolder.decoder`: a resumed run keeps its decoder.
    """
    from robust_dist.data.device_decode import why_not

    if not data.streamed or data.decode != "auto":
        return data
    if noted in ("exact", "fast"):
        return replace(data, decode="exact" if noted == "exact" else "fast")
    reasons = [why for why in gather(why_not(device)) if why is not None]
    if not reasons and data.cache == "off":
        return replace(data, decode="cuda")
    if noted == "cuda" and reasons and rank() == 0:
        print(
            f"warning: the run's images were decoded by the GPU so far, which is not possible here ({reasons[0]}): "
            "it continues with data.decode=fast, whose levels differ by a few",
            flush=True,
        )
    # Versions that recorded nothing decoded exactly, on the CPU.
    return replace(data, decode="exact" if noted == "" else "fast")


def tell_decoder(train: LabelledSet) -> None:
    """Print what decodes JPEGs, unless it is Pillow, exactly."""
    from robust_dist.data.fast_decode import decoder_name, is_installed

    found = getattr(train, "decoder", "exact")
    if found == "cuda":
        print("JPEGs are decoded by the GPU (data.decode=cuda)")
    elif found == "fast":
        advice = "" if is_installed else "; simplejpeg is faster: pip install 'robust_dist[data]'"
        print(f"JPEGs are decoded by {decoder_name()} (data.decode=fast){advice}")


def _decoded(data: DataConfig, source: ImageSource, size: int) -> ImageSet:
    from robust_dist.data.in_memory import load_into_memory

    return load_into_memory(source, size, workers=data.workers, max_bad_share=data.max_bad_share, free=free_memory())


def open_source(data: DataConfig, part: str, classes: Classes, *, download: bool) -> ImageSource:
    """The images of one part, "train" or "eval"; `classes` are the training part's, which the other must have."""
    assert data.source is not None
    return data.source.open(data, part, classes, download, **data.options)


def tell_exif(data: DataConfig, *sets: LabelledSet) -> None:
    """Print how EXIF orientation is handled in sets whose first images have one."""
    sources = [getattr(dataset, "source", None) for dataset in sets]
    for line in [exif_line(data, source) for source in sources if source is not None]:
        if line is not None:
            print(printable(line))


def exif_line(data: DataConfig, source: ImageSource) -> str | None:
    """A line on the EXIF orientation of a set's images, if the first ones have one."""
    from robust_dist.data.decode import is_turned
    from robust_dist.data.errors import BadImageError
    from robust_dist.data.source import Upright

    first: list[bytes] = []
    for index in range(min(LOOKED_AT, len(source))):
        # Unreadable images are found and counted when they are needed.
        with suppress(BadImageError, OSError):
            first.append(source.read(index)[0])
    turned = sum(map(is_turned, first))
    if not turned:
        return None
    done, other = ("turned upright", "off") if isinstance(first[0], Upright) else ("left as stored", "on")
    return (
        f"{source.name}: {turned} of the first {len(first)} images carry an EXIF orientation; they are {done} "
        f"(data.exif={data.exif}; set data.exif={other} for the opposite)"
    )


def check_ranks_see_the_same(*sets: LabelledSet) -> None:
    """Compare the sets between ranks; a ValueError on every rank says where hosts have different files."""
    if not taking_part():
        return
    for dataset in sets:
        agree(
            _fingerprint(dataset),
            f"the ranks do not see the same images in {dataset.name}; give every host the same files",
        )


def _fingerprint(dataset: LabelledSet) -> dict[str, Any]:
    checksum = fingerprint(dataset.classes, dataset.group_sizes, dataset.fingerprint())
    return {"images": len(dataset), "classes": len(dataset.classes), "checksum": checksum}


def build_loader(recipe: Recipe, accelerator: Accelerator, train_set: LabelledSet) -> Loader:
    """The order of the training images and this rank's part of each global batch."""
    cut = Cut(
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=recipe.accumulation,
        block=recipe.data.block,
        drop_last=recipe.data.drop_last,
    )
    return train_set.loader(cut)


class Preprocessing(NamedTuple):
    """Preparation of a set's images on the device: side in pixels, mean and std per channel, own crop and flip.

    `crop` is padding in pixels: 0 for images cropped by workers, an eighth of the side for files kept in memory.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    flip: bool


def preprocessing_of(data: DataConfig, *, evaluation: bool = False) -> Preprocessing:
    """The preparation of training or evaluation images; an unknown data set is a ValueError."""
    if data.streamed or data.in_memory:
        size = data.eval_sides[0] if evaluation else data.size
        padding = round(size / 8) if data.in_memory else 0
        return Preprocessing(size, data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD, padding, True)
    info = info_of(data)
    return Preprocessing(info.size, info.mean, info.std, info.crop_padding, info.flip)


def info_of(data: DataConfig) -> DatasetInfo:
    """The record of a set by name, or of the user's own, whose images are read for it.

    Raises:
        ValueError: The name is unknown, or the user's own set cannot be imported or used.
    """
    if not own_code.is_name(data.name):
        return dataset_info(data.name)
    found = own_code.load(_KEY, data.name)
    if isinstance(found, DatasetInfo):
        return found
    key = f"{data.name} {data.root} {data.options}"
    if key not in _read:
        check_own_set(data.name, found, data)
        train = _made(data, found, train=True)
        _read[key] = info_of_sets(
            train, _made(data, found, train=False, classes=train.classes), partial(_made, data, found)
        )
    return _read[key]


def known_info(data: DataConfig) -> DatasetInfo | None:
    """Like `info_of`; None for image files."""
    return info_of(data) if own_code.is_name(data.name) and data.source is None else DATASETS.get(data.name)


def check_own_data(data: DataConfig) -> None:
    """Import the user's own data, and check the keys that other data have checked when they are read.

    Raises:
        OwnCodeError: It cannot be imported, or is not data.
        ValueError: Keys that it does not use.
    """
    data.check_keys()
    if data.source is None:
        check_own_set(data.name, own_code.load(_KEY, data.name), data)


def check_own_set(name: str, found: Any, data: DataConfig) -> None:
    """Raise an OwnCodeError for what is not a set of images or does not take its arguments; nothing is read."""
    if isinstance(found, DatasetInfo):
        return
    is_model = isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module))
    if is_model or not callable(found):
        wanted = "a Dataset class or a function of train (bool), a DatasetInfo or a SourceChoice"
        raise own_code.wrong(_KEY, name, found, wanted)
    own_code.check_call(_KEY, name, found, **_arguments(data, found, train=True))


def _arguments(data: DataConfig, found: Any, *, train: bool) -> dict[str, Any]:
    known = {"root": data.root, "download": data.download}
    return {"train": train, **{key: one for key, one in known.items() if own_code.takes(found, key)}, **data.options}


def _made(data: DataConfig, found: Any, *, train: bool, classes: Sequence[str] | None = None) -> ImageSet:
    given = own_code.call(_KEY, data.name, found, **_arguments(data, found, train=train))
    return image_set(given, f"{data.name} ({'train' if train else 'eval'})", classes)


def info_of_sets(train_set: ImageSet, eval_set: ImageSet, again: Any = None) -> DatasetInfo:
    """The record of two sets in memory: the training images' mean and deviation, crops padded by an eighth, flips.

    `again(train=..., classes=...)` rebuilds a part that was already handed out; without it the same one is returned
    again.
    """
    kept: dict[bool, ImageSet] = {True: train_set, False: eval_set}
    classes = train_set.classes

    def load(root: Any, train: bool, download: bool) -> ImageSet:
        # Not kept for the length of the run, which may have a copy on a device.
        found = kept.get(train) if again is None else kept.pop(train, None)
        return again(train=train, classes=classes) if found is None else found

    scaled = train_set.images.double() / 255
    return DatasetInfo(
        num_classes=len(train_set.classes),
        channels=train_set.channels,
        size=train_set.images.shape[-1],
        mean=tuple(scaled.mean((0, 2, 3)).tolist()),
        # A constant channel is not scaled.
        std=tuple(deviation or 1.0 for deviation in scaled.std((0, 2, 3)).tolist()),
        crop_padding=round(train_set.images.shape[-1] / 8),
        flip=True,
        description="the user's own",
        loader=load,
    )


def image_set(given: Any, name: str, classes: Sequence[str] | None = None) -> ImageSet:
    """Convert the user's own images to an ImageSet on the CPU.

    Args:
        given: An ImageSet; a pair of images (uint8 [N, C, H, H]) and labels (int64 [N]); or a map-style data set of
            (PIL image or uint8 [C, H, H], label), which is read once.
        name: For messages.
        classes: Names for a set without its own `classes`; None: numbers up to the highest label.

    Raises:
        ValueError: Images have several sizes or are not square, or this is not a set of images.
    """
    if isinstance(given, ImageSet):
        return given
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], Tensor):
        images, labels = given
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        images, labels = _stacked([given[index] for index in range(len(given))], name)
    else:
        raise ValueError(
            f"{name}: a {type(given).__name__} is not a set of images; give a pair of images (uint8 [N, C, H, H]) and "
            "labels (int64 [N]), or a data set with __len__ and __getitem__ of (PIL image or uint8 [C, H, H], label)"
        )
    if images.ndim == 4 and images.shape[2] != images.shape[3]:
        raise ValueError(f"{name}: images of {images.shape[2]}x{images.shape[3]} are not square; crop or pad them")
    count = int(labels.max()) + 1 if len(labels) else 0
    names = getattr(given, "classes", None) or (classes if classes and count <= len(classes) else range(count))
    return ImageSet(images, labels, tuple(map(str, names)), name)


def _stacked(samples: list[Any], name: str) -> tuple[Tensor, Tensor]:
    tensors = [_tensor_of(sample[0]) for sample in samples]
    sizes = [tuple(tensor.shape) for tensor in tensors]
    other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise ValueError(
            f"{name}: image {other} is {sizes[other]}, but image 0 is {sizes[0]}; give images of one size, or "
            "train from files of any size with data.name=imagefolder, hub or webdataset"
        )
    return torch.stack(tensors), torch.tensor([int(sample[1]) for sample in samples])


def _tensor_of(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
