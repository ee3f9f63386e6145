"""Accelerate: from a launcher to an `Accelerator`, checks that the run is as requested, calls of schedulers."""

import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from robust_dist.engines.engine import EngineError
from robust_dist.engines.rate import feed, idle_schedule, measures, tell_copies
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import world_size
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch, base_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["EngineError", "base_optimizer", "check", "check_schedule"]

# Frames between Accelerate's wrapper and the scheduler inside it: a few nested schedulers.
_MAX_FRAMES = 10
_LAUNCHER = re.compile(r"(^|/)accelerate(-launch)?$|^accelerate\.commands\.")
_FSDP = "ACCELERATE_USE_FSDP"
_SHARDING = ("ACCELERATE_USE_DEEPSPEED", _FSDP)


def is_copy() -> bool:
    """Whether the current call repeats one that Accelerate's AcceleratedScheduler has made in the same `step()`.

    It makes one call per process for each optimizer step, unless split_batches is set or it does not step with the
    optimizer. The first one is the call, the others are its copies.

    Raises:
        RuntimeError: A torch scheduler in between counts each copy.
    """
    wrapper = _accelerates_frame() if "accelerate.scheduler" in sys.modules else None
    if wrapper is None:
        return False
    _check_version(wrapper.f_code)
    number = wrapper.f_locals.get("_")
    if number is None:
        return False
    problem = miscounted(wrapper.f_locals["self"])
    if problem:
        raise RuntimeError(problem)
    return bool(number > 0)


def _check_version(code: CodeType) -> None:
    """Reject a version of Accelerate whose loop does not number the copies in a local variable."""
    if "range" in code.co_names and "_" not in code.co_varnames:
        raise RuntimeError(
            f"accelerate {sys.modules['accelerate'].__version__} calls schedulers in a way that is not supported; "
            "leave the schedule out of accelerator.prepare, and call its step() once after each optimizer step"
        )


def miscounted(wrapper: Any) -> str | None:
    """The problem with a prepared scheduler that counts each of an AcceleratedScheduler's copies of a call, or None."""
    processes = int(sys.modules["accelerate.state"].AcceleratorState().num_processes)
    held = wrapper.scheduler
    if processes == 1 or wrapper.split_batches or not wrapper.step_with_optimizer or not counts_itself(held):
        return None
    name = type(held).__name__
    return (
        f"a RobustSchedule is in a {name}, whose step() Accelerate calls {processes} times for each optimizer step, "
        f"once per process: its milestones and other schedulers run {processes} times too fast. Leave the {name} out "
        "of accelerator.prepare, pass it to accelerator.register_for_checkpointing, and call its step() once after "
        "each optimizer step (under accumulation where accelerator.sync_gradients is true)"
    )


def counts_itself(scheduler: Any) -> bool:
    """Whether a scheduler counts calls for others inside it, like torch's SequentialLR and ChainedScheduler."""
    if isinstance(scheduler, SequentialLR):
        return True
    held: list[LRScheduler] = list(getattr(scheduler, "_schedulers", ()))
    return isinstance(scheduler, ChainedScheduler) and (len(held) > 1 or any(map(counts_itself, held)))


