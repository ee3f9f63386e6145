"""A folder of images, a sub-folder a class: the layout of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from robust_dist.data.classes import Names, check_same_classes, some
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.names import composed
from robust_dist.data.packed import PackedStrings
from robust_dist.data.source import Upright, check_index, turns_upright

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif", ".avif"),
)
SCANNERS = 16
LAYOUT = "an image folder has one sub-folder a class: <folder>/<class>/<image>"


class ImageFolderSource:
    """The images of a folder of class folders; see `open_image_folder`, and `ImageSource` for what it can do."""

    def __init__(
        self,
        root: str,
        folders: Sequence[str],
        labels: Sequence[int],
        classes: tuple[str, ...],
        files: Sequence[Sequence[str]],
        name: str,
        *,
        upright: bool = False,
    ) -> None:
        """Take the class folders below `root`, and for each of them its label and its files."""
        self.name = name
        self.classes = classes
        self._root = root
        self._folders, self._label_of = tuple(folders), tuple(labels)
        self._files = PackedStrings.of(file for of_folder in files for file in of_folder)
        self._folder_of = np.repeat(np.arange(len(folders), dtype=np.int32), [len(one) for one in files])
        self._kind = Upright if upright else bytes
        self.group_sizes: tuple[int, ...] = (len(self._files),)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        check_index(index, self)
        try:
            with open(self.where(index), "rb") as file:
                return self._kind(file.read()), self._label_of[self._folder_of[index]]
        except OSError as error:
            raise BadImageError(error.strerror or str(error)) from error

    def where(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self._root, self._folders[self._folder_of[index]], self._files[index])


def open_image_folder(
    folder: str | Path, *, classes: tuple[str, ...] | None = None, name: str | None = None, exif: str = "auto"
) -> ImageFolderSource:
    """The images in a folder that has a sub-folder for each class, as torchvision's ImageFolder takes them.

    Classes are the sub-folders, sorted; a class's images are sorted by folder, then by name, however the file system
    lists them, and may lie in folders of their own below it. Links are followed. Files count by their extension
    (ImageFolder's, and .gif, .jfif, .avif); hidden ones never do. Listing takes one look at every folder and none at a
    file. All is in the order and with the labels of ImageFolder, where its extensions are the only ones. Folders whose
    names are one in Unicode's two forms (NFC, NFD) are one class, here and in the training split.

    Args:
        folder: which has the class folders.
        classes: of the training split, which this one must have; a class's place in it is its label.
        name: what error messages call the set; the folder where not given.
        exif: "on" turns images upright by their EXIF orientation; "auto" and "off" leave them, as ImageFolder does.

    Raises:
        DataError: no such folder, no class folders, a class without an image, a link that leads back into itself, or
            other classes than `classes`; says what would be right.
    """
    root = os.path.expanduser(folder)
    name = name or root
    upright = turns_upright(exif, auto=False)
    of_class: dict[str, list[str]] = {}
    for one in _class_folders(root, name):
        of_class.setdefault(composed(one), []).append(one)
    found = Names(folders[0] for folders in of_class.values())
    if classes is not None:
        check_same_classes(found, classes, name)
    classes = classes or found
    listed = [(label, below) for label, one in enumerate(classes) for below in of_class[composed(one)]]
    with ThreadPoolExecutor(SCANNERS) as pool:
        files = list(pool.map(lambda one: _images(os.path.join(root, one[1])), listed))
    filled = {label for (label, _), of_folder in zip(listed, files, strict=True) if of_folder}
    empty = [one for label, one in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"{name}: no image in the class folder {some(empty)}. Images end in {', '.join(EXTENSIONS)}")
    labels, folders = zip(*listed, strict=True)
    return ImageFolderSource(root, folders, labels, classes, files, name, upright=upright)


def _class_folders(root: str, name: str) -> tuple[str, ...]:
    where = f"{name}: " if name != root else ""
    if not os.path.exists(root):
        raise DataError(f"{where}there is no folder {os.path.abspath(root)}; {LAYOUT}")
    if not os.path.isdir(root):
        raise DataError(f"{where}{root} is a file; {LAYOUT}")
    with os.scandir(root) as entries:
        found = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if not found:
        raise DataError(f"{where}{root} has no sub-folders; {LAYOUT}")
    return tuple(found)


def _images(folder: str) -> list[str]:
    """Paths below a class folder, in torchvision's order: by the folder's path, then by name."""
    listed = sorted(_walk(folder, "", ()))
    return [os.path.join(below, file) for below, files in listed for file in files]


def _walk(folder: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder's path below `folder`, with the sorted names of its images; `above` are the folders on the way."""
    here = os.path.join(folder, below)
    stat = os.stat(here)
    identity = stat.st_dev, stat.st_ino
    if identity in above:
        raise DataError(f"{here} lies below itself through a link; remove the link")
    files, folders = _entries(here)
    yield below, files
    for one in folders:
        yield from _walk(folder, os.path.join(below, one), (*above, identity))


def _entries(folder: str) -> tuple[list[str], list[str]]:
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
    return sorted(files), folders
