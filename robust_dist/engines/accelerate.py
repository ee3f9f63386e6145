"""Accelerate: a set-up that would silently run otherwise than asked is an error here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import SequentialLR

from robust_dist.engines.accelerate_scheduler import miscounted
from robust_dist.engines.engine import EngineError
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import world_size
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch, base_optimizer

__all__ = ["EngineError", "base_optimizer", "check", "check_schedule"]


def check(
    accelerator: Any,
    optimizer: Any,
    *,
    num_processes: int | None = None,
    schedule: Any = None,
    total_steps: int | None = None,
    optimizer_class: type[Optimizer] = RAdaBeliefW,
) -> None:
    """Check, after `Accelerator.prepare` and before the first step, that the run is the one that was asked for.

    Under FSDP1 it also tells an optimizer with a `rate_guard` which ranks hold the same shards.

    Args:
        accelerator: The `Accelerator`.
        optimizer: What `prepare` returned for the optimizer.
        num_processes: How many processes were asked for, where the program knows.
        schedule: What `prepare` returned for a RobustSchedule, or a WeightDecaySwitch; None: it is not checked.
        total_steps: Optimizer steps that the run will make, for the schedule.
        optimizer_class: What must do the arithmetic, where the program made another optimizer than RAdaBeliefW.

    Raises:
        EngineError: The engine runs other processes, or another engine, or another optimizer than asked, or steps a
            SequentialLR once per process; the message says which line to change.
        ValueError: The schedule is none of ours, drives another optimizer, or has another number of steps.
    """
    _check_processes(accelerator, num_processes)
    _check_engine(accelerator)
    _check_optimizer(accelerator, optimizer, optimizer_class)
    _fit_rate(accelerator, base_optimizer(optimizer))
    if schedule is not None:
        check_schedule(accelerator, optimizer, schedule, total_steps=total_steps)


def check_schedule(accelerator: Any, optimizer: Any, schedule: Any, *, total_steps: int | None = None) -> None:
    """Check that the switch will fall on the right step: of this optimizer, at this run's steps.

    Args:
        accelerator: The `Accelerator`.
        optimizer: What `prepare` returned for the optimizer.
        schedule: What `prepare` returned for a RobustSchedule, or for a SequentialLR or ChainedScheduler that holds
            one; or a WeightDecaySwitch.
        total_steps: Optimizer steps that the run will make; None: the schedule's own number is taken as right. In a
            SequentialLR a schedule has a part of the run, and its number is not compared.

    Raises:
        EngineError: Accelerate would step a SequentialLR or a ChainedScheduler once per process.
        ValueError: The schedule is none of ours, drives another optimizer, or has another number of steps.
    """
    switch = _switch_of(schedule)
    if switch.optimizer is not base_optimizer(optimizer):
        raise ValueError(
            f"the schedule drives another {type(switch.optimizer).__name__} than the one that trains; make it with the "
            "optimizer that is handed to accelerator.prepare, and prepare both in one call"
        )
    problem = miscounted(schedule) if hasattr(schedule, "step_with_optimizer") else None
    if problem:
        raise EngineError(problem)
    in_parts = isinstance(getattr(schedule, "scheduler", schedule), SequentialLR)
    if total_steps is not None and switch.total_steps != total_steps and not in_parts:
        raise ValueError(
            f"the schedule has total_steps={switch.total_steps}, the run makes {total_steps} optimizer steps on its "
            f"{accelerator.num_processes} processes; {_right_total(accelerator, schedule, total_steps)}"
        )


def _right_total(accelerator: Any, schedule: Any, total_steps: int) -> str:
    """The change that gives the schedule the run's number of steps."""
    if not _is_from_json(accelerator, schedule):
        return f"give RobustSchedule total_steps={total_steps} (optimizer steps, not batches of all processes)"
    processes = 1 if accelerator.split_batches else accelerator.num_processes
    divided = f", as Accelerate divides it by the {processes} processes" if processes > 1 else ""
    return (
        f"give DummyScheduler total_num_steps={total_steps * processes}{divided}, and the DeepSpeed JSON "
        f'"total_num_steps": "auto", or write "total_num_steps": {total_steps} there'
    )


