"""What the data room raises when a file is not what it should be."""


class DataError(ValueError):
    """A data set's file is missing, torn or foreign, or the set does not fit the device."""


class BadImageError(ValueError):
    """One image that cannot be read or decoded, with the reason; it is skipped and counted."""
