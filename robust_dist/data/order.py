"""The order of an epoch, a function of (seed, epoch): of a set in memory, and of one that lies in groups."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from robust_dist.augment.keys import Stream, bits, permutation, sample_keys
from robust_dist.data.batch import Request
from robust_dist.data.batches import Run


class Order(Protocol):
    """Every sample of a set once."""

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """Runs of positions of the global batch that lies at the positions start to stop of the order."""
        ...


class Permutation:
    """The order of a set that lies whole in memory: drawn at once with its keys, of which requests are views.

    Args:
        seed: of the run.
        epoch: which epoch.
        count: samples of the set.
        device: where indices and keys are made.
    """

    def __init__(self, seed: int, epoch: int, count: int, device: torch.device) -> None:
        self.indices = permutation(seed, epoch, count, device)
        self.keys = sample_keys(seed, epoch, self.indices)

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """See `Order.requests`."""
        indices, keys = self.indices[start:stop], self.keys[start:stop]
        return [Request(indices[low:high], keys[low:high]) for low, high in runs]


class EpochOrder:
    """The order of a set that lies in groups: shuffled, and yet a rank reads few groups at a time.

    The groups (shards, row groups) are permuted and taken together, in that order, to windows of `window` samples or a
    little more; the samples of a window are permuted. One group, or a window as large as the set, makes that a
    permutation of the whole set, and `augment.keys.permutation` where there is one group. A batch's samples are then
    sorted by their group, so that ranks, which take contiguous parts of it, read different groups, and the same ones
    at the next step.

    It holds one window's indices at a time (4 or 8 bytes a sample, and some 50 for a moment while it is drawn), and
    a number for each group.

    Args:
        seed: of the run.
        epoch: which epoch.
        group_sizes: samples of each group of consecutive indices, see `ImageSource.group_sizes`.
        window: samples that are shuffled among each other, at least.
    """

    def __init__(self, seed: int, epoch: int, group_sizes: Sequence[int], window: int) -> None:
        self.seed, self.epoch = seed, epoch
        self.group_sizes = group_sizes
        self.group_starts = [0, *accumulate(group_sizes)]
        self.dtype = torch.int32 if self.group_starts[-1] < 2**31 else torch.int64
        self.windows = _windows(self._permuted_groups(), group_sizes, window)
        sizes = (sum(group_sizes[group] for group in groups) for groups in self.windows)
        self.window_starts = [0, *accumulate(sizes)]
        self._number, self._held = -1, (torch.empty(0), torch.empty(0))

    def requests(self, start: int, stop: int, runs: Sequence[Run]) -> list[Request]:
        """See `Order.requests`."""
        indices = self.batch(start, stop)
        return [Request(indices[low:high], sample_keys(self.seed, self.epoch, indices[low:high])) for low, high in runs]

    def batch(self, start: int, stop: int) -> Tensor:
        """The samples at the positions start to stop of the order, as one global batch: int64 [stop - start]."""
        indices, places, found = [], [], start
        while found < stop:
            number = bisect_right(self.window_starts, found) - 1
            end = min(stop, self.window_starts[number + 1])
            part = slice(found - self.window_starts[number], end - self.window_starts[number])
            window = self._window(number)
            indices.append(window[0][part])
            places.append(window[1][part])
            found = end
        by_group = torch.argsort(torch.cat(places), stable=True)
        return torch.cat(indices)[by_group].long()

    def _permuted_groups(self) -> list[int]:
        # Groups are counted backwards from -1, so that no draw of theirs is a sample's.
        numbers = torch.arange(-1, -len(self.group_sizes) - 1, -1, dtype=torch.int64)
        drawn = bits(sample_keys(self.seed, self.epoch, numbers), Stream.ORDER)
        order: list[int] = torch.argsort(drawn, stable=True).tolist()
        return [group for group in order if self.group_sizes[group]]

    def _window(self, number: int) -> tuple[Tensor, Tensor]:
        """The shuffled indices of a window, and for each the place of its group among the window's groups."""
        if number != self._number:
            self._held = self._draw(self.windows[number], self.window_starts[number])
            self._number = number
        return self._held

    def _draw(self, groups: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        indices = torch.cat([torch.arange(self.group_starts[g], self.group_starts[g + 1]) for g in groups])
        order = torch.argsort(bits(sample_keys(self.seed, self.epoch, indices), Stream.ORDER), stable=True)
        indices = indices[order].to(self.dtype)
        # `start` puts a later window's groups behind an earlier one's in a batch that has both.
        places = torch.arange(start, start + len(groups), dtype=self.dtype)
        if len(groups) == 1:
            return indices, places.expand(len(indices))
        sizes = torch.tensor([self.group_sizes[group] for group in groups])
        return indices, torch.repeat_interleave(places, sizes)[order]


def _windows(groups: Sequence[int], sizes: Sequence[int], window: int) -> list[list[int]]:
    """Consecutive groups together, until they hold `window` samples."""
    windows: list[list[int]] = []
    room = 0
    for group in groups:
        if room <= 0:
            windows.append([])
            room = window
        windows[-1].append(group)
        room -= sizes[group]
    return windows
