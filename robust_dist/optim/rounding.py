"""Stochastic rounding to bfloat16 with keyed bits: reproducible, and identical on every backend and device.

The 32 bits of an element are a function of (seed, step, place of its parameter, index of the element):

    key = splitmix64's bits of (seed, step, place), computed like `robust_dist.augment.sample_keys`
    x = low 32 bits of index + low 32 bits of key
    x = (x ^ (x >> 16)) * 0x7feb352d
    x = x ^ high 32 bits of key ^ (high 32 bits of index) * 0x9e3779b9
    x = (x ^ (x >> 15)) * 0x846ca68b
    bits = x ^ (x >> 16)

all modulo 2^32. A parameter uses the low 16 of them, its exp_avg the high 16. They are added to the bits of the
float32, whose upper half is kept: the probability of rounding up is the relative distance to the lower neighbour.

`place` counts the optimizer's parameters over all groups, from 0. `index` counts the elements in memory order if the
parameter has no gaps in memory (contiguous, channels_last), otherwise in row-major order. For a DTensor it starts at
the index of the local tensor's first element in the whole tensor, so sharding along the first dimension (FSDP2) does
not change the bits. With flat shards (FSDP1, ZeRO) and other dimensions the bits depend on how the tensor is split.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from robust_dist.optim.counting import counts_of
from robust_dist.optim.settings import Hyper
from robust_dist.optim.tensors import TensorLists, is_dense
from robust_dist.splitmix import GOLDEN, mix, mix_int, signed

LOW, HIGH = 0, 16
_WORD = 2**32 - 1


def tensor_keys(seed: int, step: int | Tensor, places: Tensor) -> Tensor:
    """One key per tensor.

    Args:
        seed: The group's seed.
        step: The step count of all tensors, or one count per tensor: [n], any real dtype.
        places: int64 [n], on the device of `step`.

    Returns:
        int64 [n].
    """
    run = mix_int(seed + GOLDEN)
    if isinstance(step, Tensor):
        return mix(mix(step.to(torch.int64) * GOLDEN + signed(run)) + places * GOLDEN)
    return mix(places * GOLDEN + signed(mix_int(run + step * GOLDEN)))


def random_bits(key: int | Tensor, indices: Tensor) -> Tensor:
    """32 random bits for each element.

    Args:
        key: The tensor's key from `tensor_keys`, an int or 0-d int64.
        indices: Indices of the elements, int64.

    Returns:
        int64 with the shape of `indices`, in [0, 2^32).
    """
    x = ((indices & _WORD) + (key & _WORD)) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = x ^ ((key >> 32) & _WORD) ^ (((indices >> 32) * 0x9E3779B9) & _WORD)
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, bits: Tensor, half: int) -> Tensor:
    """Round float32 values to bfloat16, randomly up or down; exact and non-finite values are unchanged.

    Args:
        values: float32.
        bits: From `random_bits`, same shape.
        half: `LOW` or `HIGH`, the 16 bits to use.
    """
    pattern = values.view(torch.int32) + ((bits >> half) & 0xFFFF).to(torch.int32)
    rounded = (pattern & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def indices(param: Tensor, first: int) -> Tensor:
    """The index of each element, counted from `first` (see the module's docstring): int64 of the parameter's shape."""
    numel = param.numel()
    if torch.compiler.is_compiling():
        # Inductor turns arithmetic on an arange into index expressions, whose integers do not wrap at 64 bits.
        row = torch.ones(numel, dtype=torch.int64, device=param.device).cumsum(0) + (first - 1)
    else:
        row = torch.arange(first, first + numel, dtype=torch.int64, device=param.device)
    if is_dense(param):
        return row.as_strided(param.shape, param.stride())
    return row.view(param.shape)


class Rounder:
    """Prepares a batch's results for storing: unchanged, or rounded stochastically to bfloat16.

    Args:
        batch: The batch; nothing is rounded if it has no `origins`.
        h: Its settings.
    """

    def __init__(self, batch: TensorLists, h: Hyper) -> None:
        self._batch = batch
        self._keys = _keys(batch, h) if batch.origins else None

    def param(self, index: int, value: Tensor) -> Tensor:
        """The new value of a parameter, to be copied into it; with a master, copying rounds to nearest."""
        return value if self._batch.masters else self._rounded(index, value, self._batch.params[index], LOW)

    def exp_avg(self, index: int, value: Tensor) -> Tensor:
        """The new value of a first moment, to be copied into it."""
        return self._rounded(index, value, self._batch.exp_avgs[index], HIGH)

    def _rounded(self, index: int, value: Tensor, target: Tensor, half: int) -> Tensor:
        if self._keys is None or target.dtype is not torch.bfloat16:
            return value
        places = indices(self._batch.params[index], self._batch.origins[index][1])
        return round_stochastically(value, random_bits(self._keys[index], places), half)


def host_keys(origins: Sequence[tuple[int, int]], step: float, h: Hyper) -> list[int]:
    """`tensor_keys` of a batch whose step count is on the host."""
    return tensor_keys(h.seed, int(step), torch.tensor([place for place, _ in origins])).tolist()


def _keys(batch: TensorLists, h: Hyper) -> list[int] | tuple[Tensor, ...]:
    if batch.step is not None:
        return host_keys(batch.origins, batch.step, h)
    steps = counts_of(torch.stack(batch.steps))
    # Not torch.tensor(places): a captured graph cannot contain a copy from the host.
    rows = [torch.full((), place, dtype=torch.int64, device=steps.device) for place, _ in batch.origins]
    return tensor_keys(h.seed, steps, torch.stack(rows)).unbind()