def _accelerates_frame() -> FrameType | None:
    """The frame of the AcceleratedScheduler.step() that makes the current call."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name == "step" and frame.f_globals.get("__name__") == "accelerate.scheduler":
            return frame
        frame = frame.f_back
    return None


def check(
    accelerator: Any,
    optimizer: Any,
    *,
    num_processes: int | None = None,
    schedule: Any = None,
    total_steps: int | None = None,
    optimizer_class: type[Optimizer] = RAdaBeliefW,
) -> None:
    """Check, after `Accelerator.prepare` and before the first step, that the run is as requested.

    From then on an optimizer with `rate_guard` gets what it needs: `accelerator.backward` observes the loss and
    `accelerator.clip_grad_norm_` the gradients, unless the program does so itself; under FSDP1 it gets the number of
    copies of each shard.

    Args:
        accelerator: The `Accelerator`.
        optimizer: The optimizer returned by `prepare`.
        num_processes: The requested number of processes, if the program knows it.
        schedule: As in `check_schedule`; None does not check it.
        total_steps: Optimizer steps of the run, for the schedule.
        optimizer_class: The class of the optimizer, if it is not RAdaBeliefW.

    Raises:
        EngineError: The processes, the engine or the optimizer are not as requested, or Accelerate steps a
            SequentialLR once per process; the message says which line to change.
        ValueError: As in `check_schedule`, or a scheduler was prepared for an optimizer that ignores learning rates.
    """
    _check_processes(accelerator, num_processes)
    _check_engine(accelerator)
    _check_optimizer(accelerator, optimizer, optimizer_class)
    fit_rate(accelerator, base_optimizer(optimizer))
    _check_rates_count(base_optimizer(optimizer), [schedule, *getattr(accelerator, "_schedulers", ())])
    if schedule is not None:
        check_schedule(accelerator, optimizer, schedule, total_steps=total_steps)


def _check_rates_count(optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    idle = next(filter(None, (idle_schedule(optimizer, one) for one in schedulers)), None)
    if idle is not None:
        raise ValueError(
            f"a {idle} sets the learning rate, and RAdaBeliefW's rate_guard=1 takes none: leave it out, or take "
            "RobustSchedule(..., decay='constant'), which still switches the weight decay off; or set rate_guard above "
            "1, within which the rate counts"
        )


def check_schedule(accelerator: Any, optimizer: Any, schedule: Any, *, total_steps: int | None = None) -> None:
    """Check that the switch will happen at the right step: for this optimizer, with this run's number of steps.

    Args:
        accelerator: The `Accelerator`.
        optimizer: The optimizer returned by `prepare`.
        schedule: The RobustSchedule returned by `prepare`, a SequentialLR or ChainedScheduler that contains one, or a
            WeightDecaySwitch.
        total_steps: Optimizer steps of the run; None accepts the schedule's own number. In a SequentialLR a schedule
            has only a part of the run, and its number is not compared.

    Raises:
        EngineError: Accelerate would step a SequentialLR or a ChainedScheduler once per process.
        ValueError: The schedule is not ours, drives another optimizer, or has another number of steps.
    """
    switch = _switch_of(schedule)
    if switch.optimizer is not base_optimizer(optimizer):
        raise ValueError(
            f"the schedule drives another {type(switch.optimizer).__name__} than the one that trains; create it with "
            "the optimizer that is passed to accelerator.prepare, and prepare both in one call"
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
    """Whether DeepSpeed has created the schedule from its JSON, instead of a DummyScheduler."""
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
            "accelerate launch was asked for several processes and started ONE (its --cpu does that); use --multi_gpu "
            "instead of --cpu, which also starts one process per rank on CPUs, or use --num_processes 1"
        )
    if asked is not None and runs != asked:
        raise EngineError(
            f"num_processes={asked} were requested, but {runs} run; on CPUs start them with ACCELERATE_USE_CPU=true "
            f"torchrun --nproc_per_node {asked} SCRIPT (accelerate launch --cpu starts one), on GPUs with accelerate "
            f"launch --num_processes {asked} SCRIPT"
        )


def _launcher_wanted_more() -> bool:
    """Whether Accelerate's launcher of one process set MASTER_ADDR, as it does when asked for more."""
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
    return "on CPUs set ACCELERATE_USE_CPU=true, or create the Accelerator with cpu=True"


def no_fsdp_on_cpus(engine: str) -> EngineError:
    """The error for a run launched with FSDP without a GPU."""
    return EngineError(
        f"FSDP was requested (ACCELERATE_USE_FSDP=true), but the engine is {engine}: Accelerate does not support FSDP "
        "on CPUs; leave --use_fsdp out, or run on GPUs"
    )


