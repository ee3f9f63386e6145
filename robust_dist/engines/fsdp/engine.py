"""FSDP1, FSDP2 and HSDP: their record under Accelerate, and their memory and traffic in a plan.

The plan assumes sharding along dimension 0, gathered unit by unit (torch 2.14, distributed/fsdp/_fully_shard).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robust_dist.engines.engine import Engine
from robust_dist.engines.variant import ALONE, MOMENTS, SINGLE, STEP, Collective, Held, Operation, Passes, Run, Variant

if TYPE_CHECKING:
    from robust_dist.checkpoint.background import Sizes
    from robust_dist.checkpoint.training_state import TrainingState
    from robust_dist.plan.profile import Profile, Shapes
    from robust_dist.plan.question import Question

# fsdp_min_num_params of configs/accelerate/*fsdp2.yaml and *hsdp.yaml
MIN_UNIT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FSDPVariant(Variant):
    """`fully_shard` over all ranks, or over those of a node.

    Attributes:
        reshard: Gathered parameters are freed after the forward pass.
        in_nodes: Sharded over the GPUs of a node, replicated over nodes (HSDP).
    """

    overlap: float = 1.0
    broadcasts_buffers: bool = False
    reshard: bool = True
    in_nodes: bool = False

    def shards(self, job: "Question") -> int:
        """Number of ranks that share one copy."""
        return job.gpus_per_node if self.in_nodes else job.world_size

    def unfit(self, job: "Question") -> str | None:
        """The reason why this does not suit these machines, or None."""
        if job.world_size == 1:
            return ALONE
        if self.in_nodes and job.nodes == 1:
            return "with one node there is nothing to replicate: FSDP2 does the same"
        if self.in_nodes and job.gpus_per_node == 1:
            return "with one GPU per node there is nothing to shard: DDP does the same"
        return None

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Weights are gathered in the job's dtype, under autocast."""
        return dtype, None if dtype == torch.float32 else dtype

    def held(self, shapes: "Shapes", job: "Question", rank: int = 0) -> Held:
        """Parameters and gradients are stored with padding, moments without."""
        shards = self.shards(job)
        padded = sum(padded_rows(p.shape, shards) for p in shapes.parameters)
        own = sum(own_rows(p.shape, shards, rank % shards) for p in shapes.parameters)
        return Held(SINGLE * padded, 0, SINGLE * padded, MOMENTS * own + STEP * len(shapes.parameters), own)

    def passes(self, shapes: "Shapes", profile: "Profile", job: "Question", batch: int, *, accumulates: bool) -> Passes:
        """The peak of the units' backward passes."""
        # Without synchronisation, unsharded gradients are accumulated until the last micro-batch.
        whole = job.itemsize * shapes.numel if accumulates else 0
        moments = []
        for moment in _backward_moments(shapes, self.reshard):
            activations = profile.live_between(batch, moment.born, moment.born_after)
            gradients = whole + SINGLE * moment.born / self.shards(job)
            moments.append(Passes(activations, job.itemsize * moment.in_flight, gradients))
        return max(moments, key=sum)

    def collectives(self, shapes: "Shapes", job: "Question", accumulation: int) -> Iterator[Collective]:
        """Units are gathered for every micro-batch, and reduced once per step."""
        shards = self.shards(job)
        leaves = job.nodes > 1 and not self.in_nodes

        def over(what: str, operation: Operation, elements: int, count: int) -> Collective:
            return Collective(what, operation, job.itemsize * elements, shards, count, leaves, True)

        padded = [sum(shards * padded_rows(p.shape, shards) for p in unit.parameters) for unit in shapes.units]
        again = [numel for numel, unit in zip(padded, shapes.units, strict=True) if self.reshard and not unit.stays]
        units = len(shapes.units)
        yield over("parameters, forward", "all-gather", accumulation * sum(padded), accumulation * units)
        yield over("parameters, backward", "all-gather", accumulation * sum(again), accumulation * len(again))
        # accumulate() reduces only in the last micro-batch.
        yield over("gradients", "reduce-scatter", sum(padded), units)
        if self.in_nodes:
            mine = job.itemsize * sum(padded) / shards
            yield Collective("gradients, between nodes", "all-reduce", mine, job.nodes, units, True, True)

    def words(self, job: "Question") -> list[str]:
        """The mesh for replicas on several nodes, and whether to reshard."""
        mesh = {"replicate": job.nodes, "shard": job.gpus_per_node} if self.in_nodes else {}
        words = [f"--parallelism_config_dp_{name}_size {size}" for name, size in mesh.items()]
        return words if self.reshard else [*words, "--fsdp_reshard_after_forward", "false"]

    def start(self, model: nn.Module, job: "Question", batch: int) -> Run:
        """`fully_shard`, as Accelerate does with the variant's config."""
        return Run(self.shard(model, job))

    def shard(self, model: nn.Module, job: "Question") -> nn.Module:
        """Shard a model in place over the ranks of the process group of CPUs; returns the model."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        shape = (job.nodes, job.gpus_per_node) if self.in_nodes else (job.world_size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        low = job.dtype != torch.float32
        policy = MixedPrecisionPolicy(job.dtype, job.dtype, job.dtype) if low else MixedPrecisionPolicy()
        for module, reshards in unit_modules(model):
            # As in Accelerate, torch's default applies to the root, which stays gathered.
            after: dict[str, Any] = {} if module is model else {"reshard_after_forward": reshards and self.reshard}
            fully_shard(module, mesh=mesh, mp_policy=policy, **after)
        return model


def unit_modules(model: nn.Module, min_numel: int = MIN_UNIT) -> list[tuple[nn.Module, bool]]:
    """The modules to pass to `fully_shard`, in order, and whether each is resharded after its forward pass.

    Chosen like Accelerate's `fsdp2_prepare_model` for SIZE_BASED_WRAP: inner modules first, each with more than
    `min_numel` elements in total; the last normalisation among the model's children; the model.
    """
    chosen = [m for m in _bottom_up(model)[:-1] if sum(p.numel() for p in m.parameters()) > min_numel]
    norm = [child for child in model.children() if "Norm" in type(child).__name__][-1:]
    tail = [child for child in norm if child not in chosen]
    return [*((module, True) for module in chosen), *((module, False) for module in tail), (model, False)]


def _bottom_up(model: nn.Module) -> list[nn.Module]:
    stack, order = [model], []
    while stack:
        module = stack.pop()
        stack.extend(module.children())
        order.append(module)
    return order[::-1]


def padded_rows(shape: Sequence[int], shards: int) -> int:
    """Elements of a parameter that `fully_shard` stores: the largest chunk of dimension 0 (torch.chunk)."""
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return -(-rows // shards) * rest


def own_rows(shape: Sequence[int], shards: int, rank: int) -> int:
    """Elements of a parameter on this rank; the last ranks may have fewer, or none."""
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    share = -(-rows // shards)
    return max(0, min(share, rows - rank * share)) * rest


@dataclass(frozen=True)
class _Moment:
    """The backward pass of one unit, elements.

    Attributes:
        born: Gradients finished before it.
        born_after: Gradients finished after it.
        in_flight: Gathered parameters, this unit's gradients, and those of the previous unit, being scattered.
    """

    born: int
    born_after: int
    in_flight: int


def _backward_moments(shapes: "Shapes", reshard: bool) -> list[_Moment]:
    """Assumes that gradients are finished in the parameters' reverse order, and units with their first parameter."""
    place = {parameter: index for index, parameter in enumerate(shapes.parameters)}
    behind = [0]
    for parameter in reversed(shapes.parameters):
        behind.append(behind[-1] + parameter.numel)
    behind.reverse()
    units = sorted(shapes.units, key=lambda unit: place[unit.parameters[0]], reverse=True)
    stays = sum(unit.numel for unit in units if unit.stays)
    moments, before = [], 0
    for unit, ahead in zip(units, [*units[1:], None], strict=True):
        first, last = (place[unit.parameters[end]] for end in (0, -1))
        if reshard:
            gathered = sum(part.numel for part in (unit, ahead) if part is not None and not part.stays) + stays
        else:
            gathered = shapes.numel - behind[last + 1]
        moments.append(_Moment(behind[last + 1], behind[first], gathered + unit.numel + before))
        before = unit.numel
    return moments


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
        """Like `accelerator.save_state`; parameters that were never stepped are saved without state."""
        from robust_dist.checkpoint.dcp import plain_failures
        from robust_dist.engines.fsdp.state import only_stepped
        from robust_dist.optim.groups import reshard

        with ExitStack() as stack:
            stack.enter_context(plain_failures(folder))
            for model, optimizer in zip(accelerator._models, accelerator._optimizers, strict=False):
                reshard(model)
                stack.enter_context(only_stepped(optimizer))
            accelerator.save_state(str(folder), **options)

    def load(self, accelerator: Any, folder: Path, **options: Any) -> None:
        """Like `accelerator.load_state`; exactly the parameters with state in the checkpoint get state.

        torch and Accelerate 1.15 fail under FSDP2 ("Missing key") if a trainable parameter was never stepped; they
        silently drop the state of parameters that are frozen now, and all state if there are gradients, as under FSDP1
        before the first step. torch 2.14's planner fails under FSDP1 ("Missing key ... optimizer.param_groups") if a
        parameter has fewer rows than there are ranks.

        Raises:
            CheckpointError: A file is missing or damaged, or contains more than tensors and plain values.
        """
        from robust_dist.checkpoint.dcp import plain_failures
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
        """Write DCP's folders, or the full files for FULL_STATE_DICT."""
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
    """Give parameters without state that of a first step, because FSDP2 loads state for all; returns a note."""
    held = {*state.optimizer, *state.extra.get("frozen", ())}
    missing = [name for group in state.groups for name in group["params"] if name not in held]
    averages = any("z" in entry for entry in state.optimizer.values())
    for name in missing:
        param = state.model[name]
        zeros = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        step = torch.zeros((), dtype=torch.float32)
        state.optimizer[name] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if averages:
            state.optimizer[name]["z"] = param.to(zeros.dtype, copy=True)
    return [f"no state was saved for {missing[:5]} ({len(missing)} in all): written as before a first step"] * bool(
        missing
    )


def _with_schedule_keys(state: "TrainingState") -> "TrainingState":
    """The state with the base values that a RobustSchedule keeps in the groups; FSDP2 requires them in the file."""
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
