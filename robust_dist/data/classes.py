"""Classes by name: whether two splits have the same ones, said so that a person sees the difference."""

from collections.abc import Iterable, Sequence

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
