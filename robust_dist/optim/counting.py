"""The step count: a 0-d float32 tensor that keeps counting past 2^24.

Up to 2^24 its value is the count. From there neighbouring float32 values are 2 apart, and adding 1 changes nothing, so
each step moves to the next float32: the bits keep counting. The count is exact on the host and on the device, up to
8.8e8.
"""

import struct
from array import array

import torch
from torch import Tensor

EXACT = 2**24  # EXACT + 1 is not a float32
EXACT_BITS = 0x4B800000  # the bits of 2^24 as float32
_OFFSET = EXACT - EXACT_BITS


def count_of(value: float) -> float:
    """The count that a step tensor's value encodes."""
    if value < EXACT:
        return value
    return float(struct.unpack("i", struct.pack("f", value))[0] + _OFFSET)


def value_of(count: float) -> float:
    """The value of the step tensor that encodes a count."""
    if count < EXACT:
        return count
    return float(struct.unpack("f", struct.pack("i", int(count) - _OFFSET))[0])


def counts_of(steps: Tensor) -> Tensor:
    """`count_of` on tensors, without synchronising.

    Args:
        steps: float32, any shape.

    Returns:
        int64 of the same shape.
    """
    return torch.where(steps < EXACT, steps.to(torch.int64), steps.view(torch.int32).to(torch.int64) + _OFFSET)


def _increments(steps: Tensor) -> Tensor:
    after = (steps.view(torch.int32) + 1).view(torch.float32)
    return (after - steps).clamp(min=1.0)


def increments(steps: list[Tensor]) -> list[Tensor]:
    """The increments of step tensors to their next counts: 1, or the distance to the next float32."""
    if all(step.device == steps[0].device for step in steps):
        return list(_increments(torch.stack(steps)).unbind())
    return list(map(_increments, steps))


def views(values: "array[float]") -> list[Tensor]:
    """0-d float32 CPU tensors that are views of the elements of an array("f")."""
    return list(torch.frombuffer(values, dtype=torch.float32).unbind())


def advanced(steps: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """The next counts on the host, and new CPU step tensors for them."""
    values = list(map(Tensor.item, steps))
    if max(values) < EXACT:
        counts = values = [value + 1.0 for value in values]
    else:
        counts = [count_of(value) + 1.0 for value in values]
        values = list(map(value_of, counts))
    # Much cheaper than foreach's addition, which is slow for 0-d tensors.
    return counts, views(array("f", values))
