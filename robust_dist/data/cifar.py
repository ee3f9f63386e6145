"""CIFAR-10 and CIFAR-100 through torchvision's classes; no file is overwritten."""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robust_dist.data.errors import DataError
from robust_dist.data.image_set import ImageSet
from robust_dist.extras import require


@contextmanager
def fetched_beside(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A new, empty folder to download into; at the end its files move to the same places below `folder`.

    Existing files are kept, and links are not moved. The new folder is always removed.

    Args:
        folder: created if missing.
        wanted: selects the files that move, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as beside:
        yield Path(beside)
        _move_missing(Path(beside), folder, wanted)


def _move_missing(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if entry.is_symlink():
            continue
        if entry.is_dir():
            there.mkdir(exist_ok=True)
            _move_missing(entry, there, wanted)
        elif wanted(entry.name) and not os.path.lexists(there):
            os.rename(entry, there)


def load_cifar10(root: Path, train: bool, download: bool, own_files: bool = False) -> ImageSet:
    """CIFAR-10 from `root`/cifar-10-batches-py; see `load_with`."""
    return load_with(_torchvision().CIFAR10, root, train=train, download=download, own_files=own_files)


def load_cifar100(root: Path, train: bool, download: bool, own_files: bool = False) -> ImageSet:
    """CIFAR-100 (100 fine classes) from `root`/cifar-100-python; see `load_with`."""
    return load_with(_torchvision().CIFAR100, root, train=train, download=download, own_files=own_files)


def load_with(dataset_class: Any, root: Path, *, train: bool, download: bool, own_files: bool = False) -> ImageSet:
    """Load a set through torchvision's `CIFAR10` or a subclass of it.

    First, all files of both splits are compared with the published MD5 sums. A file that differs is the user's and is
    never overwritten; missing files are downloaded if `download` is true.

    Args:
        dataset_class: the class.
        root: the folder that contains the set's own folder.
        train: the training split; otherwise the test split.
        download: download missing files.
        own_files: accept files that differ from the published ones. They are pickles, which can run any code: only for
            files that you trust.

    Raises:
        DataError: a file differs, or is missing and cannot be downloaded; the message names the files, the folder and
        the remedy.
    """
    missing, differing = missing_files(dataset_class, root), differing_files(dataset_class, root)
    if differing and not own_files:
        raise DataError(_differs(dataset_class, root, differing))
    if missing and not download:
        raise DataError(_missing_cifar(dataset_class, root, missing))
    if missing:
        _fetch(dataset_class, root, missing)
    found = _unchecked(dataset_class) if differing else dataset_class
    try:
        data = found(str(root), train=train, download=False)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(data.targets, dtype=torch.int64)
    except Exception as error:  # Unpickling can raise anything.
        folder = Path(root, dataset_class.base_folder).absolute()
        raise DataError(f"{dataset_class.__name__}: the files in {folder} cannot be read: {error!r}") from error
    name = f"{dataset_class.__name__} ({'train' if train else 'test'})"
    return ImageSet(images, labels, tuple(data.classes), name)


def missing_files(dataset_class: Any, root: Path) -> list[str]:
    """Names of the set's missing files."""
    folder = Path(root, dataset_class.base_folder)
    return [name for name, _ in _published(dataset_class) if not (folder / name).is_file()]


def differing_files(dataset_class: Any, root: Path) -> list[str]:
    """Names of the set's files that differ from the published ones by MD5."""
    folder = Path(root, dataset_class.base_folder)
    found = [(name, md5) for name, md5 in _published(dataset_class) if (folder / name).is_file()]
    return [name for name, md5 in found if not _utils().check_integrity(str(folder / name), md5)]


def _published(dataset_class: Any) -> list[tuple[str, str]]:
    """Each file's name and MD5."""
    meta = dataset_class.meta["filename"], dataset_class.meta["md5"]
    return [*dataset_class.train_list, *dataset_class.test_list, meta]


def _fetch(dataset_class: Any, root: Path, missing: list[str]) -> None:
    """Put the archive's missing files in place; an existing, intact archive is used."""
    archive = Path(root, dataset_class.filename)
    try:
        with fetched_beside(Path(root)) as beside:
            if _utils().check_integrity(str(archive), dataset_class.tgz_md5):
                (beside / archive.name).symlink_to(archive.absolute())
            _utils().download_and_extract_archive(
                dataset_class.url, str(beside), filename=archive.name, md5=dataset_class.tgz_md5
            )
    except (OSError, EOFError, RuntimeError) as error:
        raise DataError(f"{_missing_cifar(dataset_class, root, missing)} The download failed: {error}") from error


def _unchecked(dataset_class: Any) -> Any:
    """The class without MD5 sums, so that it accepts any files."""
    lists = {key: [[name, None] for name, _ in getattr(dataset_class, key)] for key in ("train_list", "test_list")}
    return type(dataset_class.__name__, (dataset_class,), {**lists, "meta": {**dataset_class.meta, "md5": None}})


def _torchvision() -> Any:
    return require("torchvision.datasets", extra="train", purpose="CIFAR")


def _utils() -> Any:
    return require("torchvision.datasets.utils", extra="train", purpose="CIFAR")


def _missing_cifar(dataset_class: Any, root: Path, missing: list[str]) -> str:
    folder = Path(root, dataset_class.base_folder).absolute()
    listed = ", ".join(f"{name} (missing)" for name in missing)
    return (
        f"{dataset_class.__name__}: {listed} in {folder}. Allow the download, or get "
        f"{dataset_class.url}, put it into {Path(root).absolute()} and unpack it there."
    )


def _differs(dataset_class: Any, root: Path, differing: list[str]) -> str:
    folder = Path(root, dataset_class.base_folder).absolute()
    listed = ", ".join(
        f"{name} ({'torn' if _is_torn(folder / name) else 'not the published file'})" for name in differing
    )
    return (
        f"{dataset_class.__name__}: {listed} in {folder}. Nothing was changed. Move them away to get the published "
        "ones; if they are your own, set data.own_files=true to train on them as they are."
    )


def _is_torn(file: Path) -> bool:
    """Whether a pickle has lost its end."""
    return not file.read_bytes().endswith(pickle.STOP)
