"""Fashion-MNIST, downloaded or from Debian's package; no file is overwritten."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from robust_dist.data.cifar import fetched_beside
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


def load_fashion_mnist(root: Path, train: bool, download: bool) -> ImageSet:
    """Fashion-MNIST: 28x28 grey, padded with 2 black pixels to 32x32, in three equal channels.

    The files (plain or .gz) are looked for in this order: `root`/FashionMNIST/raw (torchvision's layout),
    `root`/fashion-mnist, /usr/share/datasets/fashion-mnist (Debian's package dataset-fashion-mnist). The first folder
    with both files of the split is used. If there is none and `download` is true, torchvision downloads them into the
    first, without overwriting any file.

    Magic numbers, shapes and counts are checked, but not the .gz files' checksums: Debian's are recompressed.

    Raises:
        DataError: no folder has the files and they cannot be downloaded, or a file is torn; says what to do.
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
    """The folders to look in, in order."""
    return [Path(root, "FashionMNIST", "raw"), Path(root, "fashion-mnist"), DEBIAN_FOLDER]


def find_folder(root: Path, prefix: str) -> Path | None:
    """The first folder with both files of the split, or None."""
    complete = (folder for folder in folders(root) if not _missing(folder, prefix))
    return next(complete, None)


def read_pair(folder: Path, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 28, 28] and labels int64 [count] of one split.

    Raises:
        DataError: a file is torn, or has another shape or count.
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
        # Do not put a file beside its other spelling, plain or .gz, which might be read in its place.
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

    The magic number and the number of values are checked, but no checksum, since a recompressed .gz has another one.

    Raises:
        DataError: not a uint8 IDX file with this many dimensions, or fewer or more values than its header says.
    """
    content = _content(path)
    shape = _shape(path, content, ndim)
    header = 4 + 4 * ndim
    found, wanted = len(content) - header, math.prod(shape)
    if found != wanted:
        raise DataError(f"{path} is torn: its header says {wanted:,} values, but it has {found:,}. {_mend(path)}")
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
            f"{path} is not an IDX file of {ndim}-dimensional uint8 data: it begins with {magic.hex() or 'nothing'}, "
            f"not 0000{UINT8_CODE:02x}{ndim:02x}. {_mend(path)}"
        )
    return struct.unpack(f">{ndim}I", content[4:header])


def _mend(path: Path) -> str:
    return f"Delete {path.name} in {path.parent} and start again (or reinstall the package that it came with)."
