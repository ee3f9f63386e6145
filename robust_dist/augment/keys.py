"""Keyed draws: every random number is a pure function of (seed, epoch, sample index, purpose).

A key is splitmix64's output at a counter, computed only with wrapping int64 operations, so that processors,
devices, eager and compiled code agree bit for bit, and there is no generator state to save or share.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import count

import torch
from torch import Tensor

from robust_dist.augment.checks import readable
from robust_dist.splitmix import GOLDEN, mix, mix_int, shift, signed


class Stream(IntEnum):
    """The purpose of a draw; two purposes never share a stream. Renumbering changes every run."""

    ORDER = 0
    OPERATION = 1
    MAGNITUDE = 2
    SIGN = 3
    CROP_TOP = 4
    CROP_LEFT = 5
    FLIP = 6
    CUTMIX_APPLY = 7
    CUTMIX_SHARE = 8
    CUTMIX_X = 9
    CUTMIX_Y = 10
    CUTMIX_PARTNER = 11
    RESIZED_CROP = 12


def _counting(numbers: range, device: torch.device | str | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        # Inductor turns arithmetic on an arange into index expressions, whose integers do not wrap at 64 bits.
        return torch.tensor(list(numbers), dtype=torch.int64, device=device)
    return torch.arange(numbers.start, numbers.stop, numbers.step, dtype=torch.int64, device=device)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _counter(name: str, value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not _is_integer(value):
            raise TypeError(f"{name} must be an int or a 0-d integer tensor, got {value.dtype} {list(value.shape)}")
        return value.long()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a 0-d integer tensor, got {type(value).__name__}")
    return torch.tensor(value if -(2**63) <= value < 2**63 else signed(value), dtype=torch.int64)


def _indices(indices: Tensor | Sequence[int]) -> Tensor:
    if isinstance(indices, range):
        return _counting(indices)
    tensor = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
    if tensor.dim() != 1:
        raise ValueError(f"indices must have one dimension, got shape {list(tensor.shape)}")
    if tensor.numel() and not _is_integer(tensor):
        raise TypeError(f"indices must be integers, got {tensor.dtype}")
    return tensor.long()


def sample_keys(seed: int | Tensor, epoch: int | Tensor, indices: Tensor | Sequence[int]) -> Tensor:
    """One key per sample, the same on every rank, device and world size.

    Args:
        seed: The run's seed. Python ints of any size and sign are taken modulo 2**64.
        epoch: The epoch, like `seed`. Changing a 0-d int64 tensor does not recompile compiled code.
        indices: The samples' indices in the dataset, integers [B] on any device, a sequence or a range.

    Returns:
        int64 [B] on the device of `indices`.

    Raises:
        TypeError: For a seed, epoch or indices that are not integers.
        ValueError: For indices that are not one-dimensional.
    """
    counters = _indices(indices)
    run = mix(_counter("seed", seed) + GOLDEN)
    turn = mix(run + _counter("epoch", epoch) * GOLDEN)
    return mix(turn + counters * GOLDEN)


def bits(keys: Tensor, stream: Stream) -> Tensor:
    """64 random bits per key, int64 like `keys`, independent between streams."""
    return mix(keys + signed((int(stream) + 1) * GOLDEN))


def bits_of_each(keys: Tensor, first: Stream, last: Stream) -> Tensor:
    """`bits` of all streams from the first to the last, at once: int64 [streams, B] for keys [B]."""
    offsets = [signed((stream + 1) * GOLDEN) for stream in range(int(first), int(last) + 1)]
    if readable(keys):
        return mix(keys + torch.tensor(offsets).unsqueeze(1))
    # Not a tensor of constants, whose copy to a device would synchronise.
    return mix(torch.stack([keys + offset for offset in offsets]))


def to_uniform(drawn: Tensor) -> Tensor:
    """Convert 64 bits to float64, uniform over the multiples of 2**-53 in [0, 1)."""
    return shift(drawn, 11).double() * 2.0**-53


def to_int(drawn: Tensor, high: int | Tensor) -> Tensor:
    """Convert 64 bits to int64, uniform in [0, high) for 1 <= high < 2**31, with a bias below high * 2**-32."""
    return (shift(drawn, 32) * high) >> 32


def uniform(keys: Tensor, stream: Stream) -> Tensor:
    """float64 like `keys`, uniform in [0, 1)."""
    return to_uniform(bits(keys, stream))


def randint(keys: Tensor, stream: Stream, high: int | Tensor) -> Tensor:
    """int64 like `keys`, uniform in [0, high) for 1 <= high < 2**31."""
    return to_int(bits(keys, stream), high)


def uniforms(key: int, stream: Stream) -> Iterator[float]:
    """An endless sequence of floats in [0, 1) for one key, computed in Python, for a worker's draws.

    It is splitmix64's sequence starting at `bits` of the key, so it shares no draws with other streams or keys.
    """
    start = mix_int(key + (int(stream) + 1) * GOLDEN)
    for number in count(1):
        yield (mix_int(start + number * GOLDEN) >> 11) * 2.0**-53


def random_keys(
    batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Random keys, int64 [batch], from a generator or torch's default one.

    Compiled code does not accept a generator, and its default stream differs from eager's: pass keys there.
    """
    low, high = -(2**63), 2**63 - 1
    if generator is None:
        return torch.randint(low, high, (batch,), dtype=torch.int64, device=device)
    drawn = torch.randint(low, high, (batch,), dtype=torch.int64, generator=generator, device=generator.device)
    return drawn.to(device, non_blocking=True)


def permutation(seed: int | Tensor, epoch: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """The order of an epoch: int64 [n] permutation of range(n), a function of (seed, epoch, n) alone."""
    if n < 0:
        raise ValueError(f"n={n} is below 0: it must be a whole number in range")
    keys = sample_keys(seed, epoch, _counting(range(n), device))
    return torch.argsort(bits(keys, Stream.ORDER), stable=True)
