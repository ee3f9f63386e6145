"""How DeepSpeed's ZeRO lays parameters out over ranks: flat partitions, cut and put together again.

Read from DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 2


def partition_size(numel: int, world_size: int, *, aligned: bool) -> int:
    """Elements that each rank holds of `numel`; stages 1 and 2 align their flat groups, stage 3 nothing."""
    unit = _ALIGNMENT if aligned else 1
    return math.ceil(numel / (unit * world_size)) * unit


def cut(tensor: Tensor, world_size: int, *, aligned: bool = False) -> list[Tensor]:
    """The flat float partitions of a tensor, one a rank, the last ones padded with zeros."""
    size = partition_size(tensor.numel(), world_size, aligned=aligned)
    flat = tensor.new_zeros(size * world_size)
    flat[: tensor.numel()] = tensor.reshape(-1)
    return [part.clone() for part in flat.split(size)] if size else [flat.clone() for _ in range(world_size)]


def cut_group(tensors: Sequence[Tensor], world_size: int, stage: int) -> list[Tensor]:
    """What each rank holds of a group: a slice of it flattened (stages 1, 2), or a slice of each tensor (3)."""
    if stage < 3:
        return cut(torch.cat([tensor.reshape(-1) for tensor in tensors]), world_size, aligned=True)
    return [torch.cat(parts) for parts in zip(*(cut(tensor, world_size) for tensor in tensors), strict=True)]


def join_group(
    parts: Sequence[Tensor], shapes: Sequence[torch.Size], stage: int, gaps: Sequence[int] = ()
) -> list[Tensor]:
    """The tensors of a group from every rank's flat part of it; the inverse of `cut_group`.

    Args:
        parts: One a rank; those of stages 1 and 2 may lack the padding at the group's end.
        shapes: Of the tensors, in the layout's order.
        stage: 1, 2 or 3.
        gaps: Elements of padding after each tensor (stages 1 and 2 with `parameter_alignment`).

    Raises:
        ValueError: A part has not the size that the shapes ask for, with its rank.
    """
    numels = [math.prod(shape) for shape in shapes]
    if stage == 3:
        return _join_each(parts, shapes, numels)
    gaps = list(gaps) or [0] * len(numels)
    total = sum(numels) + sum(gaps)
    size = partition_size(total, len(parts), aligned=True)
    for rank, part in enumerate(parts):
        _check_size(rank, part, {size, min(max(total - rank * size, 0), size)})
    # Only the tail can be without padding, so what is missing is missing at the end.
    pieces = torch.cat(list(parts))[:total].split([n for pair in zip(numels, gaps, strict=True) for n in pair])
    return [piece.reshape(shape).clone() for piece, shape in zip(pieces[::2], shapes, strict=True)]


def _join_each(parts: Sequence[Tensor], shapes: Sequence[torch.Size], numels: list[int]) -> list[Tensor]:
    sizes = [partition_size(numel, len(parts), aligned=False) for numel in numels]
    for rank, part in enumerate(parts):
        _check_size(rank, part, {sum(sizes)})
    by_tensor = zip(*(part.split(sizes) for part in parts), strict=True)
    return [
        torch.cat(slices)[:numel].reshape(shape) for slices, numel, shape in zip(by_tensor, numels, shapes, strict=True)
    ]


def _check_size(rank: int, part: Tensor, allowed: set[int]) -> None:
    if part.numel() not in allowed:
        raise ValueError(f"rank {rank} holds {part.numel()} elements where {max(allowed)} belong")


def round_robin(items: Sequence[Any], world_size: int) -> list[Any]:
    """A group's order in memory under `round_robin_gradients`: every world_size-th item together."""
    return [items[i] for start in range(min(world_size, len(items))) for i in range(start, len(items), world_size)]


def undo_round_robin(items: Sequence[Any], world_size: int) -> list[Any]:
    """The group's own order again."""
    restored = list(items)
    for item, place in zip(items, round_robin(range(len(items)), world_size), strict=True):
        restored[place] = item
    return restored


def sub_groups(numels: Sequence[int], world_size: int, limit: int) -> list[list[int]]:
    """Stage 3's sub-groups of a group, as indices: a sub-group ends where its partition reaches `limit` elements."""
    sizes = [partition_size(numel, world_size, aligned=False) for numel in numels]
    if limit >= sum(sizes):
        return [list(range(len(sizes)))]
    found: list[list[int]] = [[]]
    held = 0
    for index, size in enumerate(sizes):
        if found[-1] and held >= limit:
            found.append([])
            held = 0
        found[-1].append(index)
        held += size
    return found


def same_memory(model: Mapping[str, Tensor], owned: Iterable[str]) -> dict[str, str]:
    """Other names of the optimizer's parameters, where the model's entries are one tensor in memory."""
    owned = set(owned)
    places = {(model[name].data_ptr(), model[name].shape): name for name in owned if model[name].numel()}
    pairs = ((name, places.get((model[name].data_ptr(), model[name].shape))) for name in model if name not in owned)
    return {name: place for name, place in pairs if place is not None}
