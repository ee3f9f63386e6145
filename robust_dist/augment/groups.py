"""The kinds of operations, and two ways to run each of them on its own samples of a batch."""

from collections.abc import Callable
from enum import IntEnum
from itertools import accumulate

import torch
from torch import Tensor


class Kind(IntEnum):
    """What computes an operation; from LEVELS on, a table from level to level does."""

    NOTHING = 0
    WARP = 1
    COLOR = 2
    SHARPNESS = 3
    LEVELS = 4
    CONTRAST = 5
    AUTOCONTRAST = 6
    EQUALIZE = 7


class Masked:
    """Every function sees every sample, and masks choose: static shapes, no waiting for the device."""

    def __init__(self, kind: Tensor) -> None:
        """Take the `Kind` of each sample, int64 [B]."""
        self._kind = kind

    def update(
        self, out: Tensor, kinds: tuple[Kind, Kind], function: Callable[..., Tensor], *arguments: Tensor
    ) -> Tensor:
        """`out` with `function(*arguments)` in the samples whose kind lies between two, inclusive."""
        mask = (self._kind >= int(kinds[0])) & (self._kind <= int(kinds[1]))
        return torch.where(mask.view(-1, *[1] * (out.dim() - 1)), function(*arguments), out)


class Grouped:
    """Every function sees its own samples alone, which lie together; `out` changes in place."""

    def __init__(self, kind: Tensor, chunk: int) -> None:
        """Take the `Kind` of each sample, int64 [B], ascending, and how many samples fit the processor's cache."""
        counts = torch.bincount(kind, minlength=len(Kind)).tolist()
        self._bounds = [0, *accumulate(counts)]
        self._chunk = chunk

    def update(
        self, out: Tensor, kinds: tuple[Kind, Kind], function: Callable[..., Tensor], *arguments: Tensor
    ) -> Tensor:
        """`out`, changed in place, with `function(*arguments)` in the samples between two kinds, inclusive."""
        start, stop = self._bounds[kinds[0]], self._bounds[kinds[1] + 1]
        pieces = -((start - stop) // self._chunk)
        for piece in range(pieces):
            part = slice(start + (stop - start) * piece // pieces, start + (stop - start) * (piece + 1) // pieces)
            out[part] = function(*(a[part] for a in arguments))
        return out
