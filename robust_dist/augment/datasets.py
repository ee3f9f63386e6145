"""Map-style datasets that return each sample's index, or augment in a loader's workers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_dist.augment.keys import sample_keys

# By name, to recognise torchvision's and timm's without importing them.
_MIXING = ("CutMix", "MixUp", "Mixup", "RobustAugment")


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise TypeError(f"dataset must have a length and be indexed, got {type(dataset).__name__}") from None


class Indexed(Dataset[Any]):
    """A dataset that appends to each sample its index, from which `sample_keys` computes its key.

    The index stays with its sample when a `DataLoader` or Accelerate shuffles, batches or shards the dataset, so the
    augmentation depends on neither the order nor the world size.

    Args:
        dataset: With `len(dataset)` and `dataset[i]`; samples are tuples, mappings (returned as dicts) or single
            values.
        name: Key of the index in samples that are mappings.

    Raises:
        TypeError: For a dataset without a length; when a sample is fetched, for named tuples, which cannot be extended.
        ValueError: When a sample is fetched that already has an entry `name`.
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
        """A batch of samples, fetched together if the dataset supports it."""
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
    """A dataset whose images are augmented when fetched, in a loader's worker, with the key of (seed, epoch, index).

    The pixels equal those of the same stages on a batch, on any device. CutMix needs other samples: apply it to the
    batch. Call `set_epoch` before each epoch's iterator; persistent workers see the new epoch through shared memory.

    Args:
        dataset: With `len(dataset)` and `dataset[i]`; images are uint8 tensors [C, H, W].
        stages: Called in turn as `stage(images, keys)`: `RandomCrop`, `RandomHorizontalFlip`, `TrivialAugment`.
        seed: The run's seed.
        image: Position of the image in a tuple, or its name in a mapping (returned as a dict) or a named tuple.

    Raises:
        TypeError: For a dataset without a length, and for stages that mix samples; when a sample is fetched, for
            images that are not tensors, and stages that do not return one.
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
        """The epoch of the keys."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from the next sample on; Accelerate's loaders call this themselves."""
        self._epoch.share_memory_().fill_(epoch)  # a copy of the dataset no longer shares its number

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
        # A named tuple takes its fields as arguments, a tuple takes one sequence.
        return type(sample)(*parts) if hasattr(sample, "_fields") else tuple(parts)

    def _place(self, sample: Sequence[Any]) -> int:
        place = self.image
        if isinstance(place, str) and place in getattr(sample, "_fields", ()):
            place = sample._fields.index(place)  # type: ignore[attr-defined]
        if not isinstance(place, int) or not -len(sample) <= place < len(sample):
            raise TypeError(f"image={self.image!r} is not a position in samples that are tuples of {len(sample)}")
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
                raise TypeError(f"stages must return images [1, C, H, W] for images and keys, {name} returned {shape}")
        return images.squeeze(0)


def _check_stage(stage: Any) -> None:
    """Raise TypeError for a stage that cannot augment a single sample."""
    mixing = [kind.__name__ for kind in type(stage).__mro__ if kind.__name__ in _MIXING]
    if mixing:
        raise TypeError(f"{mixing[0]} mixes samples, but Augmented gets one at a time: call it with the batch")
    if not callable(stage):
        raise TypeError(f"stages must be callable as stage(images, keys), got {type(stage).__name__}")