def _check_engine(accelerator: Any) -> None:
    engine = accelerator.distributed_type.value
    if is_set("ACCELERATE_USE_DEEPSPEED") and engine != "DEEPSPEED":
        raise EngineError(
            f"DeepSpeed was requested (ACCELERATE_USE_DEEPSPEED=true), but the engine is {engine}; leave out "
            "ACCELERATE_USE_CPU and Accelerator(cpu=True): DeepSpeed finds the CPU itself"
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
        why = replaced_by_offload(base, name) or f"pass {name} to accelerator.prepare"
        raise EngineError(f"the optimizer that trains is {found}, not {name}: {why}")
    prepared = [base_optimizer(held) for held in getattr(accelerator, "_optimizers", [])]
    if not any(held is base for held in prepared):
        raise EngineError(
            "this optimizer was not passed to accelerator.prepare, so its steps are not synchronised; check the "
            "optimizer returned by prepare"
        )


def fit_rate(accelerator: Any, base: Any) -> None:
    """Connect averaging and rate_guard to the engine, or raise EngineError if it does not support them."""
    used = measures(base) or getattr(base, "averages_weights", False)
    if used and accelerator.distributed_type.value == "DEEPSPEED" and not getattr(base, "engine_keeps_weights", True):
        raise EngineError(
            "under DeepSpeed RAdaBeliefW's averaging and rate_guard need robust_dist.register() (or import "
            "robust_dist.autoregister) on every rank before accelerator.prepare"
        )
    if used and accelerator.distributed_type.value == "DEEPSPEED":
        for wrapper in accelerator._optimizers:
            held, is_ours = wrapper.optimizer, base_optimizer(wrapper) is base
            # Before 1.15 Accelerate's eval() and train() look no further than DeepSpeed's optimizer, which has neither.
            if is_ours and not hasattr(held, "eval"):
                held.train, held.eval = base.train, base.eval
    if measures(base):
        feed(accelerator)
        for model in accelerator._models:
            tell_copies(model, base)


def _base_or_error(optimizer: Any) -> Optimizer:
    try:
        return base_optimizer(optimizer)
    except TypeError as error:
        raise EngineError(
            f"{error}; a DummyOptim must be prepared under DeepSpeed, with the optimizer's name in its JSON"
        ) from error


def replaced_by_offload(base: Optimizer, wanted: str) -> str | None:
    """The remedy if DeepSpeed has replaced `wanted` by its own optimizer; None for any other."""
    if not type(base).__module__.startswith("deepspeed"):
        return None
    return (
        'DeepSpeed\'s offload replaces it; set "zero_force_ds_cpu_optimizer": false in its JSON, and "type": '
        f'"{wanted}" if the JSON has an optimizer'
    )


def make_accelerator(
    *, mixed_precision: str, accumulation: int, folder: str, timeout: timedelta, init_method: str | None = None
) -> "Accelerator":
    """The Accelerator for the engine with which this rank was launched.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        accumulation: Number of consecutive micro-batches of a rank in a batch.
        folder: The run's folder; trackers write below it.
        timeout: Time after which a rank stops waiting for another one.
        init_method: How the ranks meet; None leaves it to the launcher.

    Raises:
        EngineError: A configuration for GPUs without a GPU, or a mesh for another number of ranks.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    check_mesh()
    check_launch()
    on_cpu, sharded = not torch.cuda.is_available(), any(map(is_set, _SHARDING))
    try:
        return Accelerator(
            # It turns torchrun's processes into gloo ranks, but switches DeepSpeed and FSDP off.
            cpu=on_cpu and not sharded,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=accumulation,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=os.path.join(folder, "trackers")),
            kwargs_handlers=[
                InitProcessGroupKwargs(
                    backend="gloo" if on_cpu and sharded else "nccl", init_method=init_method, timeout=timeout
                ),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except RuntimeError as error:
        # Accelerate raises this for a plugin whose ranks broadcast their weights on a GPU.
        if on_cpu and is_set(_FSDP) and "no available devices" in str(error):
            raise no_fsdp_on_cpus("NO") from None
        raise


def check_mesh() -> None:
    """Reject a mesh for another number of ranks than launched, which torch and Accelerate explain only in part."""
    # Accelerate counts the ranks of other launchers, such as MPI.
    if not is_set("ACCELERATE_USE_PARALLELISM_CONFIG") or "WORLD_SIZE" not in os.environ:
        return
    names = [f"{kind}_size" for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in names}
    ranks, wanted = int(os.environ["WORLD_SIZE"]), math.prod(sizes.values())
    # All ones mean DDP; DeepSpeed's sequence parallelism has its own groups.
    if wanted not in (1, ranks) and sizes["sp_size"] == 1:
        set_here = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise EngineError(
            f"parallelism_config: {set_here} is a mesh of {wanted} ranks, but {ranks} were launched; launch {wanted} "
            "(--num_processes), or set the sizes so that their product is the number of ranks"
        )


def check_launch() -> None:
    """Reject ranks started with a configuration for GPUs on a host without any, or one process instead of several.

    FSDP is rejected elsewhere; DeepSpeed finds the CPU itself. ACCELERATE_USE_CPU=true requests ranks on the CPU.

    Raises:
        EngineError: The message says how to start the same run on the CPU.
    """
    if torch.cuda.is_available() or any(is_set(name) for name in (*_SHARDING, "ACCELERATE_USE_CPU")):
        return
    words = _launcher_words()
    wanted, found = gpus_wanted(words), int(os.environ.get("WORLD_SIZE", "1"))
    ranks = max(found, int(_option(words, "--num_processes") or 1)) if _is_launcher(words) else found
    if wanted:
        problem = (
            f"{wanted}, and torch sees no GPU here; {ranks} ranks on the processor would be slow and may need more "
        )
        problem += "memory than there is"
    elif "RANK" not in os.environ and ranks > 1:
        problem = f"accelerate launch was asked for {ranks} processes and started ONE, as torch sees no GPU here"
    else:
        return
    script = words[_script_at(words) :] or ["launch/train.py"]
    raise EngineError(
        f"{problem}. If you want ranks on the processor: accelerate launch --config_file configs/accelerate/cpu.yaml "
        f"--num_processes {min(ranks, cores_here())} {shlex.join(script)}"
    )


def gpus_wanted(words: Sequence[str]) -> str | None:
    """A description of the launcher's file for the GPUs of one host; None if there is none."""
    if not _is_launcher(words):
        return None
    import yaml

    name = _option(words, "--config_file")
    try:
        config: Any = yaml.safe_load(Path(name).read_text(encoding="utf-8")) if name else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or config.get("use_cpu") or config.get("distributed_type") != "MULTI_GPU":
        return None
    if int(_option(words, "--num_machines") or config.get("num_machines") or 1) > 1:
        return None
    return f"{name} is for GPUs (distributed_type: MULTI_GPU, use_cpu: false)"


def _is_launcher(words: Sequence[str]) -> bool:
    return any(_LAUNCHER.search(word) for word in words)


def cores_here() -> int:
    """Cores of this host that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of a launcher's option, ignoring those of the training command."""
    words = words[: _script_at(words)]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _script_at(words: Sequence[str]) -> int:
    """The index of the training command in a launcher's arguments."""
    return next((number for number, word in enumerate(words) if word.endswith("train.py")), len(words))


def _launcher_words() -> list[str]:
    """The command line of the parent process; empty if the system does not provide it."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
