"""splitmix64's output function in wrapping int64 operations, bit-identical on every device."""

from torch import Tensor


def signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> places) & (2 ** (64 - places) - 1)


def mix(x: Tensor) -> Tensor:
    """64 well-mixed bits of each int64, as int64."""
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def mix_int(x: int) -> int:
    """`mix` of a Python integer modulo 2**64, as an unsigned integer."""
    x %= 2**64
    x = (x ^ (x >> 30)) * _MIX_1 % 2**64
    x = (x ^ (x >> 27)) * _MIX_2 % 2**64
    return x ^ (x >> 31)
