"""Writing a checkpoint that DeepSpeed loads with its training JSON, for any stage and number of ranks."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import ParameterNames, TrainingState, write_names
from robust_dist.checkpoint.zero_files import (
    LATEST,
    TAG,
    ZeroLayout,
    cut,
    cut_group,
    model_file,
    optimizer_file,
    round_robin,
    same_memory,
    sub_groups,
)
from robust_dist.extras import require
from robust_dist.optim.state import MOMENTS, STEP, Z

# The DeepSpeed version of this format; DeepSpeed rejects a file without a version.
_FORMAT = "0.19.8"
_BUFFER_NAMES = frozenset(("running_mean", "running_var", "num_batches_tracked"))


def write_zero(state: TrainingState, folder: Path, *, stage: int, world_size: int, bf16: bool | None = None) -> None:
    """Write what `engine.load_checkpoint(folder, tag="pytorch_model")` and Accelerate's `load_state(folder)` load.

    The files are in DeepSpeed's own format, so the JSON stays unchanged, with `load_universal` off. The layout follows
    `round_robin_gradients` and `sub_group_size` in `state.extra["zero"]`, or DeepSpeed's defaults without it. Gradient
    clipping remains the engine's own. An fp16 engine's loss scale starts afresh at stages 1 and 2; stages 0 and 3 under
    fp16 are not supported. Stage 3 needs DeepSpeed installed.

    Args:
        state: What to write. `extra` may name "buffers" or "frozen", and "shared" ({alias: name}); stage 3 stores
            frozen parameters apart from buffers, and without these keys uses dtype and batch normalisation's names.
        folder: An existing folder; gets `pytorch_model/`, `latest`, and `scheduler.bin` if there is a schedule.
        stage: Stage of the engine that will load it: 0, 1, 2 or 3.
        world_size: Its data-parallel ranks.
        bf16: Whether it has bf16 enabled, which changes file names; None: same as the engine the state came from.

    Raises:
        CheckpointError: A parameter has no state, state of another shape, or another step than its group; or stage 3
            cannot tell buffers from frozen parameters.
    """
    writer = _Writer(state, stage, world_size, bf16)
    target = folder / TAG
    target.mkdir()
    for name, content in writer.files():
        torch.save(content, target / name)
    (folder / LATEST).write_text(TAG, encoding="utf-8")
    if stage == 0:
        write_names(folder, writer.names())
    if state.schedule is not None:
        torch.save(state.schedule, folder / "scheduler.bin")


class _Writer:
    """Builds the files of a checkpoint one at a time, so that only one rank's are in memory."""

    def __init__(self, state: TrainingState, stage: int, world_size: int, bf16: bool | None) -> None:
        self.state, self.stage, self.world_size = state, stage, world_size
        self.model = dict(state.model)
        self.noted = dict(state.extra.get("zero") or {})
        self.layout = _layout(self.noted, bf16)
        self.groups = [group for group in map(self._owned_group, state.groups) if group["params"]]
        self.owned = [name for group in self.groups for name in group["params"]]
        self._check_states()
        self.shared = dict(state.extra.get("shared") or same_memory(self.model, self.owned))
        # DeepSpeed needs the other names of shared parameters, which safetensors files omit.
        self.model |= {alias: self.model[name] for alias, name in self.shared.items() if name in self.model}
        self.buffers, self.frozen = self._others()
        self.flat_groups, self.members = self._flat_groups()

    def files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """File names and contents."""
        for rank in range(self.world_size if self.stage == 3 else 1):
            yield model_file(rank, self.stage), self._model(rank)
        if self.stage > 0:
            flat = [self._cut(names) for names in self.flat_groups]
            for rank in range(self.world_size):
                held = {"optimizer_state_dict": self._shard([parts[rank] for parts in flat])}
                more = {"ds_config": self.layout.config(self.stage), "ds_version": _version()}
                yield optimizer_file(rank, self.layout.bf16), held | more

    def _owned_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        frozen = set(self.state.extra.get("frozen") or ())
        for name in group["params"]:
            if name not in self.model:
                raise CheckpointError(f"parameter {name!r} of an optimizer group is not in the model")
        # DeepSpeed leaves out what it does not train, and would misplace it.
        names = [n for n in group["params"] if n not in frozen and self.model[n].numel() > 0]
        return {**{key: value for key, value in group.items() if key != "param_names"}, "params": names}

    def _check_states(self) -> None:
        for name in self.owned:
            held = self.state.optimizer.get(name)
            shape = self.model[name].shape
            if held is not None and any(held[key].shape != shape for key in (*MOMENTS, Z) if key in held):
                raise CheckpointError(f"parameter {name!r}: its state does not have its shape in the model")
        for group in self.groups if self.stage > 0 else []:
            steps = {name: self._step(name) for name in group["params"]}
            lacking = [name for name, step in steps.items() if step is None]
            if lacking and len(lacking) < len(steps):
                raise CheckpointError(
                    f"parameter {lacking[0]!r} has no optimizer state but others in its group do, and ZeRO keeps one"
                    " for all: if it is frozen, say so with note_parameters beside the source; else give it its own one"
                )
            first, *others = steps.items()
            differing = next((item for item in others if item[1] != first[1]), None)
            if differing:
                raise CheckpointError(
                    f"parameters of one group at different steps ({first[0]!r} at {first[1]:g}, {differing[0]!r} at"
                    f" {differing[1]:g}): ZeRO has one step per group; give them their own groups"
                )

    def _step(self, name: str) -> float | None:
        held = self.state.optimizer.get(name)
        return None if held is None else float(held[STEP])

    def names(self) -> ParameterNames:
        """The note of names needed by stage 0, as its file numbers the parameters."""
        groups = [group["params"] for group in self.groups]
        return ParameterNames(groups, self.shared, self.buffers, self.frozen, self.world_size)

    def _others(self) -> tuple[list[str], list[str]]:
        """Buffers and frozen parameters: the model's entries that the optimizer does not own."""
        extra, owned = self.state.extra, set(self.owned)
        rest = [name for name in self.model if name not in owned and name not in self.shared]
        if extra.get("buffers") is not None:
            buffers = set(extra["buffers"])
        elif extra.get("frozen") is not None:
            buffers = set(rest).difference(extra["frozen"])
        else:
            buffers = {name for name in rest if self._looks_like_buffer(name)}
            self._refuse_unclear([name for name in rest if name not in buffers])
        return [n for n in rest if n in buffers], [n for n in rest if n not in buffers]

    def _looks_like_buffer(self, name: str) -> bool:
        return name.rpartition(".")[2] in _BUFFER_NAMES or not self.model[name].is_floating_point()

    def _refuse_unclear(self, names: list[str]) -> None:
        if names and self.stage == 3:
            raise CheckpointError(
                f"is {names[0]!r} a buffer or a frozen parameter? Stage 3 stores them apart and the checkpoint does not"
                " say; robust_dist.checkpoint.note_parameters writes a note beside the source that does"
            )

    def _flat_groups(self) -> tuple[list[list[str]], list[list[int]]]:
        """The names in each flat group in memory order, and each param group's flat groups."""
        flat: list[list[str]] = []
        members = []
        for group in self.groups:
            names, first = group["params"], len(flat)
            if self.stage == 3:
                numels = [self.model[name].numel() for name in names]
                found = sub_groups(numels, self.world_size, self.layout.sub_group_size)
                flat += [[names[index] for index in indices] for indices in found]
            elif self.layout.round_robin_gradients:
                flat.append(round_robin(names, self.world_size))
            else:
                flat.append(list(names))
            members.append(list(range(first, len(flat))))
        return flat, members

    def _cut(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Each rank's part of a flat group: float32 masters and state."""
        wanted = {"fp32": [self._master(name) for name in names]}
        for key in MOMENTS:
            wanted[key] = [self._moment(name, key) for name in names]
        if any(Z in self.state.optimizer.get(name, {}) for name in names):
            wanted[Z] = [self._fast(name) for name in names]
        step = torch.tensor(self._step(names[0]) or 0.0, dtype=torch.float32)
        cuts = {key: cut_group(tensors, self.world_size, self.stage) for key, tensors in wanted.items()}
        return [{STEP: step.clone()} | {k: parts[rank] for k, parts in cuts.items()} for rank in range(self.world_size)]

    def _master(self, name: str) -> Tensor:
        return self.model[name].detach().to(torch.float32)

    def _moment(self, name: str, key: str) -> Tensor:
        # Loading drops the state that an engine creates at its start, and parts of the engine need some.
        held = self.state.optimizer.get(name)
        return torch.zeros_like(self._master(name)) if held is None else held[key].to(torch.float32)

    def _fast(self, name: str) -> Tensor:
        # Averaging's fast weights start equal to the trained ones.
        return self.state.optimizer.get(name, {}).get(Z, self._master(name)).to(torch.float32)

    def _shard(self, parts: list[dict[str, Tensor]]) -> dict[str, Any]:
        """One rank's optimizer state."""
        groups = [{**group, "params": numbers} for group, numbers in zip(self.groups, self.members, strict=True)]
        states = {i: {key: value for key, value in part.items() if key != "fp32"} for i, part in enumerate(parts)}
        base, fp32 = {"state": states, "param_groups": groups}, [part["fp32"] for part in parts]
        common = {"zero_stage": self.stage, "overflow": False, "ds_version": _version()}
        if self.stage == 3:
            scaler = {"dynamic_loss_scale": False, "loss_scaler": _loss_scaler(), "partition_count": self.world_size}
            return common | scaler | {"optimizer_state_dict": base, "fp32_flat_groups": fp32}
        # Without a value in the file, these stages keep the engine's own loss scale.
        counts = {"partition_count": [self.world_size] * len(fp32), "group_paddings": [0] * len(fp32)}
        return common | counts | {"base_optimizer_state": base, "single_partition_of_fp32_groups": fp32}

    def _model(self, rank: int) -> dict[str, Any]:
        """The model file of a rank."""
        shapes = [{name: self.model[name].shape for name in names} for names in self.flat_groups]
        frozen = {name: self.model[name] for name in self.frozen}
        if self.stage == 3:
            frozen = {name: cut(tensor, self.world_size)[rank] for name, tensor in frozen.items()}
        keeps_frozen = self.stage >= 2 and (self.stage == 3 or "frozen" in self.state.extra)
        content = {
            "module": self._module(),
            "buffer_names": self.buffers,
            "optimizer": self._stage0_optimizer() if self.stage == 0 else None,
            "param_shapes": shapes if self.stage > 0 else None,
            "frozen_param_shapes": {n: self.model[n].shape for n in self.frozen} if keeps_frozen else None,
            "shared_params": self.shared if self.stage > 0 else None,
            "frozen_param_fragments": frozen if keeps_frozen else None,
            "lr_scheduler": self.state.schedule,
            "data_sampler": None,
            "random_ltd": None,
            "dp_world_size": self.world_size,
            "mp_world_size": 1,
            "ds_config": self.layout.config(self.stage),
            "ds_version": _version(),
        }
        return {**(self.state.extra.get("client_state") or {}), **content, **self._counts()}

    def _module(self) -> dict[str, Any]:
        model = {name: tensor.detach() for name, tensor in self.model.items()}
        if self.stage == 3:
            kept = set(self.buffers)
            model = {name: tensor if name in kept else tensor.new_empty(0) for name, tensor in model.items()}
        return model | self.state.extra.get("objects", {})

    def _counts(self) -> dict[str, int]:
        done = max((self._step(name) or 0.0 for name in self.owned), default=0.0)
        counts = {"global_steps": int(done), "skipped_steps": 0}
        return counts | {
            k: self.noted[k] for k in ("global_steps", "global_samples", "skipped_steps") if k in self.noted
        }

    def _stage0_optimizer(self) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(self.owned)}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in self.groups]
        states = {numbers[n]: dict(held) for n, held in self.state.optimizer.items() if n in numbers}
        base = {"state": states, "param_groups": groups}
        if not self.layout.bf16:
            return base
        masters = [[self._master(name) for name in group["params"]] for group in self.groups]
        scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": 0}
        return scale | {"optimizer_state_dict": base, "fp32_groups": masters}


def _layout(noted: Mapping[str, Any], bf16: bool | None) -> ZeroLayout:
    fields = {key: noted[key] for key in ("bf16", "round_robin_gradients", "sub_group_size") if key in noted}
    return ZeroLayout(**fields | ({} if bf16 is None else {"bf16": bf16}))


def _loss_scaler() -> Any:
    module = require("deepspeed.runtime.fp16.loss_scaler", extra="deepspeed", purpose="writing a ZeRO-3 checkpoint")
    return module.LossScaler(scale=1.0)


def _version() -> str:
    try:
        return version("deepspeed")
    except PackageNotFoundError:
        return _FORMAT
