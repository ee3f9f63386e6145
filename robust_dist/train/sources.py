"""From the recipe's data keys to the sets of a run whose images are files."""

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robust_dist.checkpoint.space import free_memory, text_of
from robust_dist.data.identity import fingerprint, source_fingerprint
from robust_dist.data.image_set import ImageSet
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import ImageSource, printable
from robust_dist.ranks.talk import agree, gather, rank, taking_part
from robust_dist.train.data_config import Classes, DataConfig

if TYPE_CHECKING:
    from robust_dist.data.image_cache import ImageCache

# So many of a set's first images are looked at for an EXIF orientation.
LOOKED_AT = 16


def open_streams(data: DataConfig, device: torch.device, *, download: bool) -> tuple[LabelledSet, LabelledSet]:
    """Training and evaluation images, as they are read while training; nothing is decoded yet.

    Raises:
        DataError: Folders, splits or shards that are not there, or that are not what they should be.
        ImportError: A package that the format needs is not installed.
        ValueError: `data.decode` wants a GPU that cannot decode.
    """
    from robust_dist.data.decode import RandomCrop
    from robust_dist.data.device_decode import decoder
    from robust_dist.data.stream_set import StreamSet

    assert data.crop_scale is not None
    train = open_source(data, "train", None, download=download)
    cropped = RandomCrop(data.size, data.crop_scale, data.crop_ratio)
    decode = None if data.cache == "disk" else decoder(data.decode, device)
    return (
        StreamSet(
            train,
            cropped,
            device,
            workers=data.workers,
            prefetch=data.prefetch,
            shuffle_window=data.shuffle_window,
            decode=decode,
            fast=_is_fast(data),
            cache=_cache(data, train, cropped),
        ),
        eval_stream(data, device, train.classes, download=download),
    )


