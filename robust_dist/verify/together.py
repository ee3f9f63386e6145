"""Checks of the ranks together: they are alike, switch at the same step, and train and resume under each engine."""

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import robust_dist
from robust_dist import RAdaBeliefW, RobustSchedule
from robust_dist.augment import backends
from robust_dist.ranks.talk import by_rank, gather
from robust_dist.schedule import WeightDecaySwitch
from robust_dist.verify.correct import stepped
from robust_dist.verify.parts import Scene

TOTAL, SAVED, BATCH = 8, 4, 16
# Sums in another order round differently; the engines' own tests compare more closely.
TOLERANCE = 1e-4


def ranks(scene: Scene) -> None:
    """Check that every rank has the same versions, backends, bits and step of the switch, by share and by vote."""
    mine = {
        "torch": torch.__version__,
        "robust_dist": robust_dist.__version__,
        "augmentation's backend": backends.choose("auto", scene.device),
        "optimizer's bits": _digest(stepped(scene.device)),
    }
    for what, value in mine.items():
        _alike(scene, f"{what} on every rank", value)
    switched = _switch_step(lambda optimizer: RobustSchedule(optimizer, 12))
    _alike(scene, "step of the switch on every rank, by share", switched, 9)
    # One rank's wish switches every rank.
    wishes = scene.rank == scene.world_size - 1
    switched = _switch_step(lambda optimizer: WeightDecaySwitch(optimizer, 12, should_switch=lambda: wishes))
    _alike(scene, "step of the switch on every rank, by one rank's vote", switched)


def _switch_step(make: Callable[[Any], Any]) -> int:
    """The first optimizer step that ran without decay, from 0."""
    param = torch.ones(4, requires_grad=True)
    optimizer = RAdaBeliefW([param], lr=0.01, weight_decay=0.1)
    schedule = make(optimizer)
    for step in range(12):
        if optimizer.param_groups[0]["weight_decay"] == 0:
            return step
        param.grad = torch.ones(4)
        optimizer.step()
        schedule.step()
        dist.barrier()
    return -1


def _alike(scene: Scene, what: str, value: Any, wanted: Any = None) -> None:
    found = gather(value)
    wanted = found[0] if wanted is None else wanted
    odd = by_rank({rank: str(other) for rank, other in enumerate(found) if other != wanted})
    scene.claims.check(what, wanted, "; ".join(odd) or wanted, not odd)


def _digest(params: list[Tensor]) -> str:
    """A short hash of all bits."""
    return hashlib.sha256(b"".join(param.numpy().tobytes() for param in params)).hexdigest()[:16]


def model(seed: int) -> nn.Module:
    """A small classifier without batch statistics, on the CPU."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))


def batch(step: int, part: slice) -> tuple[Tensor, Tensor]:
    """The rows of a step's global batch that `part` names."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 12, generator=generator)[part], torch.randint(0, 5, (BATCH,), generator=generator)[part]


