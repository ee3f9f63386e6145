"""Where sets lie: on the device whole, or in the host's memory where the device has no room for them."""

from collections.abc import Sequence
from typing import Literal

import torch

from robust_dist.data.errors import DataError
from robust_dist.data.image_set import HostSet, ImageSet, free_bytes

KeepOn = Literal["auto", "device", "host"]
Place = Literal["device", "host"]
# Of the device's free memory; the rest is for the model, its optimizer and its activations.
SHARE = 0.5


def choose_places(sizes: Sequence[int], free: int | None, keep_on: KeepOn = "auto") -> list[Place]:
    """Where sets of so many bytes are to lie.

    Args:
        sizes: Bytes of each; the first ones have the first choice.
        free: Bytes that the device has free; None where it cannot be asked, as a CPU, whose memory is the host's.
        keep_on: "auto" takes the device for sets that together need at most half of its free memory, else the host.

    Returns:
        A place for each; "device" says what was asked for, not that there is room.
    """
    places: list[Place] = []
    room = 0.0 if free is None else SHARE * free
    for size in sizes:
        fits = keep_on == "device" or (keep_on == "auto" and (free is None or size <= room))
        places.append("device" if fits else "host")
        room -= size if fits else 0
    return places


def place(sets: Sequence[ImageSet], device: torch.device, keep_on: KeepOn = "auto") -> list[ImageSet | HostSet]:
    """The sets where they are to lie, given out on `device`.

    Raises:
        DataError: keep_on="device", and a set does not fit; names the bytes needed and the bytes free.
    """
    places = choose_places([one.nbytes for one in sets], free_bytes(device), keep_on)
    return [
        HostSet(one, device) if where == "host" else _on_device(one, device, keep_on)
        for one, where in zip(sets, places, strict=True)
    ]


def _on_device(image_set: ImageSet, device: torch.device, keep_on: KeepOn) -> ImageSet:
    free = free_bytes(device)
    if free is not None and image_set.nbytes > free:
        raise DataError(
            f"data.keep_on={keep_on!r}: {image_set.name} needs {image_set.nbytes:,} bytes on {device}, where {free:,} "
            "are free; set data.keep_on=host (or auto), which streams it from the host's memory, or free the device's"
        )
    return image_set.to(device)