def _is_from_json(accelerator: Any, schedule: Any) -> bool:
    """Whether DeepSpeed has made the schedule from its JSON, in the place of a DummyScheduler."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return (
        type(schedule).__name__ == "DeepSpeedSchedulerWrapper"
        and plugin is not None
        and "scheduler" in plugin.deepspeed_config
    )


def _switch_of(schedule: Any) -> WeightDecaySwitch:
    inner = getattr(schedule, "scheduler", schedule)
    held = next(_robust_schedules(inner), inner)
    switch = held.weight_decay_switch if isinstance(held, RobustSchedule) else held
    if not isinstance(switch, WeightDecaySwitch):
        raise ValueError(
            f"the schedule is a {type(inner).__name__} without a weight-decay switch; use RobustSchedule, or check "
            "the WeightDecaySwitch itself"
        )
    return switch


def _robust_schedules(scheduler: Any) -> Iterator[RobustSchedule]:
    """The scheduler itself, or those inside a SequentialLR or ChainedScheduler."""
    if isinstance(scheduler, RobustSchedule):
        yield scheduler
    for held in getattr(scheduler, "_schedulers", ()):
        yield from _robust_schedules(held)


def _check_processes(accelerator: Any, asked: int | None) -> None:
    runs = int(accelerator.num_processes)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world = world_size()
    if runs < max(launched, world):
        raise EngineError(
            f"the launcher started {max(launched, world)} processes, but Accelerate trains in {runs}, so that each "
            f"would train alone; {_how_to_join()}"
        )
    if runs == 1 and _launcher_wanted_more():
        raise EngineError(
            "accelerate launch was asked for several processes and started ONE (its --cpu does that); take "
            "--multi_gpu in place of --cpu, which starts a process a rank on CPUs, too, or ask for --num_processes 1"
        )
    if asked is not None and runs != asked:
        raise EngineError(
            f"num_processes={asked} were asked for, but {runs} run; on CPUs start them with ACCELERATE_USE_CPU=true "
            f"torchrun --nproc_per_node {asked} SCRIPT (accelerate launch --cpu starts one), on GPUs with accelerate "
            f"launch --num_processes {asked} SCRIPT"
        )


def _launcher_wanted_more() -> bool:
    """Whether MASTER_ADDR was set by Accelerate's launcher of one process, which does so if asked for more."""
    if "MASTER_ADDR" not in os.environ or "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"MASTER_ADDR=") for entry in inherited)


def _how_to_join() -> str:
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        return 'on CPUs pass kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] to Accelerator'
    return "on CPUs set ACCELERATE_USE_CPU=true, or make the Accelerator with cpu=True"


def no_fsdp_on_cpus(engine: str) -> EngineError:
    """The error of a run that was launched with FSDP where Accelerate finds no GPU for it."""
    return EngineError(
        f"FSDP was asked for (ACCELERATE_USE_FSDP=true), but the engine is {engine}: Accelerate has no FSDP on "
        "CPUs; leave --use_fsdp out, or run on GPUs"
    )


def _check_engine(accelerator: Any) -> None:
    engine = accelerator.distributed_type.value
    if is_set("ACCELERATE_USE_DEEPSPEED") and engine != "DEEPSPEED":
        raise EngineError(
            f"DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED=true), but the engine is {engine}; leave "
            "ACCELERATE_USE_CPU and Accelerator(cpu=True) out: DeepSpeed finds the CPU by itself"
        )
    if is_set("ACCELERATE_USE_FSDP") and engine != "FSDP" and accelerator.num_processes > 1:
        raise no_fsdp_on_cpus(engine)


def is_set(name: str) -> bool:
    """Whether an environment variable is switched on."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _check_optimizer(accelerator: Any, optimizer: Any, wanted: type[Optimizer]) -> None:
    base = _base_or_error(optimizer)
    if not isinstance(base, wanted):
        found, name = f"{type(base).__module__}.{type(base).__name__}", wanted.__name__
        raise EngineError(f"the optimizer that trains is {found}, not {name}{_why(base, name)}")
    prepared = [base_optimizer(one) for one in getattr(accelerator, "_optimizers", [])]
    if not any(one is base for one in prepared):
        raise EngineError(
            "accelerator.prepare has not been given this optimizer, so that nothing synchronises its steps; check the "
            "optimizer that prepare returned"
        )


def _fit_rate(accelerator: Any, base: Any) -> None:
    """Refuse what the engine cannot do of averaging and rate_guard, and tell the optimizer who holds its shards."""
    engine = accelerator.distributed_type.value
    if engine == "DEEPSPEED":
        from robust_dist.engines.deepspeed.config import check_options

        for group in base.param_groups:
            check_options(group)
    elif engine == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 1 and getattr(base, "measures_rate", False):
        model = accelerator._models[0]
        shards = 1 if model.sharding_strategy.name == "NO_SHARD" else model.process_group.size()
        base.measure_over(copies=accelerator.num_processes // shards)


def _base_or_error(optimizer: Any) -> Optimizer:
    try:
        return base_optimizer(optimizer)
    except TypeError as error:
        raise EngineError(
            f"{error}; a DummyOptim must be prepared under DeepSpeed, with the optimizer's name in its JSON"
        ) from error


def _why(base: Optimizer, wanted: str) -> str:
    if type(base).__module__.startswith("deepspeed"):
        return (
            ': DeepSpeed\'s offload replaces it; set "zero_force_ds_cpu_optimizer": false in its JSON, and '
            f'"type": "{wanted}" where the JSON has an optimizer'
        )
    return f"; hand {wanted} to accelerator.prepare"
