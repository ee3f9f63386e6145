"""Sets by name whose files are fetched: CIFAR through torchvision's classes, Fashion-MNIST; nothing is written over."""

import gzip
import math
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from robust_dist.data.errors import DataError
from robust_dist.data.image_set import ImageSet
from robust_dist.extras import require

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MARGIN = 2
UINT8_CODE = 0x08
COUNTS = {"train": 60_000, "t10k": 10_000}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@contextmanager
def fetched_beside(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A new, empty folder to fetch into; at the end its files move to the same places below `folder`.

    A file that is there already stays as it is, and links are not moved. Whatever fails, the new folder is removed.

    Args:
        folder: made where it does not exist.
        wanted: which files move, by their names.
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

    All files of both splits are compared with the published MD5 sums first. A file that differs is the user's and is
    never written over; what is missing is fetched where `download` is true.

    Args:
        dataset_class: the class.
        root: the folder that holds the set's own folder.
        train: the training split, else the test split.
        download: fetch missing files.
        own_files: take files that differ from the published ones as they are. They are pickles, which can run any
            code: only for files that you trust.

    Raises:
        DataError: a file differs or is missing and cannot be fetched; names the files, the folder and what to do.
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
    except Exception as error:  # Reading a pickle of unknown origin can raise anything.
        folder = Path(root, dataset_class.base_folder).absolute()
        raise DataError(f"{dataset_class.__name__}: the files in {folder} cannot be read: {error!r}") from error
    name = f"{dataset_class.__name__} ({'train' if train else 'test'})"
    return ImageSet(images, labels, tuple(data.classes), name)


def missing_files(dataset_class: Any, root: Path) -> list[str]:
    """Names of the set's files that are not there."""
    folder = Path(root, dataset_class.base_folder)
    return [name for name, _ in _published(dataset_class) if not (folder / name).is_file()]


def differing_files(dataset_class: Any, root: Path) -> list[str]:
    """Names of the set's files that are there and are not the published ones, by their MD5."""
    folder = Path(root, dataset_class.base_folder)
    found = [(name, md5) for name, md5 in _published(dataset_class) if (folder / name).is_file()]
    return [name for name, md5 in found if not _utils().check_integrity(str(folder / name), md5)]


def _published(dataset_class: Any) -> list[tuple[str, str]]:
    """Each file's name and MD5."""
    meta = dataset_class.meta["filename"], dataset_class.meta["md5"]
    return [*dataset_class.train_list, *dataset_class.test_list, meta]


def _fetch(dataset_class: Any, root: Path, missing: list[str]) -> None:
    """Put the missing files of the archive into their place; an archive that is there and whole is taken."""
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
    """The class without MD5 sums, which then takes any files."""
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
        f"{dataset_class.__name__}: {listed} in {folder}. Allow the download, or fetch "
        f"{dataset_class.url}, put it into {Path(root).absolute()} and unpack it there."
    )


def _differs(dataset_class: Any, root: Path, differing: list[str]) -> str:
    folder = Path(root, dataset_class.base_folder).absolute()
    listed = ", ".join(
        f"{name} ({'torn' if _is_torn(folder / name) else 'not the published file'})" for name in differing
    )
    return (
        f"{dataset_class.__name__}: {listed} in {folder}. Nothing was changed. Move them away to have the published "
        "ones fetched; if they are your own, set data.own_files=true to train on them as they are."
    )


def _is_torn(file: Path) -> bool:
    """Whether a pickle has lost its end."""
    return not file.read_bytes().endswith(pickle.STOP)


def load_fashion_mnist(root: Path, train: bool, download: bool) -> ImageSet:
    """Fashion-MNIST: 28x28 grey, padded with 2 black pixels to 32x32, three equal channels.

    The files (plain or .gz) are looked for in this order: `root`/FashionMNIST/raw (torchvision's layout),
    `root`/fashion-mnist, /usr/share/datasets/fashion-mnist (Debian's package dataset-fashion-mnist). The first folder
    that has both files of the split counts. Where none has and `download` is true, torchvision fetches them into the
    first, and no file that is there is written over.

    Magic numbers, shapes and counts are checked, not the .gz files' checksums: Debian's are recompressed.

    Raises:
        DataError: no folder has the files and they cannot be fetched, or a file is torn; names what to do.
    """
    prefix = "train" if train else "t10k"
    folder = find_folder(root, prefix)
    if folder is None and download:
        _download(root)
        folder = find_folder(root, prefix)
    if folder is None:
        raise DataError(_missing_fashion(root, prefix))
    images, labels = read_pair(folder, prefix, COUNTS[prefix])
    return ImageSet(to_rgb(images), labels, CLASSES, f"FashionMNIST ({'train' if train else 'test'})")


