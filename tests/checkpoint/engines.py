"""The course of `tests.engines.course` under torch's and Accelerate's engines, with checkpoints in every form."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from robust_dist.checkpoint import load_state, note_parameters, save_state
from robust_dist.optim.groups import clean_name
from tests.engines import course
from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus
from tests.engines.odd_moments import SpareNet
from tests.engines.torch_engines import same_bits

SAVED = course.SAVED
# name -> (version of FSDP, its state dict); None: DDP
ACCELERATED = {
    "accelerate ddp": None,
    "accelerate fsdp1": (1, "SHARDED_STATE_DICT"),
    "accelerate fsdp2": (2, "SHARDED_STATE_DICT"),
    "accelerate fsdp1 full": (1, "FULL_STATE_DICT"),
    "accelerate fsdp2 full": (2, "FULL_STATE_DICT"),
}


def _whole(model):
    def full(param):
        return param.full_tensor() if isinstance(param, DTensor) else param

    return {clean_name(n, model): full(p.detach()).clone() for n, p in model.named_parameters()}


class CourseRun:
    """One run of the course; subclasses set model, optimizer and schedule."""

    def whole(self):
        if not isinstance(self.model, FSDP):
            return _whole(self.model)
        with FSDP.summon_full_params(self.model, writeback=False):
            return _whole(self.model)

    def go(self, first, last=course.TOTAL):
        """Steps [first, last), checking each one's decay and rate; the parameters then equal those of one process."""
        for step in range(first, last):
            course.assert_settings(self.optimizer.param_groups, step)
            for index in range(course.ACCUMULATION):
                images, labels = course.part(step, index, *self.ranks())
                self.backward(course.loss_of(self.model(images), labels) / course.ACCUMULATION)
            self.clip()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        course.assert_on_track(self.whole(), last)

    def ranks(self):
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def backward(self, loss):
        loss.backward()

    def clip(self):
        if isinstance(self.model, FSDP):
            self.model.clip_grad_norm_(course.CLIP)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), course.CLIP)


class TorchRun(CourseRun):
    """Under torch alone: "one process", "DDP", "FSDP1" or "FSDP2"; sharded ones save with DCP."""

    def __init__(self, kind):
        self.model = getattr(self, "_" + kind.lower().replace(" ", "_"))(course.Net())
        self.optimizer = course.optimizer_of(self.model)
        self.schedule = course.schedule_of(self.optimizer)

    def _one_process(self, model):
        return model

    def _ddp(self, model):
        return nn.parallel.DistributedDataParallel(model)

    def _fsdp1(self, model):
        model.up = FSDP(model.up, device_id=torch.device("cpu"), use_orig_params=True)
        return FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)

    def _fsdp2(self, model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def save(self, path):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}, checkpoint_id=path)

    def save_file(self, path):
        content = {key: getattr(self, key).state_dict() for key in ("model", "optimizer", "schedule")}
        if dist.get_rank() == 0:
            torch.save(content, path)

    def load(self, path):
        """From a converted folder, with DCP alone."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        for folder, content in (("pytorch_model_fsdp_0", {"model": model}), ("optimizer_0", {"optimizer": optimizer})):
            planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
            dcp.load(content, checkpoint_id=path / folder, planner=planner)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.schedule.load_state_dict(torch.load(path / "scheduler.bin", weights_only=True))


class AcceleratedRun(CourseRun):
    """Under Accelerate."""

    def __init__(self, kind, model=None):
        self.kind, self.accelerator = kind, _accelerator(kind)
        model = model or course.Net()
        optimizer = course.optimizer_of(model)
        schedule = course.schedule_of(optimizer)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def backward(self, loss):
        self.accelerator.backward(loss)

    def clip(self):
        self.accelerator.clip_grad_norm_(self.model.parameters(), course.CLIP)

    def save(self, path):
        save_state(self.accelerator, path)
        if self.kind == "accelerate ddp":
            note_parameters(path, self.model, self.optimizer)

    def load(self, path):
        load_state(self.accelerator, path)


def _accelerator(kind):
    from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if ACCELERATED[kind] is None:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    pretend_fsdp_runs_on_cpus()
    version, state_dict = ACCELERATED[kind]
    how = {"use_orig_params": True} if version == 1 else {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type=state_dict, auto_wrap_policy="no_wrap", **how
    )
    return Accelerator(fsdp_plugin=plugin)


def run_of(kind):
    return AcceleratedRun(kind) if kind in ACCELERATED else TorchRun(kind)


def write(kind, folder):
    """Train under an engine and leave checkpoints from before and after the switch in `folder`."""
    run = TorchRun("DDP") if kind == "file" else run_of(kind)
    for first, last in zip((0, *SAVED[:-1]), SAVED, strict=True):
        run.go(first, last)
        path = Path(folder, f"{kind} at {last}")
        run.save_file(path) if kind == "file" else run.save(path)


def go_on(kind, path, step):
    """Load a converted checkpoint under an engine, and follow one process's course to the end."""
    run = run_of(kind)
    run.load(Path(path))
    course.assert_settings(run.optimizer.param_groups, step)
    run.go(step)


def fsdp1_loads_nothing_into_an_optimizer_without_state(path):
    """Accelerate's silent failure that `load_state` fixes: nothing is raised, and the state is gone."""
    run = run_of("accelerate fsdp1")
    run.accelerator.load_state(str(path))
    assert not run.optimizer.optimizer.state


class SpareRun(AcceleratedRun):
    """A model with a layer that takes no part until asked to."""

    def __init__(self, kind):
        self.net = SpareNet(torch.float32)
        super().__init__(kind, self.net)

    def train(self, first, last, asked=False):
        self.net.asked = asked
        for step in range(first, last):
            self.lose(step)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self.whole()

    def lose(self, step):
        images, labels = course.part(step, 0, *self.ranks())
        self.backward(course.loss_of(self.model(images), labels))

    def evaluate(self):
        with torch.no_grad():
            self.model(course.part(0, 0)[0])

    def steps(self):
        state = self.optimizer.optimizer.state
        called = {clean_name(name, self.model): param for name, param in self.model.named_parameters()}
        return {name: float(state[p]["step"]) for name, p in called.items() if state.get(p)}


def odd_moments(kind, folder):
    """After an evaluation, with a parameter never stepped, with existing gradients, and frozen at the load."""
    run, path = SpareRun(kind), Path(folder, f"{kind} at an odd moment")
    save_state(run.accelerator, f"{path}, step 0")
    run.train(0, 3)
    run.lose(3)
    before, steps = [_bits(param.grad) for param in run.model.parameters()], run.steps()
    # FSDP1 gives zero gradients to unused parameters of a used unit, and steps them.
    assert "fsdp1" in kind or steps == dict.fromkeys([n for n, _ in course.Net().named_parameters()], 3.0)
    run.evaluate()
    run.save(path)
    assert [_bits(param.grad) for param in run.model.parameters()] == before
    run.optimizer.zero_grad()
    end = run.train(3, 6, asked=True)
    fresh = SpareRun(kind)
    load_state(fresh.accelerator, f"{path}, step 0")
    assert not fresh.steps()
    fresh.lose(0)
    fresh.evaluate()
    fresh.net.down.requires_grad_(False)
    load_state(fresh.accelerator, path)
    fresh.net.down.requires_grad_(True)
    fresh.optimizer.zero_grad()
    assert fresh.steps() == steps
    assert same_bits(fresh.train(3, 6, asked=True), end)


def _bits(grad):
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return None if local is None else local.numpy().tobytes()
