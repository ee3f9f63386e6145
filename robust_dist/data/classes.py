"""The classes named by a set's labels, and whether another split's are the same."""

from collections.abc import Iterable, Sequence

import numpy as np

from robust_dist.data.errors import DataError
from robust_dist.data.source import composed

NAMED = 5


class Names(tuple[str, ...]):
    """Sorted names of classes whose labels were names: a number in another split does not index them."""


def check_same_classes(found: Iterable[str], wanted: Iterable[str], name: str) -> None:
    """Raise if a set's classes differ from those of its training split; NFC and NFD forms are the same name.

    Raises:
        DataError: names the classes that `name` lacks, and those it has beyond `wanted`.
    """
    ours, theirs = ({composed(one): one for one in names} for names in (found, wanted))
    missing = sorted(theirs[one] for one in theirs.keys() - ours.keys())
    extra = sorted(ours[one] for one in ours.keys() - theirs.keys())
    parts = [f"lacks {some(missing)}"] * bool(missing) + [f"also has {some(extra)}"] * bool(extra)
    if parts:
        raise DataError(f"{name} must have the training split's classes, but {' and '.join(parts)}")


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first few names, quoted, and how many more there are (of `count`, if not all are given)."""
    more = (len(names) if count is None else count) - NAMED
    return ", ".join(map(repr, names[:NAMED])) + (f" and {more:,} more" if more > 0 else "")


def number_classes(
    distinct: np.ndarray, classes: tuple[str, ...] | None, name: str, num_classes: int | None = None
) -> tuple[str, ...]:
    """The classes of labels that are whole numbers, named after the numbers if `classes` gives no names.

    The work grows with the labels that occur, not with the highest of them.

    Args:
        distinct: the numbers that occur, each once, in any order.
        classes: of the training split, or None.
        name: what error messages call the set.
        num_classes: number of classes, or None: then every number from 0 to the highest must occur.

    Raises:
        DataError: a number is negative or too high or does not occur, or labels are numbers but the training split's
            are names.
    """
    if isinstance(classes, Names):
        raise DataError(
            f"{name} has numbers as labels ({some(sorted(map(str, distinct.tolist())))}), but the training split's "
            f"are names ({some(classes)}): nothing says which number stands for which name"
        )
    highest = int(distinct.max()) if len(distinct) else -1
    count = len(classes) if classes is not None else num_classes or highest + 1
    outside = distinct[(distinct < 0) | (distinct >= count)]
    if len(outside):
        unlabelled = "; -1 usually means a split without labels" if (outside == -1).any() else ""
        raise DataError(
            f"{name} has the label {outside.min()}, outside its {count} classes (0 to {count - 1}){unlabelled}"
        )
    if classes is None and num_classes is None and len(distinct) < count:
        missing = np.setdiff1d(np.arange(len(distinct) + NAMED), distinct)[:NAMED].tolist()
        raise DataError(
            f"{name} has labels up to {count - 1}, but no sample has "
            f"{some([str(number) for number in missing if number < count], count - len(distinct))}: "
            "labels must be 0 to n - 1. Set num_classes if this part of the set lacks some; arbitrary numbers such as "
            "ids cannot be labels"
        )
    return classes if classes is not None else tuple(str(number) for number in range(count))


def text_classes(
    distinct: Sequence[str], classes: tuple[str, ...] | None, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels that are names: each name's label, int32 [n], and the classes: the sorted names, or the given ones.

    The NFC and NFD forms of a name are one class.

    Raises:
        DataError: some names are not in `classes`.
    """
    if classes is None:
        # Of a name's two forms, the first is kept.
        first = {composed(one): one for one in sorted(distinct, reverse=True)}
        classes = Names(sorted(first.values()))
    place = {composed(one): number for number, one in enumerate(classes)}
    foreign = sorted(one for one in distinct if composed(one) not in place)
    if foreign:
        raise DataError(f"{name} must have the training split's classes, but also has {some(foreign)}")
    return np.array([place[composed(one)] for one in distinct], dtype=np.int32), classes


def check_count(classes: tuple[str, ...], num_classes: int | None, name: str) -> None:
    """Raise if the number of classes is not the given one.

    Raises:
        DataError: names both numbers.
    """
    if num_classes not in (None, len(classes)):
        raise DataError(f"{name}: num_classes={num_classes}, but its labels have {len(classes)} classes")
