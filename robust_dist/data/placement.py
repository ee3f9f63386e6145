"""Where a set lies: on the device whole, or in the host's memory where the device has no room for it."""

from typing import Literal

import torch

from robust_dist.data.errors import DataError
from robust_dist.data.host_set import HostSet
from robust_dist.data.image_set import ImageSet, free_bytes

KeepOn = Literal["auto", "device", "host"]
# Of the device's free memory; the rest is for the model, its optimizer and its activations.
SHARE = 0.5


def choose_place(nbytes: int, free: int | None, keep_on: KeepOn = "auto") -> Literal["device", "host"]:
    """Where a set of so many bytes is to lie.

    Args:
        nbytes: Of the set.
        free: Bytes that the device has free; None where it cannot be asked, as a CPU, whose memory is the host's.
        keep_on: "auto" takes the device for a set of at most half of its free memory, else the host.

    Returns:
        The place; "device" only says what was asked for, not that there is room.
    """
    if keep_on != "auto":
        return keep_on
    return "device" if free is None or nbytes <= SHARE * free else "host"


def place(image_set: ImageSet, device: torch.device, keep_on: KeepOn = "auto") -> ImageSet | HostSet:
    """The set where it is to lie, given out on `device`.

    Raises:
        DataError: keep_on="device", and the set does not fit; names the bytes needed and the bytes free.
    """
    free = free_bytes(device)
    if choose_place(image_set.nbytes, free, keep_on) == "host":
        return HostSet(image_set, device)
    if free is not None and image_set.nbytes > free:
        raise DataError(
            f"data.keep_on={keep_on!r}: {image_set.name} needs {image_set.nbytes:,} bytes on {device}, where {free:,} "
            "are free; set data.keep_on=host (or auto), which streams it from the host's memory, or free the device's"
        )
    return image_set.to(device)
