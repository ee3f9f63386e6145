"""Image folders: one folder per class. Without separate parts, a hash of each name selects images for evaluation."""

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from robust_dist.data.classes import Names, check_same_classes, some
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.identity import fingerprint
from robust_dist.data.source import PackedStrings, Upright, check_index, composed, turns_upright

_RANGE = 2**64
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif", ".avif"),
)
SCANNERS = 16
# Parts of a set, which are not classes.
PARTS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing"}
LAYOUT = "an image folder has one sub-folder per class: <folder>/<class>/<image>"


@dataclass(frozen=True)
class Split:
    """A selection of evaluation images.

    Attributes:
        eval_share: Fraction of the images, above 0 and below 1.
        seed: Different seeds select different images.
    """

    eval_share: float
    seed: int = 0

    def evaluates(self, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Bool [N]: which images are for evaluation.

        An image is for evaluation if its name's hash is below the share. A class of two or more images has at least one
        in each part: if hashes alone would leave a part empty, the image with the lowest or highest hash goes there. A
        class's only image is for training.

        Args:
            names: Unique names of the images.
            labels: Labels of the images, whole numbers [N].
        """
        hashes = np.array([self._hash(name) for name in names], dtype=np.uint64)
        chosen = hashes < np.uint64(int(self.eval_share * _RANGE))
        order = np.lexsort((hashes, labels))
        for places in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            if len(places) < 2:
                chosen[places] = False
            elif not chosen[places].any():
                chosen[places[0]] = True
            elif chosen[places].all():
                chosen[places[-1]] = False
        return chosen

    def _hash(self, name: str) -> int:
        key = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(composed(name).encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little")


HIDDEN, LOOSE = "hidden", "outside of the class folders"


class ImageFolderSource:
    """The images in a folder of class folders; see `open_image_folder`, and `ImageSource` for its methods.

    Attributes:
        folder: the folder that contains the class folders.
        left_out: reasons, each with the number of files (or hidden folders) left out for it.
        split: by which these are one part of the folder's images; None if they are all of them.
    """

    split: Split | None = None

    def __init__(
        self,
        folder: str,
        below: Sequence[str],
        labels: Sequence[int],
        classes: tuple[str, ...],
        files: Sequence[Sequence[str]],
        name: str,
        *,
        left_out: Mapping[str, int] = MappingProxyType({}),
        upright: bool = False,
    ) -> None:
        """Scan the class folders `below` the folder, with each one's label and files."""
        self.name = name
        self.classes = classes
        self.folder = folder
        self.left_out = tuple(sorted(left_out.items()))
        self._below, self._label_of = tuple(below), np.array(labels, dtype=np.int32)
        self._files = PackedStrings.of(file for of_folder in files for file in of_folder)
        self._folder_of = np.repeat(np.arange(len(below), dtype=np.int32), [len(one) for one in files])
        self._kind = Upright if upright else bytes
        self.group_sizes: tuple[int, ...] = (len(self._files),)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        check_index(index, self)
        try:
            with open(self.where(index), "rb") as file:
                return self._kind(file.read()), int(self._label_of[self._folder_of[index]])
        except OSError as error:
            raise BadImageError(error.strerror or str(error)) from error

    def glance(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`: the file's path, size and times, which change when the file does."""
        check_index(index, self)
        path = os.path.realpath(self.where(index))
        try:
            found = os.stat(path)
        except OSError as error:
            raise BadImageError(error.strerror or str(error)) from error
        said = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, self._kind is Upright)
        return os.fsencode(path) + repr(said).encode(), int(self._label_of[self._folder_of[index]])

    def where(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.folder, self._below[self._folder_of[index]], self._files[index])

    @property
    def labels(self) -> np.ndarray:
        """The images' labels, int32 [N]."""
        labels: np.ndarray = self._label_of[self._folder_of]
        return labels

    def part(self, split: Split, *, evaluation: bool) -> "ImageFolderSource":
        """The images for evaluation, or those for training.

        Raises:
            DataError: none is left for evaluation, because each class has one image.
        """
        labels = self.labels
        names = [f"{self.classes[label]}/{file}" for label, file in zip(labels, self._files, strict=True)]
        chosen = split.evaluates(names, labels)
        if not chosen.any():
            raise DataError(f"{self.name}: each class has one image, so none is left for evaluation")
        kept = chosen if evaluation else ~chosen
        made = copy.copy(self)
        made._files = PackedStrings.of(self._files[index] for index in np.flatnonzero(kept).tolist())
        made._folder_of, made.split = self._folder_of[kept], split
        made.group_sizes = (len(made._files),)
        made.name = f"{self.name} ({'evaluation' if evaluation else 'training'} part)"
        return made

    def fingerprint(self) -> str:
        """A hash of the files' paths below their class folders, and of their labels."""
        return fingerprint(self._files.data, self._files.bounds, self.labels)


def open_image_folder(
    folder: str | Path, *, classes: tuple[str, ...] | None = None, name: str | None = None, exif: str = "auto"
) -> ImageFolderSource:
    """The images in a folder with one sub-folder per class, as in torchvision's ImageFolder.

    Classes are the sub-folders, sorted; a class's images are sorted by folder, then by name, independent of the file
    system's order, and may be in sub-folders. Links are followed. Files are selected by extension (ImageFolder's, and
    .gif, .jfif, .avif); hidden ones are always skipped; `left_out` counts the others. Listing reads every folder once
    and opens no file. Order and labels are ImageFolder's if only its extensions occur. Folders whose names are equal up
    to Unicode normalisation (NFC, NFD) are one class, here and in the training split.

    Args:
        folder: the folder that contains the class folders.
        classes: of the training split, which this one must have; a class's index in it is its label.
        name: what error messages call the set; by default the folder.
        exif: "on" turns images upright by their EXIF orientation; "auto" and "off" leave them, as ImageFolder does.

    Raises:
        DataError: the folder or its class folders do not exist, a class has no image, a link leads back into itself,
            the classes are not `classes`, or the folder is one level too high; says what would be right.
    """
    root = os.path.expanduser(folder)
    name = name or root
    upright = turns_upright(exif, auto=False)
    names, left_out = _class_folders(root, name)
    of_class: dict[str, list[str]] = {}
    for one in names:
        of_class.setdefault(composed(one), []).append(one)
    found = Names(folders[0] for folders in of_class.values())
    if classes is not None:
        check_same_classes(found, classes, name)
    classes = classes or found
    places = [(label, below) for label, one in enumerate(classes) for below in of_class[composed(one)]]
    with ThreadPoolExecutor(SCANNERS) as pool:
        listed = list(pool.map(lambda one: _images(os.path.join(root, one[1])), places))
    files = [of_folder for of_folder, _ in listed]
    labels, folders = zip(*places, strict=True)
    filled = {label for label, of_folder in zip(labels, files, strict=True) if of_folder}
    empty = [one for label, one in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"{name}: no image in the class folder {some(empty)}. Images end in {', '.join(EXTENSIONS)}")
    _check_level(classes, files, name)
    for _, more in listed:
        left_out += more
    return ImageFolderSource(root, folders, labels, classes, files, name, left_out=left_out, upright=upright)


def _check_level(classes: tuple[str, ...], files: list[list[str]], name: str) -> None:
    """Reject a folder whose sub-folders contain the class folders and no images of their own."""
    if len(classes) > 1 and not {one.lower() for one in classes} <= PARTS:
        return
    below = sorted({file.partition(os.sep)[0] for of_class in files for file in of_class if os.sep in file})
    if len(below) > 1 and all(os.sep in file for of_class in files for file in of_class):
        raise DataError(
            f"{name} is one level too high: its only class{'es' * (len(classes) > 1)} would be {some(classes)}, which "
            f"has no images of its own and the sub-folders {some(below)}; name the folder that holds those. {LAYOUT}"
        )


def _class_folders(root: str, name: str) -> tuple[tuple[str, ...], Counter[str]]:
    """The class folders' names, sorted, and what lies beside them."""
    where = f"{name}: " if name != root else ""
    if not os.path.exists(root):
        raise DataError(f"{where}there is no folder {os.path.abspath(root)}; {LAYOUT}")
    if not os.path.isdir(root):
        raise DataError(f"{where}{root} is a file; {LAYOUT}")
    found: list[str] = []
    left_out: Counter[str] = Counter()
    with os.scandir(root) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            if not hidden and entry.is_dir():
                found.append(entry.name)
            else:
                left_out[HIDDEN if hidden else LOOSE] += 1
    if not found:
        raise DataError(f"{where}{root} has no sub-folders; {LAYOUT}")
    return tuple(sorted(found)), left_out


def _images(folder: str) -> tuple[list[str], Counter[str]]:
    """Image paths below a class folder in torchvision's order (folder's path, then name), and what is left out."""
    left_out: Counter[str] = Counter()
    listed = sorted(_walk(folder, "", (), left_out))
    return [os.path.join(below, file) for below, files in listed for file in files], left_out


def _walk(
    folder: str, below: str, above: tuple[tuple[int, int], ...], left_out: Counter[str]
) -> Iterator[tuple[str, list[str]]]:
    """Each folder's path below `folder`, with the sorted names of its images; `above` are its parent folders."""
    here = os.path.join(folder, below)
    stat = os.stat(here)
    identity = stat.st_dev, stat.st_ino
    if identity in above:
        raise DataError(f"{here} contains itself through a link; remove the link")
    files, folders = _entries(here, left_out)
    yield below, files
    for one in folders:
        yield from _walk(folder, os.path.join(below, one), (*above, identity), left_out)


def _entries(folder: str, left_out: Counter[str]) -> tuple[list[str], list[str]]:
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                left_out[HIDDEN] += 1
            elif entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "no extension"] += 1
    return sorted(files), folders
