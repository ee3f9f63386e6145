"""What a run says of its data sets at the start: where they lie, and how much of the device's memory they take."""

from collections.abc import Sequence
from typing import Any

import torch

from robust_dist.checkpoint.space import text_of
from robust_dist.data.host_set import HostSet
from robust_dist.data.image_set import ImageSet, free_bytes
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
        total = text_of(sum(one.nbytes for one in placed))
        lines.append(f"data on {device}: {total}, {_named(placed)}{_left(device)}")
    if streamed:
        device = streamed[0].device
        why = "" if keep_on == "host" else f" do not fit beside a model on {device}{_left(device)}"
        how = f"batches are copied a step ahead (data.keep_on={keep_on})"
        lines.append(f"data in the host's memory: {_named(streamed)}{why}; {how}")
    return lines


def _named(sets: Sequence[ImageSet | HostSet]) -> str:
    return " and ".join(f"{one.name} ({len(one):,} images, {text_of(one.nbytes)})" for one in sets)


def _left(device: torch.device) -> str:
    free = free_bytes(device)
    return "" if free is None else f"; {text_of(free)} are free there"
