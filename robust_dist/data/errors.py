"""What the data room raises, or notes, when a file is not what it should be."""

from typing import NamedTuple


class DataError(ValueError):
    """A data set's file is missing, torn or foreign, or the set does not fit the device."""


class BadImageError(ValueError):
    """One image that cannot be read or decoded, with the reason; it is skipped and counted."""


class BadImage(NamedTuple):
    """What is noted of an image that was skipped.

    Attributes:
        where: `ImageSource.where` of it.
        reason: what was wrong.
    """

    where: str
    reason: str


class WorkersLostError(RuntimeError):
    """A worker process that reads images ended in mid-epoch, or was killed."""
