"""Classes: which ones a set's labels name, and whether another split's are the same, said so that a person sees it."""

from collections.abc import Iterable, Sequence

import numpy as np

from robust_dist.data.errors import DataError

NAMED = 5


def check_same_classes(found: Iterable[str], wanted: Iterable[str], name: str) -> None:
    """Raise where a set's classes are not those of the split that it belongs to.

    Raises:
        DataError: names the classes that `name` lacks, and those that it has beyond `wanted`.
    """
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(extra)} beyond them"] * bool(extra)
    if parts:
        raise DataError(f"{name} must have the training split's classes, but {' and '.join(parts)}")


def some(names: Sequence[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more


def number_classes(
    distinct: np.ndarray, classes: tuple[str, ...] | None, name: str, num_classes: int | None = None
) -> tuple[str, ...]:
    """The classes of labels that are whole numbers: named by the number, where `classes` gives no names.

    Args:
        distinct: the numbers that occur, each once, in any order.
        classes: of the training split, or None.
        name: what error messages call the set.
        num_classes: how many there are, or None: then 0 to the highest number must all occur.

    Raises:
        DataError: a number that is negative or too high, or one that does not occur.
    """
    count = len(classes) if classes is not None else num_classes or int(distinct.max(initial=-1)) + 1
    outside = sorted(distinct[(distinct < 0) | (distinct >= count)].tolist())
    if outside:
        unlabelled = "; -1 mostly stands for a split without labels" if -1 in outside else ""
        raise DataError(
            f"{name} has the label {outside[0]}, outside of its {count} classes (0 to {count - 1}){unlabelled}"
        )
    missing = sorted(set(range(count)) - set(distinct.tolist()))
    if missing and classes is None and num_classes is None:
        raise DataError(
            f"{name} has labels up to {count - 1}, but no sample has {some([str(number) for number in missing])}: "
            "labels must be 0 to n - 1"
        )
    return classes if classes is not None else tuple(str(number) for number in range(count))


def text_classes(
    distinct: Sequence[str], classes: tuple[str, ...] | None, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """For labels that are names: each name's label, int32 [n], and the classes: the names, sorted, or the given ones.

    Raises:
        DataError: names that are not in `classes`.
    """
    classes = classes if classes is not None else tuple(sorted(distinct))
    place = {one: number for number, one in enumerate(classes)}
    foreign = sorted(set(distinct) - set(classes))
    if foreign:
        raise DataError(f"{name} must have the training split's classes, but has {some(foreign)} beyond them")
    return np.array([place[one] for one in distinct], dtype=np.int32), classes
