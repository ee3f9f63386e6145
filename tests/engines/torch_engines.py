"""torch's own engines under the course: how each wraps, synchronises, clips and gathers."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.groups import clean_name
from tests.engines import course

# A weight, a gradient or an activation in bfloat16 is right to 2**-9 of itself; at the rates of the course their
# errors add up to some hundredths after 12 steps.
BF16_TOLERANCE = 0.05


def _all_ranks():
    return dist.get_rank(), dist.get_world_size()


def _two_by_two(first, second):
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(first, second))


# One mesh a process: a mesh makes process groups.
mesh_of = functools.cache(_two_by_two)


@functools.cache
def flat_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _shard(model, mesh, **options):
    """`up` in a group of its own, the rest at the root: rows of 10, 3 and 1 over the ranks."""
    fully_shard(model.up, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _fsdp2(model):
    return _shard(model, flat_mesh())


def _fsdp2_mixed_precision(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _shard(model, flat_mesh(), mp_policy=policy)


def _hsdp(model):
    return _shard(model, mesh_of("replicate", "shard"))


def _tensor_parallel(model):
    mesh = mesh_of("data", "tensor")
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _shard(model, mesh["data"])


def _fsdp1(model, *, strategy=ShardingStrategy.FULL_SHARD, use_orig_params=True, mesh=None):
    options = {"sharding_strategy": strategy, "use_orig_params": use_orig_params, "device_mesh": mesh}
    options["device_id"] = torch.device("cpu")
    model.up = FSDP(model.up, **options)
    return FSDP(model, **options)


def _accumulate_plainly(model, last):
    return contextlib.nullcontext()


def _accumulate_without_sync(model, last):
    return contextlib.nullcontext() if last else model.no_sync()


def _accumulate_sharded(model, last):
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _clip(model):
    """torch's clipping; parameters of several meshes, as under tensor parallelism, are normed mesh by mesh."""
    by_mesh = {}
    for p in model.parameters():
        by_mesh.setdefault(getattr(p, "device_mesh", None), []).append(p)
    if len(by_mesh) == 1:
        return full(nn.utils.clip_grad_norm_(model.parameters(), course.CLIP))
    norms = [
        full(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])) for params in by_mesh.values()
    ]
    norm = torch.stack(norms).norm()
    for params in by_mesh.values():
        nn.utils.clip_grads_with_norm_(params, course.CLIP, norm)
    return norm


def _clip_flat(model):
    return model.clip_grad_norm_(course.CLIP)


def _whole(model):
    return {clean_name(n, model): full(p.detach()).float().clone() for n, p in model.named_parameters()}


def _whole_flat(model):
    with FSDP.summon_full_params(model, writeback=False):
        return _whole(model)


@dataclass(frozen=True)
class Engine:
    """One engine: what it does to the course's model, and how it is used."""

    wrap: Callable[[nn.Module], nn.Module]
    accumulate: Callable = _accumulate_plainly
    clip: Callable[[nn.Module], Tensor] = _clip
    whole: Callable[[nn.Module], dict] = _whole
    dtype: torch.dtype = torch.float32
    data: Callable[[], tuple[int, int]] = _all_ranks
    tolerance: float = course.TOLERANCE
    one_group: bool = False


def _data_parallel_ranks():
    mesh = mesh_of("data", "tensor")
    return mesh.get_local_rank("data"), 2


_FSDP1 = Engine(_fsdp1, _accumulate_without_sync, _clip_flat, _whole_flat)
_FSDP2 = Engine(_fsdp2, _accumulate_sharded)

ENGINES = {
    "one process": Engine(lambda model: model, data=lambda: (0, 1)),
    "DDP": Engine(nn.parallel.DistributedDataParallel, _accumulate_without_sync),
    "FSDP1": _FSDP1,
    "FSDP1, use_orig_params=False": replace(
        _FSDP1, wrap=functools.partial(_fsdp1, use_orig_params=False), one_group=True
    ),
    "FSDP1, SHARD_GRAD_OP": replace(_FSDP1, wrap=functools.partial(_fsdp1, strategy=ShardingStrategy.SHARD_GRAD_OP)),
    "FSDP1, HYBRID_SHARD": replace(
        _FSDP1,
        wrap=lambda model: _fsdp1(model, strategy=ShardingStrategy.HYBRID_SHARD, mesh=mesh_of("replicate", "shard")),
    ),
    "FSDP2": _FSDP2,
    "FSDP2, bf16": replace(_FSDP2, dtype=torch.bfloat16, tolerance=BF16_TOLERANCE),
    "FSDP2, bf16 mixed precision": replace(_FSDP2, wrap=_fsdp2_mixed_precision, tolerance=BF16_TOLERANCE),
    "HSDP": replace(_FSDP2, wrap=_hsdp),
    "FSDP2 + tensor parallel": replace(_FSDP2, wrap=_tensor_parallel, data=_data_parallel_ranks),
}


