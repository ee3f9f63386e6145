"""Which columns of a table of images count, and what its labels are, by the feature types of `datasets`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robust_dist.data.classes import check_same_classes, number_classes, text_classes
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.extras import require

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXT = ("string", "large_string")
BINARY = ("binary", "large_binary")


def find_columns(features: Mapping[str, Any], image: str | None, label: str | None, name: str) -> tuple[str, str]:
    """The names of the image column and the label column.

    Args:
        features: `datasets.Features`: column to feature type.
        image: the image column, or None for the only one whose type says so.
        label: the label column, or None for the only ClassLabel.
        name: what error messages call the set.

    Raises:
        DataError: a named column does not exist or has no fitting type, or the types tell none or several; lists the
            columns with their types.
    """
    return (
        _find(features, image, "image_column", _is_image, _can_be_image, name),
        _find(features, label, "label_column", is_class_label, _can_be_label, name),
    )


def plain_labels(column: Any, classes: tuple[str, ...] | None, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int32 [N] and classes of a column of whole numbers or of strings.

    See `number_classes` and `text_classes`.

    Args:
        column: a `pyarrow.ChunkedArray`.
        classes: of the training split, or None.
        name: what error messages call the set.

    Raises:
        DataError: a missing label (names the first row without one), or one that is outside of the classes.
    """
    if column.null_count:
        first = column.is_null().to_pylist().index(True)
        raise DataError(f"{name}: {column.null_count:,} samples have no label, the first is row {first}")
    pyarrow = require("pyarrow", extra="data", purpose="labels from a table")
    if not pyarrow.types.is_integer(column.type):
        return _strings(column.dictionary_encode(), classes, name)
    values = column.to_numpy().astype(np.int64)
    return values.astype(np.int32), number_classes(np.unique(values), classes, name)


def class_labels(feature: Any, classes: tuple[str, ...] | None, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """For a ClassLabel: the label of each of its numbers, int32 [n], and the classes.

    Raises:
        DataError: other names than `classes`, where given.
    """
    names = tuple(feature.names)
    if classes is None:
        return np.arange(len(names), dtype=np.int32), names
    check_same_classes(names, classes, name)
    place = {one: number for number, one in enumerate(classes)}
    return np.array([place[one] for one in names], dtype=np.int32), classes


def image_bytes(value: Any) -> bytes:
    """The encoded image in a cell: bytes, or a struct of bytes and path, of which the path may name a local file.

    Raises:
        BadImageError: the cell is empty, or its file cannot be read.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is not None:
        return bytes(content)
    path = value.get("path") if isinstance(value, dict) else None
    if path is None:
        raise BadImageError("the cell holds neither bytes nor a path")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"{path}: {error.strerror or error}") from error


def is_class_label(feature: Any) -> bool:
    """Whether a feature is a ClassLabel, which knows its classes' names."""
    return type(feature).__name__ == "ClassLabel"


def _find(
    features: Mapping[str, Any],
    wanted: str | None,
    setting: str,
    told: Callable[[Any], bool],
    allowed: Callable[[Any], bool],
    name: str,
) -> str:
    listed = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{name} has no column {setting}={wanted!r}; it has: {listed}")
        if not allowed(features[wanted]):
            raise DataError(f"{name}: {setting}={wanted!r} has no type for that; the columns are: {listed}")
        return wanted
    found = [column for column, feature in features.items() if told(feature)]
    if len(found) == 1:
        return found[0]
    count = "none" if not found else f"{len(found)} ({', '.join(found)})"
    raise DataError(f"{name}: {count} of the columns can be {setting} by type; set {setting}. There are: {listed}")


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"})


def _can_be_image(feature: Any) -> bool:
    return _is_image(feature) or _dtype(feature) in BINARY


def _can_be_label(feature: Any) -> bool:
    return is_class_label(feature) or _dtype(feature) in (*WHOLE, *TEXT)


def _dtype(feature: Any) -> str:
    return feature.dtype if type(feature).__name__ == "Value" else ""


def _type_name(feature: Any) -> str:
    return _dtype(feature) or type(feature).__name__


def _strings(column: Any, classes: tuple[str, ...] | None, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    encoded = column.unify_dictionaries() if column.num_chunks > 1 else column
    distinct = encoded.chunk(0).dictionary.to_pylist()
    label_of, classes = text_classes(distinct, classes, name)
    return label_of[np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])], classes
