"""Finding the columns of an image table, and reading its labels, by the feature types of `datasets`."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_dist.data.classes import check_count, check_same_classes, number_classes, text_classes
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.extras import require

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXT = ("string", "large_string", "string_view")
BINARY = ("binary", "large_binary", "binary_view")
RIGHT = {
    "image_column": f"an Image, {', '.join(BINARY)}, a struct of bytes and path, or, for paths, {', '.join(TEXT)}",
    "label_column": f"a ClassLabel, {', '.join((*WHOLE, *TEXT))}",
}


def find_columns(features: Mapping[str, Any], image: str | None, label: str | None, name: str) -> tuple[str, str]:
    """The names of the image column and the label column.

    Args:
        features: `datasets.Features`: column to feature type.
        image: the image column, or None for the only one with an image type.
        label: the label column, or None for the only ClassLabel.
        name: what error messages call the set.

    Raises:
        DataError: a named column does not exist or has the wrong type, or no column or several could be meant; lists
            the columns with their types.
    """
    return (
        _find(features, image, "image_column", _is_image, _can_be_image, name),
        _find(features, label, "label_column", is_class_label, _can_be_label, name),
    )


def plain_labels(
    column: Any, classes: tuple[str, ...] | None, name: str, num_classes: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int32 [N] and classes of a column of whole numbers or strings, a `pyarrow.ChunkedArray`.

    See `number_classes` and `text_classes`.

    Raises:
        DataError: a label is missing or an empty string (names the first such row), or is outside the classes.
    """
    types = require("pyarrow", extra="data", purpose="labels from a table").types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column if types.is_integer(column.type) else _without_empty(column)
    if values.null_count:
        first = values.is_null().to_pylist().index(True)
        raise DataError(f"{name}: {values.null_count:,} samples have no label, the first is row {first}")
    if types.is_integer(column.type):
        numbers = values.to_numpy()
        found = number_classes(np.unique(numbers), classes, name, num_classes)
        labels = numbers.astype(np.int32)
    else:
        labels, found = _strings(values.dictionary_encode(), classes, name)
    check_count(found, num_classes, name)
    return labels, found


def class_labels(feature: Any, classes: tuple[str, ...] | None, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of a ClassLabel: the label of each of its numbers, int32 [n], and the classes.

    Raises:
        DataError: its names are not `classes`, if given.
    """
    names = tuple(feature.names)
    if classes is None:
        return np.arange(len(names), dtype=np.int32), names
    check_same_classes(names, classes, name)
    place = {one: number for number, one in enumerate(classes)}
    return np.array([place[one] for one in names], dtype=np.int32), classes


def image_bytes(value: Any, beside: Sequence[str] = ()) -> bytes:
    """The encoded image in a cell: bytes, a local file's path, or a struct of bytes and path.

    Args:
        value: the cell.
        beside: the folders of the table's files, where a relative path is looked up before the working folder.

    Raises:
        BadImageError: the cell is empty, its file cannot be read, or several files match.
    """
    content, path = _parts(value)
    if content is not None:
        return bytes(content)
    if path is None:
        raise BadImageError("the cell holds neither bytes nor a path")
    try:
        with open(_found(path, beside), "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"{path}: {error.strerror or error}") from error


def path_of(value: Any) -> str | None:
    """The path named in a cell, if any."""
    return _parts(value)[1]


def _parts(value: Any) -> tuple[Any, str | None]:
    """A cell's bytes and path, either of which may be missing."""
    if isinstance(value, Mapping):
        return value.get("bytes"), value.get("path")
    return (None, value) if isinstance(value, str) else (value, None)


def _found(path: str, beside: Sequence[str]) -> str:
    if os.path.isabs(path):
        return path
    found = [file for folder in beside if os.path.exists(file := os.path.join(folder, path))]
    if len(found) > 1:
        raise BadImageError(f"{path} matches both {found[0]} and {found[1]}: the table's files are in several folders")
    return found[0] if found else path


def is_class_label(feature: Any) -> bool:
    """Whether a feature is a ClassLabel, which has its classes' names."""
    return isinstance(feature, _features().ClassLabel)


def is_image_feature(feature: Any) -> bool:
    """Whether a feature is an Image, which `datasets` would decode."""
    return isinstance(feature, _features().Image)


def _features() -> Any:
    return require("datasets", extra="data", purpose="labels from a table")


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
            raise DataError(
                f"{name}: {setting}={wanted!r} has the wrong type: it must be {RIGHT[setting]}; "
                f"the columns are: {listed}"
            )
        return wanted
    found = [column for column, feature in features.items() if told(feature)]
    if len(found) == 1:
        return found[0]
    count = "none" if not found else f"{len(found)} ({', '.join(found)})"
    raise DataError(
        f"{name}: {count} of the columns can be the {setting} by type; set {setting}. It must be {RIGHT[setting]}. "
        f"The columns are: {listed}"
    )


def _is_image(feature: Any) -> bool:
    return is_image_feature(feature) or (_is_struct(feature) and {"bytes"} <= set(feature) <= {"bytes", "path"})


def _can_be_image(feature: Any) -> bool:
    return is_image_feature(feature) or _dtype(feature) in (*BINARY, *TEXT) or _is_struct(feature)


def _is_struct(feature: Any) -> bool:
    """Whether a feature is a struct of bytes and path, or of one of them, with suitable types."""
    if not isinstance(feature, Mapping) or not {"bytes", "path"} & set(feature):
        return False
    wanted = {"bytes": BINARY, "path": TEXT}
    # A column without any value has the type "null".
    return all(_dtype(feature[key]) in (*types, "null") for key, types in wanted.items() if key in feature)


def _can_be_label(feature: Any) -> bool:
    return is_class_label(feature) or _dtype(feature) in (*WHOLE, *TEXT)


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, _features().Value) else ""


def _type_name(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return f"struct of {', '.join(f'{key}: {_type_name(one)}' for key, one in feature.items())}"
    return _dtype(feature) or type(feature).__name__


def _without_empty(column: Any) -> Any:
    """A string column with empty strings turned into nulls; view types need a cast first."""
    compute = require("pyarrow.compute", extra="data", purpose="labels from a table")
    text = column.cast("large_string")
    return compute.if_else(compute.equal(compute.utf8_trim_whitespace(text), ""), None, text)


def _strings(column: Any, classes: tuple[str, ...] | None, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    encoded = column.unify_dictionaries() if column.num_chunks > 1 else column
    distinct = encoded.chunk(0).dictionary.to_pylist()
    label_of, classes = text_classes(distinct, classes, name)
    return label_of[np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])], classes
