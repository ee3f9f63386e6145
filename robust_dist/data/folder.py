"""A folder of images, a sub-folder a class: the layout of torchvision's ImageFolder."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from robust_dist.data.classes import check_same_classes, some
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.packed import PackedStrings
from robust_dist.data.source import check_index

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif", ".avif"),
)
SCANNERS = 16
LAYOUT = "an image folder has one sub-folder a class: <folder>/<class>/<image>"


class ImageFolderSource:
    """The images of a folder of class folders; see `open_image_folder`, and `ImageSource` for what it can do."""

    def __init__(self, folder: str, classes: tuple[str, ...], files: list[list[str]], name: str) -> None:
        self.name = name
        self.classes = classes
        self._folder = folder
        self._files = PackedStrings.of(file for of_class in files for file in of_class)
        counts = [len(of_class) for of_class in files]
        self._labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        self.group_sizes: tuple[int, ...] = (len(self._files),)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        check_index(index, self)
        try:
            with open(self.where(index), "rb") as file:
                return file.read(), int(self._labels[index])
        except OSError as error:
            raise BadImageError(error.strerror or str(error)) from error

    def where(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self._folder, self.classes[self._labels[index]], self._files[index])


def open_image_folder(
    folder: str | Path, *, classes: tuple[str, ...] | None = None, name: str | None = None
) -> ImageFolderSource:
    """The images in a folder that has a sub-folder for each class, as torchvision's ImageFolder takes them.

    Classes are the sub-folders, sorted; a class's images are sorted by folder, then by name, however the file system
    lists them, and may lie in folders of their own below it. Links are followed. Files count by their extension
    (ImageFolder's, and .gif, .jfif, .avif); hidden ones never do. Listing takes one look at every folder and none at a
    file. All is in the order and with the labels of ImageFolder, where its extensions are the only ones.

    Args:
        folder: which has the class folders.
        classes: of the training split, which this one must have; a class's place in it is its label.
        name: what error messages call the set; the folder where not given.

    Raises:
        DataError: no such folder, no class folders, a class without an image, a link that leads back into itself, or
            other classes than `classes`; says what would be right.
    """
    root = os.path.expanduser(folder)
    name = name or root
    found = _class_folders(root, name)
    if classes is not None:
        check_same_classes(found, classes, name)
    classes = classes or found
    with ThreadPoolExecutor(SCANNERS) as pool:
        files = list(pool.map(lambda one: _images(os.path.join(root, one)), classes))
    empty = [one for one, of_class in zip(classes, files, strict=True) if not of_class]
    if empty:
        raise DataError(f"{name}: no image in the class folder {some(empty)}. Images end in {', '.join(EXTENSIONS)}")
    return ImageFolderSource(root, classes, files, name)


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
