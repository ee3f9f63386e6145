"""Map-style data sets that know which sample is which: for loaders and for workers that augment."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_dist.augment.keys import sample_keys

# By name: torchvision's and timm's are no part of this package.
_MIXING = ("CutMix", "MixUp", "Mixup", "RobustAugment")


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
        dataset: With `len(dataset)` and `dataset[i]`; samples are tuples, mappings (given out as dicts), or single
            values.
        name: Of the index in samples that are mappings.

    Raises:
        TypeError: For a data set without a length. When a sample is fetched, for named tuples, which have no room for
            an index.
        ValueError: When a sample is fetched that has something under `name` already.
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
        places = range(len(self))
        indices = [places[index] for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        samples: Iterable[Any] = fetch(indices) if fetch else (self.dataset[i] for i in indices)
        return [self._named(sample, index) for sample, index in zip(samples, indices, strict=True)]

    def _named(self, sample: Any, index: int) -> Any:
        if isinstance(sample, Mapping):
            if self.name in sample:
                raise ValueError(
                    f"samples have {self.name!r} already: give the index another name, Indexed(..., name=NAME)"
                )
            return {**sample, self.name: index}
        if hasattr(sample, "_fields"):
            raise TypeError(f"samples must not be named tuples, got {type(sample).__name__}: give tuples or dicts")
        return (*sample, index) if isinstance(sample, (tuple, list)) else (sample, index)


class Augmented(Dataset[Any]):
    """Samples whose image is augmented where it is fetched, in a loader's worker, by the key of (seed, epoch, index).

    The pixels are those of the same stages on a batch on any device. CutMix needs other samples: it stays with the
    batch. Call `set_epoch` before each epoch's iterator; workers that live on see the number, which they share.

    Args:
        dataset: With `len(dataset)` and `dataset[i]`; images are uint8 tensors [C, H, W].
        stages: Called in turn as `stage(images, keys)`: `RandomCrop`, `RandomHorizontalFlip`, `TrivialAugment`.
        seed: Of the run.
        image: Where the image is in a sample: a place in a tuple, or a name in a mapping (given out as a dict) or in a
            named tuple.

    Raises:
        TypeError: For a data set without a length, and for stages that mix samples. When a sample is fetched, for
            images that are no tensors, and stages that do not give one; names the type.
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
        for stage in self.stages:
            _check_stage(stage)
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
        if isinstance(sample, Mapping):
            return {**sample, self.image: self._augment(sample.get(self.image), index)}
        if not isinstance(sample, (tuple, list)):
            raise TypeError(f"samples must be tuples, or dicts with image=NAME, got {type(sample).__name__}")
        place, parts = self._place(sample), list(sample)
        parts[place] = self._augment(parts[place], index)
        # Named tuples are made of their fields, other ones of one sequence.
        return type(sample)(*parts) if hasattr(sample, "_fields") else tuple(parts)

    def _place(self, sample: Sequence[Any]) -> int:
        place = self.image
        if isinstance(place, str) and place in getattr(sample, "_fields", ()):
            place = sample._fields.index(place)  # type: ignore[attr-defined]
        if not isinstance(place, int) or not -len(sample) <= place < len(sample):
            raise TypeError(f"image={self.image!r} is no place in samples that are tuples of {len(sample)}")
        return place

    def _augment(self, image: Any, index: int) -> Tensor:
        if not isinstance(image, Tensor):
            raise TypeError(f"image={self.image!r} must be a uint8 tensor [C, H, W], got {type(image).__name__}")
        images, keys = image.unsqueeze(0), sample_keys(self.seed, self.epoch, [index])
        for stage in self.stages:
            images = stage(images, keys)
            if not isinstance(images, Tensor) or images.shape[:1] != (1,):
                shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
                name = type(stage).__name__
                raise TypeError(f"stages must give images [1, C, H, W] for images and keys, {name} gave {shape}")
        return images.squeeze(0)


def _check_stage(stage: Any) -> None:
    """Raise for what cannot augment a sample on its own."""
    mixing = [kind.__name__ for kind in type(stage).__mro__ if kind.__name__ in _MIXING]
    if mixing:
        raise TypeError(f"{mixing[0]} mixes samples, which Augmented has one at a time: call it with the batch")
    if not callable(stage):
        raise TypeError(f"stages must be called as stage(images, keys), got {type(stage).__name__}")
