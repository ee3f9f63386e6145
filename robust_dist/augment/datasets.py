"""Map-style data sets that know which sample is which: for loaders and for workers that augment."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_dist.augment.keys import sample_keys


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise TypeError(f"dataset must have a length and be indexed, got {type(dataset).__name__}") from None


class Indexed(Dataset[Any]):
    """Each sample of a data set with its own index at its end, from which `sample_keys` makes its key.

    Whatever shuffles, batches or shards the samples afterwards (a `DataLoader`, Accelerate), the index goes with them,
    so that their augmentation depends neither on the order nor on the world size.

    Args:
        dataset: With `len(dataset)` and `dataset[i]`; samples are tuples, dicts, or single values.
        name: Of the index in samples that are dicts.

    Raises:
        TypeError: For a data set without a length.
    """

    def __init__(self, dataset: Any, name: str = "index") -> None:
        _length(dataset)
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        return self._named(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch at once, where the data set can fetch one."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples: Iterable[Any] = fetch(list(indices)) if fetch else (self.dataset[i] for i in indices)
        return [self._named(sample, index) for sample, index in zip(samples, indices, strict=True)]

    def _named(self, sample: Any, index: int) -> Any:
        if isinstance(sample, dict):
            return {**sample, self.name: int(index)}
        return (*sample, int(index)) if isinstance(sample, (tuple, list)) else (sample, int(index))


class Augmented(Dataset[Any]):
    """Samples whose image is augmented where it is fetched, in a loader's worker, by the key of (seed, epoch, index).

    The pixels are those of the same stages on a batch on any device. CutMix needs other samples: it stays with the
    batch. Call `set_epoch` before each epoch's iterator; workers that live on see the number, which they share.

    Args:
        dataset: With `len(dataset)` and `dataset[i]`; images are uint8 tensors [C, H, W].
        stages: Called in turn as `stage(images, keys)`: `RandomCrop`, `RandomHorizontalFlip`, `TrivialAugment`.
        seed: Of the run.
        image: Where the image is in a sample: a place in a tuple, or a name in a dict.

    Raises:
        TypeError: For a data set without a length, and for images that are no tensors; names their type.
    """

    def __init__(
        self,
        dataset: Any,
        stages: Iterable[Callable[[Tensor, Tensor], Tensor]],
        seed: int = 0,
        *,
        image: int | str = 0,
    ) -> None:
        _length(dataset)
        self.dataset = dataset
        self.stages = list(stages)
        self.seed = seed
        self.image = image
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that keys are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from the next sample on; Accelerate's loaders call it by themselves."""
        self._epoch.share_memory_().fill_(epoch)  # a copy of the data set does not share its number any more

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        sample = self.dataset[index]
        if isinstance(sample, dict):
            return {**sample, self.image: self._augment(sample.get(str(self.image)), index)}
        if not isinstance(sample, (tuple, list)) or not isinstance(self.image, int):
            raise TypeError(f"samples must be tuples, or dicts with image=NAME, got {type(sample).__name__}")
        parts = list(sample)
        parts[self.image] = self._augment(parts[self.image], index)
        return tuple(parts)

    def _augment(self, image: Any, index: int) -> Tensor:
        if not isinstance(image, Tensor):
            raise TypeError(f"image={self.image!r} must be a uint8 tensor [C, H, W], got {type(image).__name__}")
        images, keys = image.unsqueeze(0), sample_keys(self.seed, self.epoch, [index])
        for stage in self.stages:
            images = stage(images, keys)
        return images.squeeze(0)