def by_one_process() -> list[Tensor]:
    """The parameters after all steps without an engine, on the CPU."""
    alone = model(0)
    optimizer = RAdaBeliefW(alone.parameters(), lr=0.01, weight_decay=0.05)
    schedule = RobustSchedule(optimizer, TOTAL, process_group=_alone())
    for step in range(TOTAL):
        inputs, labels = batch(step, slice(None))
        optimizer.zero_grad()
        nn.functional.cross_entropy(alone(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return [param.detach() for param in alone.parameters()]


def _alone() -> Any:
    """A process group of this rank alone, so that the schedule compares nothing with others."""
    groups = [dist.new_group([rank], backend="gloo") for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


class TorchRun:
    """DDP or FSDP2, with checkpoints by `robust_dist.engines.fsdp`.

    Args:
        scene: Of the part.
        wrap: Puts the engine around a model.
        seed: Of the first weights.
    """

    def __init__(self, scene: Scene, wrap: Callable[[nn.Module], nn.Module], seed: int) -> None:
        self.model = wrap(model(seed).to(scene.device))
        self.optimizer = RAdaBeliefW(self.model.parameters(), lr=0.01, weight_decay=0.05)
        self.schedule = RobustSchedule(self.optimizer, TOTAL)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One optimizer step on this rank's rows."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), labels).backward()
        self.optimizer.step()
        self.schedule.step()

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        from robust_dist.engines import fsdp

        fsdp.save(folder, self.model, self.optimizer, self.schedule)

    def load(self, folder: Path) -> None:
        """Take up a checkpoint."""
        from robust_dist.engines import fsdp

        fsdp.load(folder, self.model, self.optimizer, self.schedule)

    def parameters(self) -> list[Tensor]:
        """The whole parameters, on the CPU."""
        found = [param.detach() for param in self.model.parameters()]
        return [(param.full_tensor() if hasattr(param, "full_tensor") else param).cpu() for param in found]


class ZeroRun:
    """DeepSpeed's ZeRO, with its own checkpoints.

    Args:
        scene: Of the part.
        stage: 1, 2 or 3.
        seed: Of the first weights.
    """

    def __init__(self, scene: Scene, stage: int, seed: int) -> None:
        if scene.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_SIZE", str(scene.world_size))
        import deepspeed

        from robust_dist.engines import deepspeed as engine

        engine.register()
        config = {
            "train_micro_batch_size_per_gpu": BATCH // scene.world_size,
            "optimizer": {"type": "RAdaBeliefW", "params": {"lr": 0.01, "weight_decay": 0.05}},
            "scheduler": {"type": "RobustSchedule", "params": {"total_steps": TOTAL}},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        bare = model(seed)
        self.engine = deepspeed.initialize(model=bare, model_parameters=bare.parameters(), config=config)[0]

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One optimizer step on this rank's rows."""
        self.engine.backward(nn.functional.cross_entropy(self.engine(inputs), labels))
        self.engine.step()

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.engine.save_checkpoint(str(folder))

    def load(self, folder: Path) -> None:
        """Take up a checkpoint."""
        self.engine.load_checkpoint(str(folder))

    def parameters(self) -> list[Tensor]:
        """The whole parameters, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = [safe_get_full_fp32_param(param) for param in self.engine.module.parameters()]
        return [param.detach().cpu() for param in found]


Run = TorchRun | ZeroRun


def ddp(scene: Scene) -> None:
    """DDP."""
    devices = None if scene.device.type == "cpu" else [scene.device]

    def wrap(bare: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(bare, device_ids=devices)

    train_and_resume(scene, "DDP", lambda seed: TorchRun(scene, wrap, seed))


def fsdp2(scene: Scene) -> None:
    """FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        scene.claims.skip("FSDP2", f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard")
        return
    mesh = init_device_mesh(scene.device.type, (scene.world_size,))

    def wrap(bare: nn.Module) -> nn.Module:
        fully_shard(bare, mesh=mesh)
        return bare

    train_and_resume(scene, "FSDP2", lambda seed: TorchRun(scene, wrap, seed))


def _zero(scene: Scene, stage: int) -> None:
    with scene.claims.needing(f"ZeRO-{stage}", "deepspeed"):
        train_and_resume(scene, f"ZeRO-{stage}", lambda seed: ZeroRun(scene, stage, seed))


def zero1(scene: Scene) -> None:
    """ZeRO-1."""
    _zero(scene, 1)


def zero2(scene: Scene) -> None:
    """ZeRO-2."""
    _zero(scene, 2)


def zero3(scene: Scene) -> None:
    """ZeRO-3."""
    _zero(scene, 3)


def train_and_resume(scene: Scene, name: str, start: Callable[[int], Run]) -> None:
    """Train, save and be killed; then load into a model of other weights, go on, and compare.

    Args:
        scene: Of the part; its phases are "killed" and "continued".
        name: Of the engine.
        start: Makes a run from a seed.
    """
    folder = scene.folder / "checkpoint"
    if scene.phase == "killed":
        run = start(0)
        _steps(scene, run, 0, SAVED)
        run.save(folder)
        _steps(scene, run, SAVED, SAVED + 1)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    whole = start(0)
    _steps(scene, whole, 0, TOTAL)
    undisturbed = whole.parameters()
    error = max(_error(param, wanted) for param, wanted in zip(undisturbed, by_one_process(), strict=True))
    what = f"{name}, {scene.world_size} ranks, {TOTAL} steps: difference from one process"
    scene.claims.check(what, f"at most {TOLERANCE}", f"{error:.2e}", error <= TOLERANCE)
    run = start(1)
    run.load(folder)
    _steps(scene, run, SAVED, TOTAL)
    same = all(torch.equal(param, other) for param, other in zip(undisturbed, run.parameters(), strict=True))
    what = f"{name}: a run killed after its checkpoint, gone on with, against one that was not"
    scene.claims.check(what, "equal bits", "equal bits" if same else "other parameters", same)


def _steps(scene: Scene, run: Run, first: int, last: int) -> None:
    share = BATCH // scene.world_size
    part = slice(scene.rank * share, (scene.rank + 1) * share)
    for step in range(first, last):
        inputs, labels = batch(step, part)
        run.step(inputs.to(scene.device), labels.to(scene.device))


def _error(param: Tensor, wanted: Tensor) -> float:
    return float((param - wanted).abs().max() / wanted.abs().max())
