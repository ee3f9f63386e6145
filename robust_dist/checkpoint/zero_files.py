"""The files of a DeepSpeed checkpoint: names, layout of parameters, and safe reading.

ZeRO lays parameters out over ranks in flat partitions. Based on DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py,
stage3.py, bf16_optimizer.py).
"""

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint.store import CheckpointError

# The kind of these checkpoints in a report.
ZERO = "DeepSpeed folder"
TAG = "pytorch_model"
LATEST = "latest"
_ALIGNMENT = 2
_PLAIN_MODEL = "mp_rank_00_model_states.pt"
_TORN = (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, pickle.UnpicklingError)


class _Opaque:
    """A stand-in for DeepSpeed classes whose objects are in the files but not needed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


# By name: the files are readable without DeepSpeed, and none of its code runs.
_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class ZeroLayout:
    """The settings of a DeepSpeed JSON that determine the layout of the files.

    Attributes:
        bf16: Whether the engine computes in bfloat16; file names and stage 0's contents differ.
        round_robin_gradients: Stages 1 and 2: whether the group's order is changed.
        sub_group_size: Stage 3: number of partition elements in a sub-group.
    """

    bf16: bool = False
    round_robin_gradients: bool = False
    sub_group_size: int = 1_000_000_000

    @classmethod
    def of(cls, config: Any) -> "ZeroLayout":
        """From a DeepSpeed JSON as a dict; defaults for a path, which a file may hold instead."""
        if not isinstance(config, dict):
            return cls()
        zero, bf16 = config.get("zero_optimization") or {}, config.get("bf16") or config.get("bfloat16") or {}
        return cls(
            bf16.get("enabled") is True,
            zero.get("round_robin_gradients") is True,
            int(float(zero.get("sub_group_size", cls.sub_group_size))),
        )

    def config(self, stage: int) -> dict[str, Any]:
        """The part of a DeepSpeed JSON that `of` reads."""
        zero = {key: value for key, value in asdict(self).items() if key != "bf16"}
        return {"zero_optimization": {"stage": stage, **zero}, "bf16": {"enabled": self.bf16}}


def kind_of(stage: int) -> str:
    """The kind of the engine with this stage."""
    return f"zero{stage}"


def model_file(rank: int, stage: int) -> str:
    """The name of a rank's model file; stages 0 to 2 have one for all ranks."""
    return f"zero_pp_rank_{rank}_{_PLAIN_MODEL}" if stage == 3 else _PLAIN_MODEL


def optimizer_file(rank: int, bf16: bool) -> str:
    """The name of a rank's optimizer file; stage 0 has none."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def tag_folder(path: Path) -> Path | None:
    """The folder with the files: `path`, the one named by its `latest`, or Accelerate's; None if there is none."""
    if any(path.glob("*_model_states.pt")):
        return path
    if (path / LATEST).is_file():
        return path / (path / LATEST).read_text(encoding="utf-8").strip()
    if any((path / TAG).glob("*_model_states.pt")):
        return path / TAG
    return None


def is_zero(path: Path) -> bool:
    """Whether `path` is a DeepSpeed checkpoint: a folder with `latest`, a tag's folder, or Accelerate's save_state."""
    return path.is_dir() and ((path / LATEST).is_file() or tag_folder(path) is not None)


def load(path: Path) -> Any:
    """A file's contents, on the CPU; a CheckpointError if it is missing, torn, or holds objects that could run code."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the files of all ranks are needed")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _TORN as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line]
    if lines:
        return f"contains an object that is not safe to load ({lines[0].strip()}); save it without such client state"
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"torn, or not a torch.save file ({first})"


def partition_size(numel: int, world_size: int, *, aligned: bool) -> int:
    """Elements per rank out of `numel`; stages 1 and 2 align their flat groups, stage 3 aligns nothing."""
    unit = _ALIGNMENT if aligned else 1
    return math.ceil(numel / (unit * world_size)) * unit


def cut(tensor: Tensor, world_size: int, *, aligned: bool = False) -> list[Tensor]:
    """The flat float partitions of a tensor, one per rank, the last ones padded with zeros."""
    size = partition_size(tensor.numel(), world_size, aligned=aligned)
    flat = tensor.new_zeros(size * world_size)
    flat[: tensor.numel()] = tensor.reshape(-1)
    return [part.clone() for part in flat.split(size)] if size else [flat.clone() for _ in range(world_size)]


def cut_group(tensors: Sequence[Tensor], world_size: int, stage: int) -> list[Tensor]:
    """Each rank's part of a group: a slice of the flattened group (stages 1, 2), or a slice of each tensor (3)."""
    if stage < 3:
        return cut(torch.cat([tensor.reshape(-1) for tensor in tensors]), world_size, aligned=True)
    return [torch.cat(parts) for parts in zip(*(cut(tensor, world_size) for tensor in tensors), strict=True)]


def join_group(
    parts: Sequence[Tensor], shapes: Sequence[torch.Size], stage: int, gaps: Sequence[int] = ()
) -> list[Tensor]:
    """The tensors of a group from every rank's flat part of it; the inverse of `cut_group`.

    Parts of stages 1 and 2 may lack the padding at the group's end; `gaps` are the padding elements after each tensor
    (stages 1 and 2 with `parameter_alignment`).

    Raises:
        ValueError: A part does not have the size given by the shapes; the message names its rank.
    """
    numels = [math.prod(shape) for shape in shapes]
    if stage == 3:
        return _join_each(parts, shapes, numels)
    gaps = list(gaps) or [0] * len(numels)
    total = sum(numels) + sum(gaps)
    size = partition_size(total, len(parts), aligned=True)
    for rank, part in enumerate(parts):
        _check_size(rank, part, {size, min(max(total - rank * size, 0), size)})
    # Only the last part can lack padding, so anything missing is at the end.
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
        raise ValueError(f"rank {rank} holds {part.numel()} elements, expected {max(allowed)}")


def round_robin(items: Sequence[Any], world_size: int) -> list[Any]:
    """A group's order in memory under `round_robin_gradients`: every world_size-th item together."""
    return [items[i] for start in range(min(world_size, len(items))) for i in range(start, len(items), world_size)]


def undo_round_robin(items: Sequence[Any], world_size: int) -> list[Any]:
    """The group's own order, from that of `round_robin`."""
    restored = list(items)
    for item, place in zip(items, round_robin(range(len(items)), world_size), strict=True):
        restored[place] = item
    return restored


def sub_groups(numels: Sequence[int], world_size: int, limit: int) -> list[list[int]]:
    """Stage 3's sub-groups of a group, as indices: a sub-group ends when its partition reaches `limit` elements."""
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
    """Other names of the optimizer's parameters whose entries in the model are the same tensor in memory."""
    owned = set(owned)
    places = {(model[name].data_ptr(), model[name].shape): name for name in owned if model[name].numel()}
    pairs = ((name, places.get((model[name].data_ptr(), model[name].shape))) for name in model if name not in owned)
    return {name: place for name, place in pairs if place is not None}