@functools.cache
def one_group_reference():
    """Parameters before each step and after the last of the course in one process with one group: decay for all."""
    model = course.Net()
    optimizer = RAdaBeliefW(model.parameters(), lr=course.LR, weight_decay=course.DECAY)
    track = [course.named(model)]
    for step in range(course.TOTAL):
        decays, rates = course.wanted(step)
        optimizer.param_groups[0].update(weight_decay=decays[0], lr=rates[0])
        for index in range(course.ACCUMULATION):
            images, labels = course.part(step, index)
            (course.loss_of(model(images), labels) / course.ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(model.parameters(), course.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        track.append(course.named(model))
    return track


class Run:
    """One run of the course under an engine, from its start or from what is loaded into it.

    `used` lists the (decay, rate) of every group as the optimizer found them, step by step.
    """

    def __init__(self, engine, total=course.TOTAL):
        self.engine = ENGINES[engine]
        self.model = self._model()
        self.optimizer = self._optimizer()
        self.schedule = course.RobustSchedule(self.optimizer, total, weight_decay_off_at=course.OFF_AT)
        self.used = []
        self.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self.used.append([(g["weight_decay"], g["lr"]) for g in optimizer.param_groups])
        )

    def _model(self):
        return self.engine.wrap(course.Net(self.engine.dtype))

    def _optimizer(self):
        if self.engine.one_group:
            return RAdaBeliefW(self.model.parameters(), lr=course.LR, weight_decay=course.DECAY)
        return course.optimizer_of(self.model)

    def train_part(self, images, labels, last):
        with self.engine.accumulate(self.model, last):
            loss = course.loss_of(self.model(images.to(self.engine.dtype)), labels)
            (loss / course.ACCUMULATION).backward()

    def finish_step(self):
        self.engine.clip(self.model)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def evaluate(self):
        """A forward pass without a backward, as an evaluation makes it."""
        images, _ = course.part(0, 0, *self.engine.data())
        self.model.eval()
        with torch.no_grad():
            self.model(images.to(self.engine.dtype))
        self.model.train()

    def gradients(self):
        return {n: p.grad if p.grad is None else _local(p.grad).clone() for n, p in self.model.named_parameters()}

    def whole(self):
        return self.engine.whole(self.model)

    def assert_settings(self, step):
        groups = self.optimizer.param_groups
        if self.engine.one_group:
            assert len(groups) == 1
            groups = [groups[0], {**groups[0], "weight_decay": 0.0}]
        course.assert_settings(groups, step)

    def watched(self):
        """The course, held to the track of one process at every step."""
        rank, world = self.engine.data()
        if not self.engine.one_group:
            parts = (self.train_part, self.finish_step, lambda: self.optimizer.param_groups, self.whole)
            return course.drive(*parts, rank=rank, world=world, tolerance=self.engine.tolerance)
        for step in range(course.TOTAL):
            end = self.go(step, step + 1)
            for name, value in end.items():
                error = (value - one_group_reference()[step + 1][name]).abs().max().item()
                assert error <= self.engine.tolerance, f"after {step + 1} steps {name} is off by {error:.2e}"
        return end

    def go(self, first, last=course.TOTAL):
        """Steps [first, last); returns the whole parameters."""
        rank, world = self.engine.data()
        for step in range(first, last):
            self.assert_settings(step)
            for index in range(course.ACCUMULATION):
                self.train_part(*course.part(step, index, rank, world), index == course.ACCUMULATION - 1)
            self.finish_step()
        return self.whole()

    def assert_ends_on_track(self):
        """The whole parameters are those that one process ends with."""
        track = one_group_reference() if self.engine.one_group else course.reference().parameters
        for name, value in self.whole().items():
            error = (value - track[-1][name]).abs().max().item()
            assert error <= self.engine.tolerance, f"{name} is off by {error:.2e}"

    def states(self):
        """Clean name -> (parameter, its state) of the parameters that this rank has state of."""
        named = {clean_name(n, self.model): p for n, p in self.model.named_parameters()}
        return {n: (p, self.optimizer.state[p]) for n, p in named.items() if p in self.optimizer.state}


def same_bits(a, b):
    """Whether two sets of whole parameters are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
