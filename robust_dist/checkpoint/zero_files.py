"""The files of a DeepSpeed checkpoint: their names, and reading them without running what they hold."""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from robust_dist.checkpoint.store import CheckpointError

TAG = "pytorch_model"
LATEST = "latest"
_PLAIN_MODEL = "mp_rank_00_model_states.pt"
_TORN = (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, pickle.UnpicklingError)


class _Opaque:
    """Stands for a class of DeepSpeed whose objects are in the files and are not needed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


# By name: DeepSpeed need not be installed to read its files, and none of its code runs.
_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class Layout:
    """What of a DeepSpeed JSON decides where numbers lie.

    Attributes:
        bf16: Whether the engine computes in bfloat16; names and stage 0's contents differ.
        round_robin_gradients: Stages 1 and 2: whether the group's order is changed.
        sub_group_size: Stage 3: how many elements of a partition make a sub-group.
    """

    bf16: bool = False
    round_robin_gradients: bool = False
    sub_group_size: int = 1_000_000_000

    @classmethod
    def of(cls, config: Any) -> "Layout":
        """From a DeepSpeed JSON as a dict; a path to one, which is what a file may hold instead, tells nothing."""
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


def model_file(rank: int, stage: int) -> str:
    """The name of a rank's model file; stages 0 to 2 have one for all."""
    return f"zero_pp_rank_{rank}_{_PLAIN_MODEL}" if stage == 3 else _PLAIN_MODEL


def optimizer_file(rank: int, bf16: bool) -> str:
    """The name of a rank's optimizer file; stage 0 has none."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def tag_folder(path: Path) -> Path | None:
    """The folder that holds the files: `path`, what its `latest` names, or Accelerate's; None if there is none."""
    if any(path.glob("*_model_states.pt")):
        return path
    if (path / LATEST).is_file():
        return path / (path / LATEST).read_text(encoding="utf-8").strip()
    if any((path / TAG).glob("*_model_states.pt")):
        return path / TAG
    return None


def load(path: Path) -> Any:
    """A file's contents, on the CPU.

    Raises:
        CheckpointError: It is missing, torn, or holds objects that loading would have to run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; every rank's file is needed")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _TORN as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line]
    if lines:
        return f"holds an object that is not loaded for safety ({lines[0].strip()}); save it without such client state"
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"torn, or no file of torch.save ({first})"