def eval_stream(data: DataConfig, device: torch.device, classes: Classes, *, download: bool) -> LabelledSet:
    """Evaluation images alone, as `open_streams` has them; `classes` are the training part's.

    Where they are to be decoded on a GPU and cannot, the CPU does it: a trained model is evaluated anywhere.
    """
    from robust_dist.data.decode import CentralCrop
    from robust_dist.data.device_decode import decoder
    from robust_dist.data.stream_set import StreamSet

    source = open_source(data, "eval", classes, download=download)
    crop = CentralCrop(*data.eval_sides)
    decode = None if data.cache == "disk" else decoder("auto" if data.decode == "cuda" else data.decode, device)
    return StreamSet(
        source,
        crop,
        device,
        workers=data.workers,
        prefetch=data.prefetch,
        decode=decode,
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
    """Print what keeping the sets' decoded images costs, by the first ones."""
    from robust_dist.data.image_cache import bytes_kept

    cache = getattr(sets[0], "cache", None)
    if cache is None:
        return
    needed, used, free = sum(map(bytes_kept, sets)), cache.used(), shutil.disk_usage(cache.folder).free
    room = min(1.0, cache.most_bytes / max(needed, 1), (used + free) / max(needed, 1))
    print(
        f"data.cache=disk: about {text_of(needed)} of decoded images, kept in {printable(str(cache.folder))}, with "
        f"{text_of(used)} now and room for {room:.0%} of them ({text_of(cache.most_bytes)} by data.cache_gib; "
        f"{text_of(free)} are free)"
    )


def _is_fast(data: DataConfig) -> bool:
    """Whether what the GPU does not decode is decoded by `fast_crop`."""
    return data.decode in ("fast", "auto")


def with_decoder(data: DataConfig, device: torch.device, noted: str | None) -> DataConfig:
    """The section with a decoder in the place of `decode: auto`, the same on every rank.

    Args:
        data: Of the recipe.
        device: This rank's.
        noted: `RunFolder.decoder`: what a run that goes on was trained with is what it goes on with.
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
            f"warning: the run's images were decoded by the GPU so far, which cannot be done here ({reasons[0]}): "
            "it goes on with data.decode=fast, whose levels differ by a few",
            flush=True,
        )
    # Versions that noted nothing had the CPU decode exactly.
    return replace(data, decode="exact" if noted == "" else "fast")


def tell_decoder(train: LabelledSet) -> None:
    """Print what decodes JPEGs, unless it is Pillow, exactly."""
    from robust_dist.data.fast_decode import decoder_name, is_installed

    found = getattr(train, "decoder", "exact")
    if found == "cuda":
        print("JPEGs are decoded by the GPU (data.decode=cuda)")
    elif found == "fast":
        advice = "" if is_installed else "; simplejpeg takes less time: pip install 'robust_dist[data]'"
        print(f"JPEGs are decoded by {decoder_name()} (data.decode=fast){advice}")


def open_in_memory(data: DataConfig, *, download: bool) -> list[ImageSet]:
    """Training and evaluation images of one size, decoded once, on the CPU.

    Raises:
        DataError: As `open_streams`; or images of other sizes, too many that cannot be read, or no room for them.
    """
    train = open_source(data, "train", None, download=download)
    test = open_source(data, "eval", train.classes, download=download)
    return [_decoded(data, train, data.size), _decoded(data, test, data.eval_sides[0])]


def eval_in_memory(data: DataConfig, classes: Classes, *, download: bool) -> ImageSet:
    """Evaluation images alone, as `open_in_memory` has them; `classes` are the training part's."""
    return _decoded(data, open_source(data, "eval", classes, download=download), data.eval_sides[0])


def _decoded(data: DataConfig, source: ImageSource, size: int) -> ImageSet:
    from robust_dist.data.in_memory import load_into_memory

    return load_into_memory(source, size, workers=data.workers, max_bad_share=data.max_bad_share, free=free_memory())


def open_source(data: DataConfig, part: str, classes: Classes, *, download: bool) -> ImageSource:
    """The images of one part, "train" or "eval"; `classes` are the training part's, which the other must have."""
    assert data.source is not None
    return data.source.open(data, part, classes, download, **data.options)


def tell_exif(data: DataConfig, *sets: LabelledSet) -> None:
    """Print what is done with the EXIF orientation of streamed sets whose first images have one."""
    sources = [getattr(dataset, "source", None) for dataset in sets]
    for line in [exif_line(data, source) for source in sources if source is not None]:
        if line is not None:
            print(printable(line))


def exif_line(data: DataConfig, source: ImageSource) -> str | None:
    """A line on the EXIF orientation of a set's images, where the first ones carry one; else None."""
    from robust_dist.data.decode import is_turned
    from robust_dist.data.errors import BadImageError
    from robust_dist.data.source import Upright

    first: list[bytes] = []
    for index in range(min(LOOKED_AT, len(source))):
        # What cannot be read is found, and counted, by those who need it.
        with suppress(BadImageError, OSError):
            first.append(source.read(index)[0])
    turned = sum(map(is_turned, first))
    if not turned:
        return None
    done, other = ("turned upright", "off") if isinstance(first[0], Upright) else ("left as they are stored", "on")
    return (
        f"{source.name}: {turned} of the first {len(first)} images carry an EXIF orientation; they are {done} "
        f"(data.exif={data.exif}; data.exif={other} does the other)"
    )


def check_ranks_see_the_same(*sets: LabelledSet) -> None:
    """Compare the sets between the ranks: hosts with different files would train on different orders.

    Raises:
        ValueError: On every rank, with what differs of the number of images, of classes, and the checksum of all.
    """
    if not taking_part():
        return
    for dataset in sets:
        agree(
            _fingerprint(dataset),
            f"the ranks do not see the same images in {dataset.name}; give every host the same files",
        )


def _fingerprint(dataset: LabelledSet) -> dict[str, Any]:
    """Images, classes, and a checksum of the classes' names, the groups' sizes, and the images' names and labels."""
    checksum = fingerprint(dataset.classes, dataset.group_sizes, dataset.fingerprint())
    return {"images": len(dataset), "classes": len(dataset.classes), "checksum": checksum}