def folders(root: Path) -> list[Path]:
    """Where the files are looked for, in order."""
    return [Path(root, "FashionMNIST", "raw"), Path(root, "fashion-mnist"), DEBIAN_FOLDER]


def find_folder(root: Path, prefix: str) -> Path | None:
    """The first folder that has both files of the split, or None."""
    complete = (folder for folder in folders(root) if not _missing(folder, prefix))
    return next(complete, None)


def read_pair(folder: Path, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 28, 28] and labels int64 [count] of one split.

    Raises:
        DataError: a file is torn, or holds another shape or count.
    """
    names = _names(prefix)
    images, labels = (read_idx(_file(folder, name), ndim) for name, ndim in zip(names, (3, 1), strict=True))
    for name, values, shape in zip(names, (images, labels), ((count, 28, 28), (count,)), strict=True):
        if tuple(values.shape) != shape:
            raise DataError(f"{_file(folder, name)} holds {list(values.shape)} values, not {list(shape)}")
    return images, labels.long()


def to_rgb(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28] to uint8 [N, 3, 32, 32]: a black margin of 2 pixels, three equal channels."""
    return pad(images, (MARGIN,) * 4)[:, None].repeat(1, 3, 1, 1)


def _names(prefix: str) -> tuple[str, str]:
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _missing(folder: Path, prefix: str) -> list[str]:
    return [name for name in _names(prefix) if not _file(folder, name).is_file()]


def _download(root: Path) -> None:
    datasets: Any = require("torchvision.datasets", extra="train", purpose="the download of Fashion-MNIST")
    raw = folders(root)[0]
    have = [name for prefix in COUNTS for name in _names(prefix) if _file(raw, name).is_file()]
    try:
        # A file in one spelling, plain or .gz, is not joined by the other, which might be read in its place.
        with fetched_beside(root, lambda name: name.removesuffix(".gz") not in have) as beside:
            datasets.FashionMNIST(str(beside), download=True)
    except (OSError, EOFError, RuntimeError) as error:
        raise DataError(f"{_missing_fashion(root, 'train')} The download failed: {error}") from error


def _missing_fashion(root: Path, prefix: str) -> str:
    missing = "; ".join(f"{folder.absolute()} lacks {', '.join(_missing(folder, prefix))}" for folder in folders(root))
    return (
        f"FashionMNIST: {missing} (plain or .gz). Allow the download, put the files into one of these folders, "
        "or on Debian and Ubuntu: apt-get install dataset-fashion-mnist."
    )


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a uint8 IDX file of `ndim` dimensions.

    Nothing but the content counts: the magic number and the number of values are checked, no checksum is, since a
    recompressed .gz has another one.

    Raises:
        DataError: no uint8 IDX file of so many dimensions, or fewer or more values than its header says.
    """
    content = _content(path)
    shape = _shape(path, content, ndim)
    header = 4 + 4 * ndim
    found, wanted = len(content) - header, math.prod(shape)
    if found != wanted:
        raise DataError(f"{path} is torn: its header says {wanted:,} values, it holds {found:,}. {_mend(path)}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}). {_mend(path)}") from error


def _shape(path: Path, content: bytes, ndim: int) -> tuple[int, ...]:
    header = 4 + 4 * ndim
    magic = content[:4]
    if len(content) < header or magic != bytes((0, 0, UINT8_CODE, ndim)):
        raise DataError(
            f"{path} is no IDX file of {ndim}-dimensional uint8 data: it begins with {magic.hex() or 'nothing'}, "
            f"not 0000{UINT8_CODE:02x}{ndim:02x}. {_mend(path)}"
        )
    return struct.unpack(f">{ndim}I", content[4:header])


def _mend(path: Path) -> str:
    return f"Delete {path.name} in {path.parent} and start again (or reinstall the package that it came with)."
