"""The record of FSDP1, FSDP2 and HSDP under Accelerate."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robust_dist.engines.engine import Engine
from robust_dist.engines.fsdp.variant import FSDPVariant

if TYPE_CHECKING:
    from robust_dist.checkpoint.space import Sizes
    from robust_dist.checkpoint.training_state import TrainingState


@dataclass(frozen=True, kw_only=True)
class FSDP(Engine):
    """FSDP1, FSDP2 and HSDP: weights, gradients and optimizer state in shards, checkpoints by torch's DCP."""

    kind: str = "fsdp"
    shards_weights: bool = True
    forward_is_collective: bool = True
    steps_whole_parameters: bool = False
    trains_any_memory_format: bool = False
    casts_weights: bool = True
    has_full_state_dict: bool = True

    def runs(self, accelerator: Any) -> bool:
        """Whether Accelerate shards with FSDP."""
        return bool(accelerator.distributed_type.value == "FSDP")

    def title(self, accelerator: Any) -> str:
        """FSDP1 or FSDP2."""
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"

    def casts_batch_norm(self, accelerator: Any) -> bool:
        """Whether this is FSDP2."""
        return bool(accelerator.state.fsdp_plugin.fsdp_version == 2)

    def saves_whole(self, accelerator: Any) -> bool:
        """Whether the first rank gathers the state (FULL_STATE_DICT)."""
        return bool(accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT")

    def save(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Like `accelerator.save_state`; parameters that were never stepped are saved as that.

        Raises:
            CheckpointError: DCP could not write a file; an OSError where the system said why.
        """
        from robust_dist.checkpoint.dcp_files import plain_failures
        from robust_dist.engines.fsdp.state import only_stepped
        from robust_dist.optim.groups import reshard

        with ExitStack() as stack:
            stack.enter_context(plain_failures(folder))
            for model, optimizer in zip(accelerator._models, accelerator._optimizers, strict=False):
                reshard(model)
                stack.enter_context(only_stepped(optimizer))
            accelerator.save_state(str(folder), **options)

    def load(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Like `accelerator.load_state`; exactly the parameters of which the checkpoint has state get some.

        torch and Accelerate 1.15 fail under FSDP2 ("Missing key") where a trainable parameter was never stepped; they
        drop the state of parameters that are frozen now, and all of it where gradients are there, as under FSDP1 before
        a first step, without a word. And torch 2.14's planner fails under FSDP1 ("Missing key ...
        optimizer.param_groups") where a parameter has fewer rows than there are ranks.

        Raises:
            CheckpointError: A file is missing, damaged, or holds more than tensors and plain values.
        """
        from robust_dist.checkpoint.dcp_files import plain_failures
        from robust_dist.engines.fsdp.state import load_sharded, only_saved, stepped_in

        plugin = accelerator.state.fsdp_plugin
        models, optimizers = accelerator._models, accelerator._optimizers
        with ExitStack() as stack:
            stack.enter_context(plain_failures(folder))
            if plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not options:
                for index, model in enumerate(models):
                    load_sharded(folder, index, model, optimizers[index] if index < len(optimizers) else None)
                # Accelerate loads the rest.
                accelerator._models, accelerator._optimizers = [], []
                stack.callback(setattr, accelerator, "_models", models)
                stack.callback(setattr, accelerator, "_optimizers", optimizers)
            elif plugin.fsdp_version == 2 and self.saves_whole(accelerator):
                for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=False)):
                    stack.enter_context(only_saved(model, optimizer, stepped_in(folder, index), whole=True))
            accelerator.load_state(str(folder), **options)

    def write(self, state: "TrainingState", folder: Path, world_size: int, *, whole: bool = False) -> list[str]:
        """Write DCP's folders, or whole what FULL_STATE_DICT loads."""
        from robust_dist.checkpoint.dcp import write_dcp
        from robust_dist.checkpoint.plain import write_full

        notes = _fill_missing_state(state)
        (write_full if whole else write_dcp)(_with_schedule_keys(state), folder)
        return notes

    def saved_bytes(self, sizes: "Sizes", rank: int, world_size: int, *, whole: bool = False) -> int:
        """The bytes of this rank's shards, or of all of them on the first rank."""
        share = sizes.held * world_size * (rank == 0) if whole else sizes.held
        return share * (sizes.bytes_each + sizes.moments)


def _fill_missing_state(state: "TrainingState") -> list[str]:
    """Give parameters without state the one that their first step would start from; returns a note for each case.

    FSDP2 loads a state for every parameter that is trained, or fails.
    """
    held = {*state.optimizer, *state.extra.get("frozen", ())}
    missing = [name for group in state.groups for name in group["params"] if name not in held]
    for name in missing:
        param = state.model[name]
        zeros = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        step = torch.zeros((), dtype=torch.float32)
        state.optimizer[name] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return [f"no state was saved for {missing[:5]} ({len(missing)} in all): written as before a first step"] * bool(
        missing
    )


def _with_schedule_keys(state: "TrainingState") -> "TrainingState":
    """The state with the groups' base values that a RobustSchedule keeps there; FSDP2 asks the file for them."""
    schedule = state.schedule or {}
    switch = schedule.get("weight_decay_switch") or {}
    bases = {"initial_lr": schedule.get("base_lrs"), "initial_weight_decay": switch.get("base_weight_decay")}
    groups = [dict(group) for group in state.groups]
    for key, values in bases.items():
        if isinstance(values, list) and len(values) == len(groups):
            for group, value in zip(groups, values, strict=True):
                group.setdefault(key, value)
    return replace(state, groups=groups)


VARIANTS = (
    FSDPVariant(name="HSDP", file="hsdp", in_nodes=True),
    FSDPVariant(name="FSDP2, no reshard", file="fsdp2", reshard=False),
    FSDPVariant(name="FSDP2", file="fsdp2"),
)
ENGINES = (FSDP(variants=VARIANTS),)
