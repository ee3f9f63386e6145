"""What a run says of its data sets at the start: where they lie, and how much of the device's memory they take."""

from collections.abc import Sequence
from typing import Any

import torch

from robust_dist.checkpoint.space import text_of
from robust_dist.data.host_set import HostSet
from robust_dist.data.image_set import ImageSet, free_bytes
from robust_dist.data.placement import SHARE
from robust_dist.data.sets import LabelledSet


def data_notes(sets: Sequence[LabelledSet]) -> list[dict[str, Any]]:
    """What `environment.json` notes of each set; those that are read while training have no bytes to tell.

    Args:
        sets: Of the run.

    Returns:
        For each: its name, images, bytes, where it lies, and how many of its bytes lie on the training device.
    """
    return [
        {
            "name": one.name,
            "images": len(one),
            "bytes": one.nbytes,
            "kept_on": str(one.device) if isinstance(one, ImageSet) else "host",
            "device_bytes": one.nbytes if isinstance(one, ImageSet) else 0,
        }
        for one in sets
        if isinstance(one, (ImageSet, HostSet))
    ]


def data_lines(sets: Sequence[LabelledSet], keep_on: str) -> list[str]:
    """What a person is told: a line a place.

    Args:
        sets: Of the run.
        keep_on: The recipe's `data.keep_on`.
    """
    placed = [one for one in sets if isinstance(one, ImageSet)]
    streamed = [one for one in sets if isinstance(one, HostSet)]
    lines = []
    if placed:
        device = placed[0].device
        free = free_bytes(device)
        left = "" if free is None else f" ({text_of(free)} are free there)"
        lines.append(f"{_sum(placed)} of data on {device}{left}: {_named(placed)}")
    if streamed:
        where = f"in the host's memory{_reason(streamed[0].device, keep_on)}"
        lines.append(f"{_sum(streamed)} of data {where}; batches are copied a step ahead: {_named(streamed)}")
    return lines


def _reason(device: torch.device, keep_on: str) -> str:
    free = free_bytes(device)
    if keep_on == "host" or free is None:
        return f" (data.keep_on={keep_on})"
    return f", too much for {SHARE:.0%} of the {text_of(free)} that are free on {device} (data.keep_on={keep_on})"


def _sum(sets: Sequence[ImageSet | HostSet]) -> str:
    return text_of(sum(one.nbytes for one in sets))


def _named(sets: Sequence[ImageSet | HostSet]) -> str:
    return "; ".join(f"{one.name}, {text_of(one.nbytes)} in {len(one):,} images" for one in sets)
