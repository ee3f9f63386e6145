"""Which figures of an epoch measure the machine and the moment, and so differ between two equal runs."""

from typing import Any

MEASURED = frozenset(
    {
        "images_per_second",
        "images_per_second_per_rank",
        "data_wait_share",
        "checkpoint_seconds",
        "peak_memory_gib",
        "mfu",
    }
)


def without_measured(row: dict[str, Any]) -> dict[str, Any]:
    """An epoch's object without its measured figures: what two equal runs must agree on to the bit."""
    return {key: value for key, value in row.items() if key not in MEASURED}
