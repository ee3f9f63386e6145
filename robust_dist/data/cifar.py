"""CIFAR-10 and CIFAR-100 through torchvision's classes, whole, without one PIL image."""

from pathlib import Path
from typing import Any

import torch

from robust_dist.data.errors import DataError
from robust_dist.data.image_set import ImageSet
from robust_dist.extras import require


def load_cifar10(root: Path, train: bool, download: bool) -> ImageSet:
    """CIFAR-10 from `root`/cifar-10-batches-py; see `load_with`."""
    return load_with(_torchvision().CIFAR10, root, train=train, download=download)


def load_cifar100(root: Path, train: bool, download: bool) -> ImageSet:
    """CIFAR-100 (100 fine classes) from `root`/cifar-100-python; see `load_with`."""
    return load_with(_torchvision().CIFAR100, root, train=train, download=download)


def load_with(dataset_class: Any, root: Path, *, train: bool, download: bool) -> ImageSet:
    """Load a set through torchvision's `CIFAR10` or a subclass of it.

    All files of both splits are checked by their MD5 first. Nothing is fetched or written where they are right, or
    where `download` is false.

    Raises:
        DataError: a file is missing or torn and cannot be fetched; names the files, the folder and what to do.
    """
    bad = broken_files(dataset_class, root)
    if bad and not download:
        raise DataError(_message(dataset_class, root, bad))
    try:
        data = dataset_class(str(root), train=train, download=bool(bad))
    except (OSError, EOFError, RuntimeError) as error:
        raise DataError(f"{_message(dataset_class, root, bad)} The download failed: {error}") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(data.targets, dtype=torch.int64)
    name = f"{dataset_class.__name__} ({'train' if train else 'test'})"
    return ImageSet(images, labels, tuple(data.classes), name)


def broken_files(dataset_class: Any, root: Path) -> list[str]:
    """The set's files that are missing or torn (wrong MD5), each with which of the two it is."""
    check = require("torchvision.datasets.utils", extra="train", purpose="CIFAR").check_integrity
    folder = Path(root, dataset_class.base_folder)
    meta = [dataset_class.meta["filename"], dataset_class.meta["md5"]]
    listed = [*dataset_class.train_list, *dataset_class.test_list, meta]
    return [
        f"{name} ({'torn' if (folder / name).exists() else 'missing'})"
        for name, md5 in listed
        if not check(str(folder / name), md5)
    ]


def _torchvision() -> Any:
    return require("torchvision.datasets", extra="train", purpose="CIFAR")


def _message(dataset_class: Any, root: Path, bad: list[str]) -> str:
    folder = Path(root, dataset_class.base_folder).absolute()
    return (
        f"{dataset_class.__name__}: {', '.join(bad) or 'the files'} in {folder}. Allow the download, or fetch "
        f"{dataset_class.url}, put it into {Path(root).absolute()} and unpack it there."
    )
