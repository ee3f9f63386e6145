"""What a loader asks of images that do not fit on a device: random access to encoded files and their labels."""

from typing import Protocol


class Upright(bytes):
    """An encoded image that `decode_rgb` turns as its EXIF orientation says; other bytes it leaves as they are."""


class ImageSource(Protocol):
    """A labelled set of encoded images (JPEG, PNG, ...) that can be read in any order.

    A source is picklable and holds no open file when it is: each worker of a loader opens what it reads. It may also
    have `fingerprint() -> str`, a cheap hash of names and labels; `left_out`, reasons with how many files do not count
    for each; `stretches()`, for `identity.shared_images`; and `glance(index) -> (bytes, label)`, whose bytes change
    where the sample's file does, and tell whether it is `Upright`: a cache then need not read what it has.

    Attributes:
        name: what error messages call the set.
        classes: the name of each class, in the labels' order.
        group_sizes: samples in each stretch of consecutive indices that lies together on the disk (a tar shard, a
            row group of a parquet file); they add up to `len(source)`. A folder of files is one group.
    """

    name: str
    classes: tuple[str, ...]
    group_sizes: tuple[int, ...]

    def __len__(self) -> int:
        """How many samples there are; the same on every rank."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image (`Upright`, where EXIF is to turn it) and the label of one sample.

        Raises:
            BadImageError: this sample cannot be read (the file is gone, its entry is torn); others may be.
        """
        ...

    def where(self, index: int) -> str:
        """What a person looks for to find the sample: a file's path, or a shard's and the name in it."""
        ...


def check_index(index: int, source: ImageSource) -> None:
    """Refuse an index that is no sample's, a negative one too.

    Raises:
        IndexError: names the set and how many samples it has.
    """
    if not 0 <= index < len(source):
        raise IndexError(f"index {index} is outside of the {len(source):,} samples of {source.name}")


def turns_upright(exif: str, *, auto: bool) -> bool:
    """Whether a source turns images by EXIF, of "auto", "on" or "off"; `auto` is what this kind of source does.

    Raises:
        ValueError: another word.
    """
    if exif not in ("auto", "on", "off"):
        raise ValueError(f"exif must be 'auto', 'on' or 'off', not {exif!r}")
    return exif == "on" or (exif == "auto" and auto)
