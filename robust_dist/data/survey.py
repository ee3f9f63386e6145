"""A survey of an image folder before training: layout, classes, sizes, colours, bad files."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robust_dist.data.classes import some
from robust_dist.data.decode import decode_rgb, is_turned
from robust_dist.data.errors import BadImage, BadImageError, DataError
from robust_dist.data.folder import EXTENSIONS, LAYOUT, ImageFolderSource, open_image_folder
from robust_dist.data.identity import spread

TRAIN, EVAL = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test", "testing")
# Number of a folder's images that are decoded.
LOOKED_AT = 1_000
_OTHER_FORMATS = {".tar": "imagenet_resnet50_shards", ".parquet": "hub", ".arrow": "hub"}
# Grey images saved lossily as colour have channels that differ by up to this much.
_GREY, _THUMBNAIL = 8, 64


@dataclass(frozen=True)
class Layout:
    """Where the images of a folder are.

    Attributes:
        root: The folder that contains the parts or, without parts, the class folders.
        train: Name of the training part's folder; None if class folders lie in `root`.
        eval: Name of the evaluation part's folder.
        notes: What was skipped on the way there.
    """

    root: Path
    train: str | None = None
    eval: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """The findings.

    Attributes:
        layout: Where the images are.
        classes: Names of the classes.
        train: Images per class; of all images if the folder has no parts.
        eval: Images per class in the evaluation part; empty if there is none.
        left_out: Number of files that are not images, by reason.
        sizes: Width and height of the decoded images.
        bad: Images that cannot be decoded.
        grey: Number of images without colour.
        turned: Number of images with an EXIF orientation.
        mean: Per channel over the decoded images, on the scale 0 to 1.
        std: Per channel, likewise.
        copies: Duplicate files, each with the earlier file that it equals.
    """

    layout: Layout
    classes: tuple[str, ...]
    train: tuple[int, ...]
    eval: tuple[int, ...]
    left_out: dict[str, int]
    sizes: tuple[tuple[int, int], ...]
    bad: tuple[BadImage, ...]
    grey: int
    turned: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    copies: tuple[tuple[str, str], ...]

    @property
    def looked_at(self) -> int:
        """Number of images read."""
        return len(self.sizes) + len(self.bad)

    @property
    def images(self) -> int:
        """Number of images in all."""
        return sum(self.train) + sum(self.eval)


def find_layout(folder: Path) -> Layout:
    """Where a folder's images are: in parts, in class folders, or one folder further down.

    Raises:
        DataError: The folder does not exist or has no class folders; says what would be right.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'not there'}; name a folder; {LAYOUT}")
    notes: list[str] = []
    while True:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        train, test = (_called([path.name for path in below], names) for names in (TRAIN, EVAL))
        if train is not None:
            return Layout(folder, train, test, tuple(notes))
        if len(below) != 1 or not _has_folders_alone(below[0]):
            break
        folder = below[0]
        notes.append(f"{folder.parent} contains only {folder.name}, which contains the image folders")
    if not below:
        raise DataError(f"{folder} has no sub-folders and {_contents(folder)}; {LAYOUT}")
    return Layout(folder, notes=tuple(notes))


def _called(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for one in wanted for name in names if name.lower() == one), None)


def _has_folders_alone(folder: Path) -> bool:
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return any(path.is_dir() for path in found) and not any(path.suffix.lower() in EXTENSIONS for path in found)


def _contents(folder: Path) -> str:
    endings = Counter(path.suffix.lower() for path in folder.iterdir() if path.is_file())
    images = sum(count for ending, count in endings.items() if ending in EXTENSIONS)
    other = next((ending for ending in _OTHER_FORMATS if endings[ending]), None)
    if other is not None:
        return f"{endings[other]} {other} files: for these start from the recipe {_OTHER_FORMATS[other]}"
    return f"{images:,} images: put each into a sub-folder named after its class" if images else "no images"


def survey(folder: Path) -> Survey:
    """Survey a folder; in a large one, `LOOKED_AT` evenly spread images are decoded.

    Raises:
        DataError: It is not a folder of images in classes.
    """
    layout = find_layout(folder)
    train = open_image_folder(layout.root / layout.train if layout.train else layout.root)
    test = open_image_folder(layout.root / layout.eval, classes=train.classes) if layout.eval else None
    sources = [train] if test is None else [train, test]
    places = [(source, index) for source in sources for index in range(len(source))]
    looks = _Looks()
    for place in spread(len(places), LOOKED_AT):
        looks.look(*places[place])
    if not looks.sizes:
        named = some([f"{bad.where}: {bad.reason}" for bad in looks.bad])
        raise DataError(f"{folder}: none of {len(looks.bad)} images can be read: {named}")
    left_out = sum((Counter(dict(source.left_out)) for source in sources), Counter[str]())
    mean, std = looks.statistics()
    return Survey(
        layout,
        train.classes,
        _counts(train),
        () if test is None else _counts(test),
        dict(left_out),
        tuple(looks.sizes),
        tuple(looks.bad),
        looks.grey,
        looks.turned,
        mean,
        std,
        tuple(looks.copies),
    )


def _counts(source: ImageFolderSource) -> tuple[int, ...]:
    return tuple(np.bincount(source.labels, minlength=len(source.classes)).tolist())


class _Looks:
    """Accumulates statistics of single images."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.bad: list[BadImage] = []
        self.copies: list[tuple[str, str]] = []
        self.grey = self.turned = 0
        self._seen: dict[bytes, str] = {}
        self._means: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []

    def look(self, source: ImageFolderSource, index: int) -> None:
        where = source.where(index)
        try:
            data, _ = source.read(index)
            image = decode_rgb(data)
        except BadImageError as error:
            self.bad.append(BadImage(where, str(error)))
            return
        first = self._seen.setdefault(hashlib.blake2b(data).digest(), where)
        if first != where:
            self.copies.append((where, first))
        self.sizes.append(image.size)
        self.turned += is_turned(data)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        levels = np.asarray(image, dtype=np.float64)
        self.grey += bool(np.ptp(levels, axis=2).max() <= _GREY)
        self._means.append(levels.mean((0, 1)) / 255)
        self._squares.append((levels**2).mean((0, 1)) / 255**2)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all images."""
        mean = np.mean(self._means, 0)
        std = np.sqrt(np.maximum(np.mean(self._squares, 0) - mean**2, 1e-4))
        return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())
