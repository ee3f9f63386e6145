"""What the data room raises or records when a file is wrong."""

from typing import NamedTuple


class DataError(ValueError):
    """A data set's file is missing, torn or not the expected one, or the set does not fit on the device."""


class BadImageError(ValueError):
    """One image that cannot be read or decoded, with the reason; it is skipped and counted."""


class BadImage(NamedTuple):
    """The record of an image that was skipped.

    Attributes:
        where: its `ImageSource.where`.
        reason: what was wrong.
    """

    where: str
    reason: str


class WorkersLostError(RuntimeError):
    """A worker process that reads images died in mid-epoch."""
