"""Stochastic rounding to bfloat16 with keyed bits: reproducible, and alike on every backend and device.

The 32 bits of an element are a function of (seed, step, place of its parameter, index of the element):

    key = splitmix64's bits of (seed, step, place), as `robust_dist.augment.sample_keys` makes them
    x = low 32 bits of index + low 32 bits of key
    x = (x ^ (x >> 16)) * 0x7feb352d
    x = x ^ high 32 bits of key ^ (high 32 bits of index) * 0x9e3779b9
    x = (x ^ (x >> 15)) * 0x846ca68b
    bits = x ^ (x >> 16)

all modulo 2^32. A parameter takes the low 16 of them, its exp_avg the high 16. They are added to the float32's own
bits, of which the upper half is kept: a value goes up with the probability of its place between its two neighbours.

`place` counts the optimizer's parameters over all groups, from 0. `index` counts the elements in the order of memory
where a parameter lies there without gaps (contiguous, channels_last), else row by row. Of a DTensor it counts from
the place of the local tensor's first element in the whole one, so that sharding along the first dimension (FSDP2)
changes no bit; flat shards (FSDP1, ZeRO) and other dimensions count on from there, so that the bits depend on the cut.
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
        seed: Of the group.
        step: The step count of all, or one each: [n] of any real dtype.
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
        key: Of the tensor, an int or 0-d int64, from `tensor_keys`.
        indices: int64, the elements' indices.

    Returns:
        int64 of the shape of `indices`, in [0, 2^32).
    """
    x = ((indices & _WORD) + (key & _WORD)) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = x ^ ((key >> 32) & _WORD) ^ (((indices >> 32) * 0x9E3779B9) & _WORD)
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, bits: Tensor, half: int) -> Tensor:
    """float32 values as bfloat16, up or down by chance; what bfloat16 has exactly, and what is not finite, stays.

    Args:
        values: float32.
        bits: From `random_bits`, of the same shape.
        half: `LOW` or `HIGH`, the 16 bits to take.
    """
    pattern = values.view(torch.int32) + ((bits >> half) & 0xFFFF).to(torch.int32)
    rounded = (pattern & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def indices(param: Tensor, first: int) -> Tensor:
    """int64 of the parameter's shape: the index of each element, counted from `first` as the module's head says."""
    numel = param.numel()
    if torch.compiler.is_compiling():
        # Inductor folds what is computed from an arange into indices, whose integers do not wrap at 64 bits.
        row = torch.ones(numel, dtype=torch.int64, device=param.device).cumsum(0) + (first - 1)
    else:
        row = torch.arange(first, first + numel, dtype=torch.int64, device=param.device)
    if is_dense(param):
        return row.as_strided(param.shape, param.stride())
    return row.view(param.shape)


class Rounder:
    """Stores a batch's results: values as they are, or rounded stochastically to bfloat16.

    Args:
        batch: The batch; nothing is rounded here where it has no `origins`.
        h: Its settings.
    """

    def __init__(self, batch: TensorLists, h: Hyper) -> None:
        self._batch = batch
        self._keys = _keys(batch, h) if batch.origins else None

    def param(self, index: int, value: Tensor) -> Tensor:
        """The new value of a parameter, to be copied into it; what has a master goes to the nearest."""
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
    """`tensor_keys` of a batch whose step the host knows."""
    return tensor_keys(h.seed, int(step), torch.tensor([place for place, _ in origins])).tolist()


def _keys(batch: TensorLists, h: Hyper) -> list[int] | tuple[Tensor, ...]:
    if batch.step is not None:
        return host_keys(batch.origins, batch.step, h)
    steps = counts_of(torch.stack(batch.steps))
    # Not torch.tensor(places): a copy from the host, which a captured graph cannot have.
    rows = [torch.full((), place, dtype=torch.int64, device=steps.device) for place, _ in batch.origins]
    return tensor_keys(h.seed, steps, torch.stack(rows)).unbind()
