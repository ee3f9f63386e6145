"""The `Accelerator` that the launcher was asked for: a configuration for GPUs needs GPUs, a mesh its ranks."""

import math
import os
import re
import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from robust_dist.engines.accelerate import is_set, no_fsdp_on_cpus
from robust_dist.engines.engine import EngineError

_LAUNCHER = re.compile(r"(^|/)accelerate(-launch)?$|^accelerate\.commands\.")
_FSDP = "ACCELERATE_USE_FSDP"
_SHARDING = ("ACCELERATE_USE_DEEPSPEED", _FSDP)


def make_accelerator(
    *, mixed_precision: str, accumulation: int, folder: str, timeout: timedelta, init_method: str | None = None
) -> Accelerator:
    """The Accelerator of the engine that this rank was launched with.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        accumulation: Parts of a batch that a rank takes one after the other.
        folder: The run's; trackers write below it.
        timeout: After which a rank gives up waiting for another one.
        init_method: How the ranks meet; None as the launcher says.

    Raises:
        EngineError: A configuration for GPUs where there is none, or a mesh of another number of ranks.
    """
    check_mesh()
    check_launch()
    on_cpu, sharded = not torch.cuda.is_available(), any(map(is_set, _SHARDING))
    try:
        return Accelerator(
            # It makes gloo ranks of torchrun's processes, but turns DeepSpeed and FSDP off.
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
        # Accelerate's of a plugin whose ranks broadcast their weights on a GPU.
        if on_cpu and is_set(_FSDP) and "no available devices" in str(error):
            raise no_fsdp_on_cpus("NO") from None
        raise


def check_mesh() -> None:
    """Refuse a file whose mesh is not that of the launched ranks, of which torch and Accelerate say half.

    Raises:
        EngineError: Names the mesh's sizes and the number of ranks.
    """
    # Another launcher's ranks, as MPI's, are counted by Accelerate.
    if not is_set("ACCELERATE_USE_PARALLELISM_CONFIG") or "WORLD_SIZE" not in os.environ:
        return
    names = [f"{kind}_size" for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in names}
    ranks, wanted = int(os.environ["WORLD_SIZE"]), math.prod(sizes.values())
    # All ones are DDP; DeepSpeed's sequence parallelism has groups of its own.
    if wanted not in (1, ranks) and sizes["sp_size"] == 1:
        set_here = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise EngineError(
            f"parallelism_config: {set_here} is a mesh of {wanted} ranks, but {ranks} were launched; launch {wanted} "
            "(--num_processes), or set the sizes so that their product is the number of ranks"
        )


def check_launch() -> None:
    """Refuse ranks that a configuration for GPUs started on a host that has none, or one process in place of several.

    FSDP is refused elsewhere; DeepSpeed finds the processor by itself. With ACCELERATE_USE_CPU=true ranks on a
    processor are what was asked for.

    Raises:
        EngineError: Says how the same is started on the processor.
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
    raise EngineError(
        f"{problem}. If you want ranks on the processor: accelerate launch --config_file configs/accelerate/cpu.yaml "
        f"--num_processes {min(ranks, cores_here())} {shlex.join(_script(words))}"
    )


def gpus_wanted(words: Sequence[str]) -> str | None:
    """The file of a launcher's command line that configures the GPUs of one host; None if there is none.

    Args:
        words: The launcher's command line, `accelerate launch --config_file FILE ... SCRIPT ...`.
    """
    if not _is_launcher(words):
        return None
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
    """The value of a launcher's option; the training command's own do not count."""
    words = words[: _script_at(words)]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _script(words: Sequence[str]) -> list[str]:
    """The training command in a launcher's words."""
    return list(words[_script_at(words) :]) or ["launch/train.py"]


def _script_at(words: Sequence[str]) -> int:
    return next((number for number, word in enumerate(words) if word.endswith("train.py")), len(words))


def _launcher_words() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
