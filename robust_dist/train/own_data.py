"""Image sets of the user's own: what `fit` is given, and what `data.name: module:Name` stands for."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_dist import own_code
from robust_dist.data.image_set import ImageSet
from robust_dist.data.registry import DATASETS, DatasetInfo, dataset_info

if TYPE_CHECKING:
    from robust_dist.train.data_config import DataConfig

_KEY = "data.name"
_read: dict[str, DatasetInfo] = {}


def info_of(data: "DataConfig") -> DatasetInfo:
    """The record of a set by name, or of the user's own, whose images are read for it.

    Raises:
        ValueError: An unknown name, or a set of one's own that cannot be imported or used.
    """
    if not own_code.is_name(data.name):
        return dataset_info(data.name)
    found = own_code.load(_KEY, data.name)
    if isinstance(found, DatasetInfo):
        return found
    key = f"{data.name} {data.root} {data.options}"
    if key not in _read:
        check_own_set(data.name, found, data)
        train = _made(data, found, train=True)
        _read[key] = info_of_sets(
            train, _made(data, found, train=False, classes=train.classes), partial(_made, data, found)
        )
    return _read[key]


def known_info(data: "DataConfig") -> DatasetInfo | None:
    """The record of a set by name, or of the user's own; None of image files."""
    return info_of(data) if own_code.is_name(data.name) and data.source is None else DATASETS.get(data.name)


def check_own_set(name: str, found: Any, data: "DataConfig") -> None:
    """Refuse what is no set of images; nothing is read.

    Raises:
        OwnCodeError: It is not callable, or does not take what it is called with.
    """
    if isinstance(found, DatasetInfo):
        return
    is_model = isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module))
    if is_model or not callable(found):
        wanted = "a Dataset class or a function of train (bool), a DatasetInfo or a SourceChoice"
        raise own_code.wrong(_KEY, name, found, wanted)
    own_code.check_call(_KEY, name, found, **_arguments(data, found, train=True))


def _arguments(data: "DataConfig", found: Any, *, train: bool) -> dict[str, Any]:
    known = {"root": data.root, "download": data.download}
    return {"train": train, **{key: one for key, one in known.items() if own_code.takes(found, key)}, **data.options}


def _made(data: "DataConfig", found: Any, *, train: bool, classes: Sequence[str] | None = None) -> ImageSet:
    given = own_code.call(_KEY, data.name, found, **_arguments(data, found, train=train))
    return image_set(given, f"{data.name} ({'train' if train else 'eval'})", classes)


def info_of_sets(train_set: ImageSet, eval_set: ImageSet, again: Any = None) -> DatasetInfo:
    """The record of two sets in memory: the training images' mean and deviation, crops padded by an eighth, flips.

    Args:
        train_set: Training images.
        eval_set: Evaluation images.
        again: Called with `train` and `classes` for a part that was given out already; None gives the same out again.
    """
    kept: dict[bool, ImageSet] = {True: train_set, False: eval_set}
    classes = train_set.classes

    def load(root: Any, train: bool, download: bool) -> ImageSet:
        # Not held here for the run, which may have a copy on a device.
        found = kept.get(train) if again is None else kept.pop(train, None)
        return again(train=train, classes=classes) if found is None else found

    scaled = train_set.images.double() / 255
    return DatasetInfo(
        num_classes=len(train_set.classes),
        channels=train_set.channels,
        size=train_set.images.shape[-1],
        mean=tuple(scaled.mean((0, 2, 3)).tolist()),
        # A channel that is the same everywhere stays as it is.
        std=tuple(deviation or 1.0 for deviation in scaled.std((0, 2, 3)).tolist()),
        crop_padding=round(train_set.images.shape[-1] / 8),
        flip=True,
        description="of the user's own",
        loader=load,
    )


def image_set(given: Any, name: str, classes: Sequence[str] | None = None) -> ImageSet:
    """Images of the user's own as an ImageSet on the CPU.

    Args:
        given: An ImageSet; a pair of images (uint8 [N, C, H, H]) and labels (int64 [N]); or a map-style data set of
            (PIL image or uint8 [C, H, H], label), which is read once.
        name: Of the set, for messages.
        classes: Names where the set has no `classes` of its own; numbers up to the highest label where None.

    Raises:
        ValueError: Images of several sizes, or not square, named with the first one's place; or something else.
    """
    if isinstance(given, ImageSet):
        return given
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], Tensor):
        images, labels = given
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        images, labels = _stacked([given[index] for index in range(len(given))], name)
    else:
        raise ValueError(
            f"{name}: a {type(given).__name__} is no set of images; give a pair of images (uint8 [N, C, H, H]) and "
            "labels (int64 [N]), or a data set with __len__ and __getitem__ of (PIL image or uint8 [C, H, H], label)"
        )
    if images.ndim == 4 and images.shape[2] != images.shape[3]:
        raise ValueError(f"{name}: images of {images.shape[2]}x{images.shape[3]} are not square; crop or pad them")
    count = int(labels.max()) + 1 if len(labels) else 0
    names = getattr(given, "classes", None) or (classes if classes and count <= len(classes) else range(count))
    return ImageSet(images, labels, tuple(map(str, names)), name)


def _stacked(samples: list[Any], name: str) -> tuple[Tensor, Tensor]:
    tensors = [_pixels(sample[0]) for sample in samples]
    sizes = [tuple(tensor.shape) for tensor in tensors]
    other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise ValueError(
            f"{name}: image {other} is {sizes[other]}, and image 0 is {sizes[0]}; give images of one size, or "
            "train from files of any size with data.name=imagefolder, hub or webdataset"
        )
    return torch.stack(tensors), torch.tensor([int(sample[1]) for sample in samples])


def _pixels(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
